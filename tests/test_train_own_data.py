"""Data as people have it, in six shapes, goes through all three steps of train.py, and each step says how it read them."""

import json
import re

import pytest

import train
from tests.tiny import CHATML, tiny_checkpoint
from tests.tiny_chatglm import tiny_chatglm
from tests.training.utils.data.rows import turns, write_lines

pytestmark = pytest.mark.scripts

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
WITH_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for call in message.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}",
)
SHORT = "--max_steps 2 --max_seq_len 320 --eval_iters 1 --learning_rate 1e-3 --logging_steps 1"
PPO = (
    "--max_steps 2 --max_prompt_seq_len 160 --max_answer_seq_len 8 --per_device_generation_batch_size 4 "
    "--per_device_training_batch_size 4"
)


def write_shapes(folder, tools=True):
    """Files for step 1, and files of pairs for all steps; of the dialogues the third has a wrong, the fourth no pair."""
    alpaca = [{"instruction": f"Add {n} and 1.", "input": "Be short.", "output": f"{n + 1}."} for n in range(6)]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    used = [
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
    ]
    said = [{"from": "human", "value": "1+1?"}, *(used if tools else []), {"from": "gpt", "value": "2."}]
    write_lines(folder / "sharegpt.jsonl", [{"conversations": said} | ({"tools": json.dumps([TOOL])} if tools else {})] * 4)
    heading, cells = "指令;输入;输出\n", "".join(f"说一种颜色{n};要短;\"蓝色；{n}。\"\n" for n in range(5))
    (folder / "zh.csv").write_text(heading + cells, encoding="utf-8")
    drafts = turns("Draft?", "A bad one.", "Better?", "A good one.")
    drafts[1]["weight"], drafts[3]["weight"] = 0, 1
    write_lines(folder / "openai.jsonl", [{"messages": drafts}] * 3)
    pairs = [
        {"prompt": f"Fruit {n}?", **{name: turns(f"Fruit {n}?", "Pear.", "Colour?", said) for name, said in answers.items()}}
        for n in range(16)
        for answers in [{"chosen": "Green.", "rejected": "Seven."}]
    ]
    pairs[3]["rejected"] = pairs[3]["chosen"]
    write_lines(folder / "pairs.jsonl", pairs)
    labels = [
        {"messages": turns(f"Greet guest {n}?", answer), "label": good}
        for n in range(16)
        for answer, good in (("Say welcome.", True), ("Shout.", False))
    ]
    write_lines(folder / "labels.jsonl", labels[1:])
    return [folder / name for name in ("alpaca.json", "sharegpt.jsonl", "zh.csv", "openai.jsonl")], [
        folder / "pairs.jsonl",
        folder / "labels.jsonl",
    ]


READ = {
    "alpaca.json": "instruction, output, input",
    "sharegpt.jsonl": "conversations, tools",
    "zh.csv": "instruction=指令, output=输出, input=输入",
    "openai.jsonl": "messages",
    "pairs.jsonl": "prompt, chosen, rejected",
    "labels.jsonl": "messages, label",
}


def records_of(name, table):
    """The records of a file in a table of a step, training and held-out ones together; 0 where it is not there."""
    found = re.search(rf"{name}, read by.*?records of this step +(\d+) +(\d+)", table, flags=re.DOTALL)
    return sum(map(int, found.groups())) if found else 0


@pytest.mark.parametrize("family", ["opt", "chatglm2-6b"])
def test_own_data_in_six_shapes(family, forked, tmp_path, request, capsys):
    if family == "opt":
        base = tiny_checkpoint(tmp_path / "base", "opt", max_position_embeddings=512)
        (base / "chat_template.jinja").write_text(WITH_TOOLS)
    else:
        base = tiny_chatglm(tmp_path / "base", family, request.getfixturevalue("shared_dir"))
    alone, paired = write_shapes(tmp_path, tools=family == "opt")
    words = ["--actor-model", str(base), "--reward-model", str(base), "--deployment-type", "cpu"]
    words += ["--data-path", *map(str, paired), "--output-dir", str(tmp_path / "out"), "--ppo-flags", PPO]
    words += ["--sft-flags", f"{SHORT} --sft_only_data_path {' '.join(map(str, alone))}", "--reward-flags", SHORT]
    assert train.main(words) == 0, capsys.readouterr().err

    folders = [tmp_path / "out" / name / "base" for name in ("actor-models", "reward-models", "step3-models")]
    sft, reward, ppo = (folder.joinpath("data.txt").read_text(encoding="utf-8") for folder in folders)
    for name, fields in READ.items():
        fields = fields.removesuffix(", tools" if family != "opt" else "")
        tables = (sft,) if name in map(str, (path.name for path in alone)) else (sft, reward, ppo)
        assert all(f"{name}, read by its fields {fields}\n" in table for table in tables), name
    assert family != "opt" or (">>><call>{" in sft and "too long" not in sft)
    assert "left out 3 with an answer marked not to learn" in sft and ">>>A good one." in sft.replace(">>> ", ">>>")
    assert "1 with an answer judged bad without a good one to the same prompt (first: line 1)" in reward
    records = {name: sum(records_of(name, table) for table in (sft, reward, ppo)) for name in READ}
    calls = 4 if family == "opt" else 0  # are answers, too
    assert records == {
        **{"alpaca.json": 6, "sharegpt.jsonl": 4 + calls, "zh.csv": 5, "openai.jsonl": 3},
        **{"pairs.jsonl": 16, "labels.jsonl": 15},  # each falls to one step; a bad answer alone to none
    }
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<th>SFT model</th>") == page.count('<table class="answers">') >= 1
    on = {json.loads(line).get("eval/measured_on") for line in (folders[1] / "metrics.jsonl").open()} - {None}
    assert len(on) == 1 and f"Reward model: accuracy on {on.pop()} pairs" in page
