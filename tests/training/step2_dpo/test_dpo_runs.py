"""DPO as a user runs it: one process and two, full weights, LoRA and a prefix, cut short and resumed, on real text."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from inference.chatbot import main as chat
from tests.launching import logged, write_pairs
from tests.several import run_several
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.distributed

MODULE = "training.step2_dpo.main"
FIGURES = [f"{part}/{name}" for part in ("train", "eval") for name in ("loss", "accuracy", "margin", "chosen", "rejected")]
KEPT = ("--save_steps", "1", "--save_total_limit", "0")
LORA = ("--lora_dim", "4", "--lora_learning_rate", "1e-2")
DROPPED = (*LORA, "--lora_dropout", "0.1", *KEPT)
TWO = {
    "full-1": ("--zero_stage", "1"), "lora-3": (*LORA, "--zero_stage", "3"),
}


def flags(folder: Path, output: str, *more: str, model: str = "base") -> list[str]:
    """Four steps with a global batch of 8 pairs, whatever the number of processes."""
    files = ["--model_name_or_path", str(folder / model), "--data_path", str(folder / "pairs.jsonl")]
    size = ["--max_seq_len", "64", "--per_device_train_batch_size", "2", "--global_batch_size", "8", "--max_steps", "4"]
    common = ["--dtype", "fp32", "--data_split", "0,1,0", "--eval_fraction", "0.2", "--learning_rate", "1e-3"]
    return [*files, *size, *common, "--logging_steps", "1", "--output_dir", str(folder / output), *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder with all runs by their names."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_checkpoint(folder / "base", "llama")
    tiny_checkpoint(folder / "other", "llama", seed=5)
    write_pairs(folder / "pairs.jsonl", 54)
    prefix = ("--learning_rate", "1e-2")
    alone = [
        flags(folder, "full"),
        flags(folder, "lora", *LORA),
        flags(folder, "copied", *LORA, "--ref_model_name_or_path", str(folder / "base")),
        flags(folder, "other-ref", "--ref_model_name_or_path", str(folder / "other")),
        flags(folder, "host", "--offload_reference_model"),
        flags(folder, "smooth", "--label_smoothing", "0.25", "--beta", "0.5"),
        flags(folder, "dropped", *DROPPED),
        flags(folder, "prefix", *prefix, "--pre_seq_len", "4"),
        flags(folder, "more", *prefix, model="prefix"),
    ]
    mark = str(folder / "dropped/checkpoints/step-00000002")
    alone.append(flags(folder, "resumed", *DROPPED, "--resume", mark))
    run_several([(MODULE, one) for one in alone], folder, 1)
    run_several([(MODULE, flags(folder, f"two-{name}", *more)) for name, more in TWO.items()], folder, 2)
    return folder


def figures(folder: Path) -> dict[str, list[float]]:
    """All figures of a run, step by step."""
    return {name: logged(folder, name) for name in FIGURES}


@pytest.mark.parametrize("name", TWO)
def test_two_processes_equal_one(runs, name):
    found, expected = figures(runs / f"two-{name}"), figures(runs / name.partition("-")[0])
    for figure, values in expected.items():
        assert len(values) >= 2
        assert found[figure] == pytest.approx(values, abs=1e-4), figure
    adapter = runs / f"two-{name}" / "adapter" / "adapter_model.safetensors"
    assert adapter.exists() == name.startswith("lora")


def test_resumed_is_bit_for_bit_the_uninterrupted_run(runs):
    for name, values in figures(runs / "resumed").items():
        assert values == figures(runs / "dropped")[name][-len(values) :], name
    weights, again = (load_file(runs / name / "model.safetensors") for name in ("dropped", "resumed"))
    assert weights.keys() == again.keys() and all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_run_starts_at_its_reference_and_leaves_it(runs):
    for name in ("full", "lora"):
        found = figures(runs / name)
        assert found["eval/chosen"][0] == found["eval/rejected"][0] == 0.0 and found["eval/accuracy"][0] == 0.5
        assert found["train/loss"][0] == found["eval/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert found["eval/loss"][-1] < 0.6 and found["eval/margin"][-1] > 0
        for part in ("train", "eval"):
            for margin, good, bad in zip(*(found[f"{part}/{key}"] for key in ("margin", "chosen", "rejected")), strict=True):
                assert margin == pytest.approx(good - bad, abs=1e-6)


def test_lora_without_a_second_copy_equals_lora_with_one(runs):
    assert figures(runs / "lora") == figures(runs / "copied")


def test_a_reference_on_the_host_and_another_model_as_reference(runs):
    for name, values in figures(runs / "full").items():
        assert logged(runs / "host", name) == pytest.approx(values, abs=1e-5), name
    assert abs(logged(runs / "other-ref", "eval/chosen")[0]) > 0.01


def test_smoothing_and_beta_reach_the_loss(runs):
    """The loss is convex in the difference of a pair: its mean is a little above the loss at the mean difference."""
    smooth, plain = figures(runs / "smooth"), figures(runs / "full")
    assert smooth["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    for found, smoothing in ((smooth, 0.25), (plain, 0.0)):
        margin = found["train/margin"][-1]
        lost, lost_the_other_way = math.log1p(math.exp(-margin)), math.log1p(math.exp(margin))
        least = (1 - smoothing) * lost + smoothing * lost_the_other_way
        assert margin > 0.3 and least - 1e-6 <= found["train/loss"][-1] < least + 0.05
    # Four steps of like size move the log-probabilities alike, so five times the beta is about five times the reward.
    assert 3 < smooth["train/margin"][1] / plain["train/margin"][1] < 7


def test_a_new_prefix_is_compared_with_the_model_without_and_a_saved_one_with_itself(runs):
    assert abs(logged(runs / "prefix", "eval/chosen")[0]) > 1e-3
    names = {file.name for file in (runs / "prefix").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    more = figures(runs / "more")
    assert more["eval/chosen"][0] == more["eval/rejected"][0] == 0.0 and abs(more["eval/margin"][-1]) > 1e-3


def test_the_result_is_a_plain_language_model(runs, capsys):
    for name in ("full", "two-lora-3"):
        AutoModelForCausalLM.from_pretrained(runs / name)
        capsys.readouterr()
        prompt = ["--prompt", "What is 4 plus 1?", "--greedy", "--max_new_tokens", "4"]
        assert chat(["--path", str(runs / name), *prompt]) == 0
    done = json.loads((runs / "full" / "sanbu_done.json").read_text())
    assert done["flags"]["beta"] == 0.1


def test_implicit_accuracy_on_real_pairs_rises(shared_dir, tmp_path):
    """Chinese preference pairs, a random tiny model, fifteen steps; the figures of evaluation are those of the training pairs."""
    tiny_checkpoint(tmp_path / "base", "llama")
    lines = (shared_dir / "data/preference_zh/oasst_rm_zh.jsonl").read_text(encoding="utf-8").splitlines()[:32]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = flags(
        tmp_path, "dpo", "--eval_fraction", "0", "--max_seq_len", "128", "--max_steps", "15", "--learning_rate", "3e-3",
        "--global_batch_size", "16", "--per_device_train_batch_size", "16", "--eval_interval", "15",
    )  # fmt: skip
    run_several([(MODULE, words)], tmp_path, 1)
    found = figures(tmp_path / "dpo")
    assert found["eval/accuracy"][0] == 0.5 and found["eval/accuracy"][-1] > 0.8
    assert found["eval/margin"][-1] > 0.1
