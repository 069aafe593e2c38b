"""Two models side by side: which prompts are asked, what is answered, how the answers stand on a terminal."""

import json
import unicodedata

import pytest

from errors import UserError
from models.checkpoint_folder import open_checkpoint
from training.evaluate.common import BUILT_IN, load_for_evaluation
from training.evaluate.side_by_side import main, read_prompts, side_by_side, wrapped
from training.utils.flags.parse import parse
from training.utils.flags.steps import PromptEvalArguments


@pytest.fixture
def run(llama, qwen2, tmp_path):
    """Evaluates in this process; returns what was written."""

    def ask(*words: str) -> dict:
        output = tmp_path / "answers.json"
        models = ["--model_name_or_path_baseline", str(llama), "--model_name_or_path_finetune", str(qwen2)]
        main(parse(PromptEvalArguments, [*models, "--output", str(output), *words]))
        return json.loads(output.read_text(encoding="utf-8"))

    return ask


def read(**changes) -> list[str]:
    args = PromptEvalArguments(model_name_or_path_baseline="a", model_name_or_path_finetune="b", **changes)
    return [prompt[-1]["content"] for prompt in read_prompts(args)]


def test_greedy_answers_in_a_batch_equal_transformers_own_one_by_one(run, llama, qwen2, slow_answers, capsys):
    published = ["--num_beams", "1", "--num_beam_groups", "1", "--top_k", "4", "--penalty_alpha", "0.6", "--add_eot_token"]
    written = run(*published, "--language", "Chinese", "--max_new_tokens", "6")
    shown = capsys.readouterr().out
    questions = BUILT_IN["prompts"]["Chinese"]
    assert [row["prompt"][-1]["content"] for row in written["prompts"]] == questions
    for name, folder in (("baseline", llama), ("finetuned", qwen2)):
        slow = slow_answers(folder)
        for question, row in zip(questions, written["prompts"], strict=True):
            (answer,) = row[name]
            assert (answer["text"], answer["tokens"], answer["ended"]) == slow(question, 6)
        assert f"{name:10}" in shown
    assert questions[0] in shown.replace("\n", "")


def test_several_answers_are_sampled_and_repeatable(run):
    runs = [run("--num_return_sequences", "3", "--max_new_tokens", "8", "--seed", seed)["prompts"] for seed in "112"]
    first, again, other = ([[answer["text"] for answer in row["baseline"]] for row in rows] for rows in runs)
    assert first == again != other
    assert all(len(row) == 3 for row in first) and any(len(set(row)) > 1 for row in first)


def test_prompts_of_a_file_and_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \n", encoding="utf-8")
    assert read(prompts=str(file), num_prompts=1) == ["one", "two"]
    assert read(num_prompts=2) == BUILT_IN["prompts"]["English"][:2]
    file.write_bytes("first\r\nsec\u2028ond\r\n".encode("utf-8-sig"))
    assert read(prompts=str(file)) == ["first", "sec\u2028ond"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"q": f"question {n}", "a": "answer"}) + "\n" for n in range(9)))
    assert read(data_path=[str(data)], columns="prompt=q,response=a", num_prompts=4) == [f"question {n}" for n in range(4)]
    with pytest.raises(UserError, match="leave one of them out"):
        read(prompts=str(file), data_path=[str(data)])
    file.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read(prompts=str(file))
    with pytest.raises(UserError, match="cannot be read"):
        read(prompts=str(tmp_path / "missing.txt"))


def test_a_long_prompt_loses_its_oldest_part(llama):
    """It leaves room for the answer in the 256 tokens of the model, and no more than --max_source_length."""
    loaded = load_for_evaluation(open_checkpoint(llama), "fp32", "auto")
    prompt = [{"role": "user", "content": "word " * 300 + "the end"}]
    ids = loaded.template.encode_prompt(loaded.tokenizer, prompt)
    for longest, length in ((None, 236), (20, 20)):
        (cut,) = loaded.encode([prompt], 20, "--flag", longest)
        assert cut == [loaded.tokenizer.bos_token_id, *ids[1 - length :]]
    with pytest.raises(UserError, match="--flag 256 leaves no room for a prompt in the 256 tokens"):
        loaded.encode([prompt], 256, "--flag")


@pytest.mark.fast
def test_columns_stand_straight_whatever_the_script():
    """Width as a terminal shows it: two columns for a Chinese character."""
    lines = side_by_side("天空是蓝色的，因为阳光被散射。\nshort", "because sunlight scatters in the air above us", 21)
    for line in lines:
        left = line.split(" | ")[0]
        assert sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in left) == 21
    assert "".join(line.split(" | ")[0].rstrip() for line in lines[:2]) == "天空是蓝色的，因为阳光被散射。"

    text = "a sentence of several words, and a-word-that-is-longer-than-the-line-itself follows"
    lines = wrapped(text, 20)
    assert all(len(line) <= 20 for line in lines) and "words," in " ".join(lines).split()
    assert "".join(lines).replace(" ", "") == text.replace(" ", "") and wrapped("", 20) == [""]


def test_wrong_input_is_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        run("--output", str(tmp_path / "missing/all.json"))
    with pytest.raises(UserError, match="did you mean --language"):
        run("--langauge", "Chinese")
