"""DPO as a user runs it: references of every kind, and real text. tests/training/test_steps.py has processes and resume."""

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from inference.chatbot import main as chat
from tests.launching import logged, write_pairs
from tests.several import run_several
from tests.tiny import tiny_checkpoint
from tests.training.runs import assert_same_curves, step

pytestmark = pytest.mark.distributed

METRICS = [f"{part}/{name}" for part in ("train", "eval") for name in ("loss", "accuracy", "margin", "chosen", "rejected")]
FOUR = "--data_split 0,1,0 --eval_fraction 0.2 --max_steps 4 --seed 1234"
LORA = "--lora_dim 4 --lora_learning_rate 1e-2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder with all runs by their names."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_checkpoint(folder / "base", "llama")
    tiny_checkpoint(folder / "other", "llama", seed=5)
    data = write_pairs(folder / "pairs.jsonl", 54)
    names = {
        "full": "",
        "lora": LORA,
        "copied": f"{LORA} --ref_model_name_or_path {folder}/base",
        "other-ref": f"--ref_model_name_or_path {folder}/other",
        "host": "--offload_reference_model",
        "smooth": "--label_smoothing 0.25 --beta 0.5",
        "prefix": "--learning_rate 1e-2 --pre_seq_len 4",
        "more": f"--learning_rate 1e-2 --model_name_or_path {folder}/prefix",
    }
    start = data, folder / "base"
    run_several([step("dpo", folder / name, *start, f"{FOUR} {more}") for name, more in names.items()], folder, 1)
    return folder


def metrics(folder: Path) -> dict[str, list[float]]:
    """All metrics of a run, step by step."""
    return {name: logged(folder, name) for name in METRICS}


def test_a_run_starts_at_its_reference_and_leaves_it(runs):
    for name in ("full", "lora"):
        found = metrics(runs / name)
        assert found["eval/chosen"][0] == found["eval/rejected"][0] == 0.0 and found["eval/accuracy"][0] == 0.5
        assert found["train/loss"][0] == found["eval/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert found["eval/loss"][-1] < 0.6 and found["eval/margin"][-1] > 0
        for part in ("train", "eval"):
            for margin, good, bad in zip(*(found[f"{part}/{key}"] for key in ("margin", "chosen", "rejected")), strict=True):
                assert margin == pytest.approx(good - bad, abs=1e-6)


def test_references_without_a_copy_on_the_host_and_of_another_model(runs):
    assert metrics(runs / "lora") == metrics(runs / "copied")
    assert_same_curves(runs / "host", runs / "full", METRICS, 1e-5)
    assert abs(logged(runs / "other-ref", "eval/chosen")[0]) > 0.01


def test_smoothing_and_beta_reach_the_loss(runs):
    """The loss is convex in the difference of a pair: its mean is a little above the loss at the mean difference."""
    smooth, plain = metrics(runs / "smooth"), metrics(runs / "full")
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
    more = metrics(runs / "more")
    assert more["eval/chosen"][0] == more["eval/rejected"][0] == 0.0 and abs(more["eval/margin"][-1]) > 1e-3


def test_the_result_is_a_plain_language_model(runs):
    for name in ("full", "lora"):
        AutoModelForCausalLM.from_pretrained(runs / name)
    assert chat(["--path", str(runs / "lora"), "--prompt", "What is 4 plus 1?", "--greedy", "--max_new_tokens", "4"]) == 0
    assert json.loads((runs / "full" / "sanbu_done.json").read_text())["flags"]["beta"] == 0.1


def test_implicit_accuracy_on_real_pairs_rises(shared_dir, tmp_path):
    """Chinese pairs, a random tiny model, fifteen steps; the metrics of evaluation are those of the training pairs."""
    base = tiny_checkpoint(tmp_path / "base", "llama")
    lines = (shared_dir / "data/preference_zh/oasst_rm_zh.jsonl").read_text(encoding="utf-8").splitlines()[:32]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    more = "--data_split 0,1,0 --eval_fraction 0 --max_seq_len 128 --max_steps 15 --learning_rate 3e-3 --eval_interval 15"
    more += " --global_batch_size 16 --per_device_train_batch_size 16"
    run_several([step("dpo", tmp_path / "dpo", tmp_path / "pairs.jsonl", base, more)], tmp_path, 1)
    found = metrics(tmp_path / "dpo")
    assert found["eval/accuracy"][0] == 0.5 and found["eval/accuracy"][-1] > 0.8
    assert found["eval/margin"][-1] > 0.1
