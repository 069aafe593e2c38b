"""scripts.evaluate: the answers are the model's own, the metrics are theirs, and both are the same each time."""

import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from errors import UserError
from models.templates import load_template
from models.tokenizer import load_tokenizer
from scripts.evaluate import __main__ as evaluate
from tests.launching import succeed
from training.evaluate import text_metrics
from training.evaluate.inputs import check_inputs
from training.utils.flags.parse import parse
from training.utils.flags.steps import EvaluateArguments

ROWS = [
    {"content": "类型#裙*颜色#黑色", "summary": "黑色的裙子，今天天气很好。"},
    {"content": "类型#裤*版型#宽松*图案#线条" * 3, "summary": "宽松的裤子。"},
    {"content": "怎么做面包？", "summary": "把面粉、水、盐和酵母混合，等一个小时，然后烤。"},
    {"content": "Hello", "summary": "Mix flour and water, wait an hour."},
    {"content": "类型#上衣", "summary": "上衣"},
]


@pytest.fixture
def data(tmp_path) -> Path:
    file = tmp_path / "dev.json"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.fixture
def run(llama, data, tmp_path):
    """Evaluates in this process; returns the predictions and the metrics."""

    def start(*words: str, to: str = "out") -> tuple[list[dict], dict]:
        flags = ["--model_name_or_path", str(llama), "--data_path", str(data), "--output_dir", str(tmp_path / to), *words]
        args = parse(EvaluateArguments, flags)
        check_inputs(args)
        evaluate.main(args)
        return read(tmp_path / to)

    return start


def read(folder: Path) -> tuple[list[dict], dict]:
    lines = (folder / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_greedy_answers_and_metrics_equal_the_slow_way(run, llama, slow_answers, tmp_path, capsys):
    """transformers' generate on each prompt alone."""
    rows, metrics = run("--max_target_length", "10", "--per_device_eval_batch_size", "2")
    slow = slow_answers(llama)
    answers = [slow(record["content"], 10) for record in ROWS]
    labels = [slow.template.encode_answer(slow.tokenizer, record["summary"])[:10] for record in ROWS]
    labels = [slow.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in labels]
    assert rows == [{"labels": label, "predict": text} for label, (text, _, _) in zip(labels, answers, strict=True)]
    scores = [text_metrics.score(label, text) for label, (text, _, _) in zip(labels, answers, strict=True)]
    expected = {name: statistics.fmean(one[name] for one in scores) for name in text_metrics.METRICS}
    assert {name: metrics[name] for name in text_metrics.METRICS} == pytest.approx(expected, rel=1e-5)
    assert (metrics["examples"], metrics["flags"]["max_target_length"]) == (5, 10)
    assert metrics["mean_tokens"] == sum(length for _, length, _ in answers) / 5
    assert metrics["ended"] == sum(by_itself for _, _, by_itself in answers) / 5
    shown = capsys.readouterr().out
    assert f"| BLEU-4 | {metrics['bleu-4']:.2f} [" in shown
    assert "黑色" in (tmp_path / "out/generated_predictions.txt").read_text(encoding="utf-8")  # letters, not escapes


def test_the_model_before_stands_beside_the_model_after(run, llama, qwen2, tmp_path, capsys):
    words = ["--max_target_length", "6", "--num_examples", "3"]
    _, before = run(*words, "--model_name_or_path", str(qwen2), to="before")
    rows, after = run(*words, to="after")
    capsys.readouterr()
    assert run(*words, "--baseline", str(qwen2), to="both")[0] == rows
    metrics = read(tmp_path / "both")[1]
    for one in (before, after, metrics):
        del one["flags"]
    assert metrics == after | {"baseline": before}
    lines = [(tmp_path / file).read_bytes() for file in ("both/baseline_predictions.txt", "before/generated_predictions.txt")]
    assert lines[0] == lines[1]
    shown = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| BLEU-4")]
    change = after["bleu-4"] - before["bleu-4"]
    expected = [f"{before['bleu-4']:.2f}", f"{after['bleu-4']:.2f}", f"{change:+.2f}"]
    assert [cell.split(" [")[0] for cell in shown[0][1:]] == expected


def test_labels_are_cut_where_answers_must_end_unless_asked(run):
    short, _ = run("--max_target_length", "5", "--num_examples", "1")
    whole, _ = run("--max_target_length", "5", "--num_examples", "1", "--truncate_labels", "false")
    assert whole[0]["labels"] == ROWS[0]["summary"]
    assert len(short[0]["labels"]) < len(whole[0]["labels"])


@pytest.mark.distributed
def test_two_processes_answer_as_one(run, llama, data, tmp_path):
    words = ["--max_target_length", "8", "--per_device_eval_batch_size", "2"]
    first = run(*words)
    flags = ["--model_name_or_path", str(llama), "--data_path", str(data), "--output_dir", str(tmp_path / "two"), *words]
    shown = succeed("training.step1_sft.evaluate", flags, processes=2)  # by its former name
    assert shown.count("BLEU-4") == 1
    rows, metrics = read(tmp_path / "two")
    del metrics["flags"], first[1]["flags"]
    assert (rows, metrics) == first


def test_sampled_answers_follow_the_seed_not_the_batch(run):
    words = ["--do_sample", "--max_target_length", "8"]
    first, _ = run(*words)
    again, _ = run(*words, "--per_device_eval_batch_size", "2")
    other, _ = run(*words, "--seed", "5")
    assert first == again != other


def test_written_answers_are_as_likely_as_transformers_says(run, llama, slow_answers):
    """One record at a time, without padding: nats of each answer with its end token, behind its prompt."""
    _, metrics = run("--max_target_length", "4")
    slow = slow_answers(llama)
    nats = tokens = size = 0
    for record in ROWS:
        prompt = slow.template.encode_prompt(slow.tokenizer, [{"role": "user", "content": record["content"]}])
        written = slow.template.encode_answer(slow.tokenizer, record["summary"])
        with torch.no_grad():
            logits = slow.model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(written), reduction="sum"))
        tokens += len(written)
        size += len(record["summary"].encode())
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_win_rates_count_scores_of_whole_answers(run, llama, qwen2, reward_model, tmp_path):
    """The reward model reads each answer alone, in its own template; a cut one has no end token there."""
    words = ["--max_target_length", "6", "--baseline", str(qwen2), "--reward_model", str(reward_model)]
    _, metrics = run(*words)
    found = json.loads((tmp_path / "out/eval.json").read_text(encoding="utf-8"))
    judge = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer, template = load_tokenizer(reward_model), load_template(reward_model, load_tokenizer(reward_model))
    for row in found["records"]:
        prompt = template.encode_prompt(tokenizer, row["messages"])
        for answer in (row["written"], row["before"], row["after"]):
            ids = template.encode_answer(tokenizer, answer["text"])[: None if answer.get("ended", True) else -1]
            with torch.no_grad():
                hidden = judge.model(input_ids=torch.tensor([prompt + ids])).last_hidden_state[0, -1]
            assert answer["score"] == pytest.approx(float(judge.score(hidden)), rel=1e-4, abs=1e-5)
    scores = [[row[name]["score"] for row in found["records"]] for name in ("written", "before", "after")]
    assert metrics["score"] == pytest.approx(statistics.fmean(scores[2]))
    assert metrics["win_rate"] == statistics.fmean(a > b for b, a in zip(*scores[1:], strict=True))
    assert metrics["win_rate_written"] == statistics.fmean(a > w for w, a in zip(scores[0], scores[2], strict=True))
    assert metrics["baseline"]["win_rate_written"] == statistics.fmean(b > w for w, b in zip(*scores[:2], strict=True))
    assert any(not row["after"]["ended"] for row in found["records"])


def test_prompts_alone_are_enough_for_a_reward_model(run, reward_model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
    words = ["--data_path", str(tmp_path / "prompts.jsonl"), "--reward_model", str(reward_model), "--max_target_length", "4"]
    run("--num_examples", "1")
    with pytest.raises(FileNotFoundError):  # predictions are pairs with written answers; those of the run before are gone
        run(*words)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["examples"] == 2 and "score" in metrics
    assert not {"bleu-4", "perplexity", "win_rate_written"} & metrics.keys()


def test_the_page_says_what_eval_json_says(run, qwen2, reward_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    record = {"content": "<b>Why</b> & how?", "summary": "So."}
    (tmp_path / "html.json").write_text(json.dumps(record) + "\n")
    words = ["--baseline", str(qwen2), "--reward_model", str(reward_model), "--max_target_length", "6"]
    run(*words, "--data_path", str(tmp_path / "html.json"), str(tmp_path / "dev.json"))
    folder = tmp_path / "out"
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    page, text = ((folder / f"eval.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for name, row in found["metrics"].items():
        assert row["after"]["low"] <= row["after"]["value"] <= row["after"]["high"], name
    title, row = "Score by the reward model", found["metrics"]["score"]
    cells = [f"{row[model]['value']:.3f} [{row[model]['low']:.3f}, {row[model]['high']:.3f}]" for model in ("before", "after")]
    assert f"| {title} | {' | '.join(cells)} |" in text
    assert f"<td>{title}</td><td>{'</td><td>'.join(cells)}</td>" in page
    assert "&lt;b&gt;Why&lt;/b&gt; &amp; how?" in page and "<b>Why" not in page
    picture = ElementTree.fromstring((folder / "eval.svg").read_text(encoding="utf-8"))
    assert "![Lengths and scores](eval.svg)" in text and picture.get("width") == "780"
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    run(*words, "--num_examples", "2")
    assert "| 奖励模型的得分 |" in (folder / "eval.md").read_text(encoding="utf-8")


def test_the_former_command_line_means_the_same(caplog):
    """evaluate.sh of ChatGLM2's ptuning; --test_file is what it answered."""
    words = """--do_predict --validation_file AdvertiseGen/val.json --test_file AdvertiseGen/dev.json --overwrite_cache
        --prompt_column content --response_column summary --model_name_or_path chatglm2-6b --ptuning_checkpoint p
        --output_dir o --overwrite_output_dir --max_source_length 64 --max_target_length 64 --fp16_full_eval
        --per_device_eval_batch_size 1 --predict_with_generate --pre_seq_len 128 --quantization_bit 4"""
    args = parse(EvaluateArguments, words.split())
    assert (args.data_path, args.column_map) == (["AdvertiseGen/dev.json"], {"prompt": "content", "response": "summary"})
    assert (args.max_source_length, args.max_target_length, args.per_device_eval_batch_size) == (64, 64, 1)
    assert (args.ptuning_checkpoint, args.quantization_bit, args.dtype, args.do_sample) == ("p", 4, "fp16", False)
    warned = [record.getMessage().split(":")[0] for record in caplog.records]
    assert len(warned) == len(set(warned)) and "--pre_seq_len" in warned and "--do_predict" not in warned
    caplog.clear()
    args = parse(EvaluateArguments, [*words.split(), "--num_beams", "4", "--max_predict_samples", "7"])
    assert args.num_examples == 7
    assert any("--num_beams: " in line and "no beam search" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_target_length", "4000"], "--max_target_length 4000 leaves no room for a prompt in the 256 tokens"),
        (["--model_name_or_path", "{folder}"], "has no config.json"),
        (["--output_dir", "{folder}/prompts.jsonl/out"], "prompts.jsonl/out cannot be written"),
        (["--data_path", "{folder}/prompts.jsonl"], "prompts without answers, so that there is nothing to compare with"),
        (["--data_path", "{folder}/missing.json"], "no such file or folder"),
        (["--columns", "prompt=content,response=a"], '--columns names "a", which is not there'),
        (["--baseline", "{reward_model}"], "reward is a reward model, which does not answer"),
        (["--reward_model", "{llama}"], "--reward_model {llama} is no reward model (LlamaForCausalLM)"),
        (["--ptuning_checkpoint", "{folder}/missing"], "missing: no such folder"),
    ],
)
def test_wrong_input_is_one_sentence(run, llama, reward_model, tmp_path, words, sentence):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    names = {"folder": tmp_path, "llama": llama, "reward_model": reward_model}
    with pytest.raises(UserError) as caught:
        run(*(word.format(**names) for word in words))
    assert sentence.format(**names) in str(caught.value) and "\n" not in str(caught.value)
