"""A run goes on with other numbers of processes under other ZeRO stages: 1 -> 2 -> 1 makes the curve of the unbroken run."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launching import write_pairs
from tests.several import run_several
from tests.tiny import tiny_checkpoint
from tests.training.runs import CURVES, assert_same_curves, assert_same_weights, step

pytestmark = pytest.mark.distributed

KEPT = "--save_steps 1 --save_total_limit 0"
LORA = "--lora_dim 4 --lora_learning_rate 1e-3"
SAMPLE = "--eval_iters 1 --per_device_eval_batch_size 3"  # the same on any number of processes
MOVING = "--enable_ema --ema_decay 0.5 --ppo_epochs 2"
STAGES = "--actor_zero_stage {} --critic_zero_stage {}"
# name -> step, its flags, those of the two processes that go on, and those of the one process that goes on from them
RUNS = {
    "sft-tied": ("sft", f"--global_batch_size 7 {SAMPLE}", "--zero_stage 1 --per_device_train_batch_size 1", "--zero_stage 3"),
    "sft-prefix-bf16": ("sft", "--pre_seq_len 4 --dtype bf16", "--zero_stage 3", "--zero_stage 0"),
    "reward-lora": ("reward", LORA, "--zero_stage 3", "--zero_stage 2"),
    "sft-fp16": ("sft", "--dtype fp16 --zero_stage 1 --deepspeed_config {folder}/fp16.json", "--zero_stage 3", "--zero_stage 2"),
    "dpo": ("dpo", "", "--zero_stage 2", "--zero_stage 1"),
    "ppo": ("ppo", f"{MOVING} --critic_lora_dim 4", STAGES.format(3, 0), STAGES.format(2, 1)),
}


def base_of(name: str) -> str:
    """The family that a run starts from."""
    return "opt" if "tied" in name else "llama"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """The folder with whole runs by name, those that two processes took over after step 1, and "back-" those that one took over
    from these after step 2.
    """
    folder = tmp_path_factory.mktemp("cards")
    data = write_pairs(folder / "pairs.jsonl", 120)
    (folder / "fp16.json").write_text(json.dumps({"fp16": {"initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 1}}))
    bases = {base_of(name): tiny_checkpoint(folder / base_of(name), base_of(name)) for name in RUNS}

    def run(name: str, output: str, more: str) -> tuple[str, list[str]]:
        kind, flags, *_ = RUNS[name]
        words = f"{KEPT} {flags} {more}".format(folder=folder)
        return step(kind, folder / output, data, bases[base_of(name)], words, critic=folder / "reward-lora")

    first = sorted(RUNS, key=lambda name: name != "reward-lora")  # the critic of the others
    run_several([run(name, name, "") for name in first], folder, 1)
    for name in RUNS:
        take_over(folder / name, folder / f"two-{name}", 1)
    run_several([run(name, f"two-{name}", f"{RUNS[name][2]} --resume") for name in RUNS], folder, 2)
    for name in RUNS:
        take_over(folder / f"two-{name}", folder / f"back-{name}", 2)
    run_several([run(name, f"back-{name}", f"{RUNS[name][3]} --resume") for name in RUNS], folder, 1)
    return folder


def take_over(whole: Path, cut: Path, steps: int) -> None:
    """Copy the checkpoint after so many steps, and the metrics."""
    name = f"step-{steps:08d}"
    shutil.copytree(whole / "checkpoints" / name, cut / "checkpoints" / name)
    shutil.copy(whole / "metrics.jsonl", cut / "metrics.jsonl")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("taken", ["two", "back"])
def test_the_curve_is_that_of_the_unbroken_run(outputs, taken, name):
    whole, resumed = outputs / name, outputs / f"{taken}-{name}"
    half = "16" in name
    assert_same_curves(resumed, whole, CURVES[RUNS[name][0]], 3e-3 if half else 1e-4)
    for file in ("model", "actor/model", "critic/model", "actor_ema/model", "pytorch_model"):
        if (whole / f"{file}.safetensors").exists():
            assert_same_weights(resumed / f"{file}.safetensors", whole / f"{file}.safetensors", 2e-3 if half else 1e-4)


def test_frozen_weights_are_in_no_checkpoint(outputs):
    for name, mark in (("reward-lora", "lora_"), ("sft-prefix-bf16", "prompt_encoder")):
        file = outputs / name / "checkpoints" / "step-00000002" / "model" / "rank-0-0.safetensors"
        names = {key.split(":", 2)[2] for key in load_file(file)}
        assert names and all(mark in one or "score" in one or "v_head" in one for one in names), names


def test_the_loss_scale_falls_and_rises_as_in_the_unbroken_run(outputs):
    def scales(name: str) -> list[tuple[int, float]]:
        facts = [json.loads(file.read_text()) for file in sorted(outputs.glob(f"{name}/checkpoints/step-*/model/engine.json"))]
        return [(one["skipped_steps"], one["loss_scale"]["cur_scale"]) for one in facts]

    assert scales("sft-fp16")[0] == (1, 2**17) and len(set(scales("sft-fp16"))) > 1
    assert scales("two-sft-fp16") == scales("sft-fp16") and scales("back-sft-fp16") == scales("sft-fp16")[1:]
