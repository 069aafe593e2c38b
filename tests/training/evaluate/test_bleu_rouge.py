"""BLEU and ROUGE: the answers are the model's own, the metrics are theirs, and both are the same each time."""

import json
from pathlib import Path

import pytest

from errors import UserError
from tests.launching import succeed
from training.evaluate import bleu_rouge, text_metrics
from training.evaluate.common import Answer
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
        bleu_rouge.main(parse(EvaluateArguments, flags))
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
    expected = text_metrics.mean_scores([(label, text) for label, (text, _, _) in zip(labels, answers, strict=True)])
    assert {name: metrics[name] for name in text_metrics.METRICS} == pytest.approx(expected, abs=1e-4)
    assert (metrics["examples"], metrics["flags"]["max_target_length"]) == (5, 10)
    assert metrics["mean_tokens"] == sum(length for _, length, _ in answers) / 5
    assert metrics["ended"] == sum(by_itself for _, _, by_itself in answers) / 5
    shown = capsys.readouterr().out
    assert f"| {metrics['bleu-4']:.4f} |" in shown and "| BLEU-4 | ROUGE-1 | ROUGE-2 | ROUGE-L |" in shown
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
    shown = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    bleu = [f"{one['bleu-4']:.4f}" for one in (before, after)]
    assert shown == [["| model", "BLEU-4"], ["| ---", "---"], ["| before", bleu[0]], ["| after", bleu[1]]]


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


def test_empty_answers_count_and_are_counted():
    text_metrics.check_libraries()
    answers = [Answer("黑色的裙子", 4, True), Answer("", 1, True), Answer("裙", 7, False), Answer("", 2, True)]
    metrics = bleu_rouge.summary(["黑色的裙子"] * 4, answers)
    alone = text_metrics.score("黑色的裙子", "裙")
    assert metrics["bleu-4"] == pytest.approx((100 + alone["bleu-4"]) / 4)
    assert (metrics["mean_tokens"], metrics["ended"], metrics["empty"]) == (3.5, 0.75, 2)


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
        (["--ptuning_checkpoint", "{folder}/missing"], "missing: no such folder"),
    ],
)
def test_wrong_input_is_one_sentence(run, tmp_path, words, sentence):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    with pytest.raises(UserError) as caught:
        run(*(word.format(folder=tmp_path) for word in words))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
