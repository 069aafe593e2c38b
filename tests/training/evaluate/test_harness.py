"""lm-eval on our models: what it is told about a text is what the network says of it, ChatGLM's marks included."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from inference.engine import generate_many
from models.checkpoint_folder import open_checkpoint
from tests.tiny_chatglm import GENERATIONS, tiny_chatglm
from training.evaluate.common import LoadedModel, load_for_evaluation
from training.evaluate.inputs import check_inputs
from training.utils.flags.parse import parse
from training.utils.flags.steps import EvaluateArguments

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install --no-deps -r requirements-eval.txt")

from scripts.evaluate import __main__ as evaluate
from scripts.evaluate import harness

CONTEXT, REST = "Human: How do I bake", " bread, flour and yeast?"


def requests(*texts: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one, task_name="test") for one in texts]


@pytest.fixture(scope="module", params=["llama", *GENERATIONS])
def loaded(request, llama, shared_dir, tmp_path_factory) -> LoadedModel:
    name = request.param
    folder = llama if name == "llama" else tiny_chatglm(tmp_path_factory.mktemp("chatglm") / name, name, shared_dir)
    return load_for_evaluation(open_checkpoint(folder), "fp32", "auto")


def nats(loaded: LoadedModel, context: list[int], rest: list[int]) -> torch.Tensor:
    """Log-probabilities of each token behind a context, one row and no padding."""
    with torch.no_grad():
        logits = loaded.model(torch.tensor([context + rest])).logits[0, len(context) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(rest)[:, None]).squeeze(1)


def plain(loaded: LoadedModel, text: str) -> list[int]:
    return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


def behind(loaded: LoadedModel, context: list[int]) -> list[int]:
    """A context between its marks, from the tokenizer itself."""
    return loaded.tokenizer.build_inputs_with_special_tokens(context)


def test_likelihoods_are_those_of_single_rows(loaded):
    """Two texts of different length in one batch; a continuation is what the whole has behind the context."""
    model = harness.wrap(loaded, batch_size=2)
    pairs = [(CONTEXT, REST), ("问：怎么做面包？答：", "把面粉、水")]
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, rest), (value, greedy) in zip(pairs, found, strict=True):
        first, whole = plain(loaded, context), plain(loaded, context + rest)
        opening = [loaded.tokenizer.bos_token_id] if loaded.template.kind == "human_assistant" else []
        start = opening + first if opening else behind(loaded, first)
        expected = nats(loaded, start, whole[len(first) :])
        assert value == pytest.approx(float(expected.sum()), rel=1e-4)
        assert greedy is False


def test_a_text_alone_has_no_marks_in_it(loaded):
    """Perplexity of a text: every token of it counts once, the marks never."""
    if loaded.template.kind == "human_assistant":
        pytest.skip("read as lm-eval reads it from the hub")
    (value,) = harness.wrap(loaded, batch_size=2).loglikelihood_rolling(requests((CONTEXT + REST,)), disable_tqdm=True)
    expected = nats(loaded, behind(loaded, []), plain(loaded, CONTEXT + REST))
    assert value == pytest.approx(float(expected.sum()), rel=1e-4)


def test_answers_are_our_greedy_ones(loaded):
    model = harness.wrap(loaded, batch_size=2)
    asked = requests(*((text, {"until": ["\n"], "max_gen_toks": 6}) for text in (CONTEXT, "Hello")))
    found = model.generate_until(asked, disable_tqdm=True)
    for text, answer in zip((CONTEXT, "Hello"), found, strict=True):
        ids = plain(loaded, text)
        opening = [loaded.tokenizer.bos_token_id] if loaded.template.kind == "human_assistant" else []
        made = generate_many(
            loaded.model,
            [opening + ids if opening else behind(loaded, ids)],
            max_batch=1,
            max_new_tokens=6,
            greedy=True,
            stop_token_ids=loaded.template.stop_token_ids,
            pad_token_id=loaded.tokenizer.pad_token_id,
        )
        tokens = made.sequences[0, : made.lengths[0]].tolist()
        assert answer == loaded.tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0]


def task(folder: Path) -> Path:
    """A task of three questions with two answers each; lm-eval reads it without network."""
    rows = [{"q": f"Is {n} even?", "a": n % 2} for n in range(3)]
    (folder / "even.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "even",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "even.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "even.yaml").write_text(json.dumps(config))
    return folder / "even.yaml"


def test_the_command_puts_the_tasks_of_two_models_side_by_side(llama, qwen2, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LC_ALL", "C")
    file = task(tmp_path)
    flags = ["--path", str(llama), "--baseline", str(qwen2), "--lm_eval", str(file), "--output_dir", str(tmp_path / "out")]
    args = parse(EvaluateArguments, flags)
    check_inputs(args)
    evaluate.main(args)
    model = harness.wrap(load_for_evaluation(open_checkpoint(llama), "fp32", "auto"), 1)
    right = 0
    for number in range(3):
        pairs = requests(*((f"Is {number} even?", f" {word}") for word in ("yes", "no")))
        values = [value for value, _ in model.loglikelihood(pairs, disable_tqdm=True)]
        right += values.index(max(values)) == number % 2
    found = json.loads((tmp_path / "out/eval.json").read_text(encoding="utf-8"))["lm_eval"]
    assert found["after"]["even"]["acc"]["value"] == pytest.approx(right / 3)
    assert found.keys() == {"before", "after"}
    line = next(line for line in (tmp_path / "out/eval.md").read_text().splitlines() if line.startswith("| even | acc |"))
    assert f"{right / 3:.4f} +- " in line and line in capsys.readouterr().out
    assert not (tmp_path / "out/metrics.json").exists()


def test_a_missing_file_of_a_task_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"missing\.yaml: no such file"):
        harness.open_tasks(["hellaswag", str(tmp_path / "missing.yaml")])
