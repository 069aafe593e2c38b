"""The three steps on two real processes equal the one-process run: ZeRO 0-3, with and without LoRA, tiny models."""

import json
import shutil
from pathlib import Path

import pytest

from tests.launching import logged, succeed, write_pairs
from tests.several import run_several
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.distributed

COMMON = ["--dtype", "fp32", "--seed", "7", "--logging_steps", "1", "--data_split", "1,1,1", "--eval_fraction", "0.1"]
STEPS = {
    "sft": ("training.step1_sft.main", ["--max_seq_len", "64", "--learning_rate", "1e-3", "--max_steps", "4"]),
    "reward": ("training.step2_reward.main", ["--max_seq_len", "64", "--learning_rate", "1e-3", "--max_steps", "4"]),
    "ppo": (
        "training.step3_ppo.main",
        ["--max_prompt_seq_len", "48", "--max_answer_seq_len", "8", "--actor_learning_rate", "1e-3",
         "--critic_learning_rate", "1e-3", "--num_warmup_steps", "0", "--max_steps", "3", "--ppo_epochs", "2",
         "--eval_prompts", "4"],
    ),
}  # fmt: skip
LOSSES = {"sft": ["train/loss"], "reward": ["train/loss"], "ppo": ["train/score", "train/actor_loss", "train/critic_loss"]}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> dict[str, Path]:
    """A data file, a pretrained model and a reward model, all tiny."""
    folder = tmp_path_factory.mktemp("start")
    data = write_pairs(folder / "pairs.jsonl", 120)
    base = tiny_checkpoint(folder / "base", "llama")
    succeed(STEPS["reward"][0], flags("reward", {"data": data, "base": base}, folder / "reward"))
    return {"data": data, "base": base, "reward": folder / "reward"}


def flags(step: str, start: dict[str, Path], output: Path, processes: int = 1, more: tuple[str, ...] = ()) -> list[str]:
    """The flags of a step; the global batch is 8 whatever the number of processes."""
    common = [*COMMON, "--data_path", str(start["data"]), "--output_dir", str(output), *STEPS[step][1]]
    if step == "ppo":
        models = ["--actor_model_name_or_path", str(start["base"]), "--critic_model_name_or_path", str(start["reward"])]
        batch = ["--per_device_generation_batch_size", str(8 // processes)]
        batch += ["--per_device_training_batch_size", str(4 // processes)]
    else:
        models = ["--model_name_or_path", str(start["base"])]
        batch = ["--per_device_train_batch_size", "2", "--global_batch_size", "8"]
    return [*common, *models, *batch, *more]


def zero_flags(step: str, stage: int, lora: bool) -> tuple[str, ...]:
    """ZeRO stage and LoRA in the names of the step."""
    if step == "ppo":
        found = ["--actor_zero_stage", str(stage), "--critic_zero_stage", str(stage)]
        found += ["--actor_lora_dim", "4", "--critic_lora_dim", "4"] if lora else []
        found += ["--actor_lora_learning_rate", "1e-3", "--critic_lora_learning_rate", "1e-3"] if lora else []
        if lora and stage == 3:  # the mode with the least memory: answers of actor and reference without whole weights
            found += ["--generation_weights", "layerwise", "--offload_reference_model", "--offload_reward_model"]
        return tuple(found)
    return ("--zero_stage", str(stage), *(("--lora_dim", "4", "--lora_learning_rate", "1e-3") if lora else ()))


CASES = [(step, stage, lora) for step in STEPS for stage in (0, 1, 2, 3) for lora in (False, True)]


@pytest.fixture(scope="module")
def outputs(start, tmp_path_factory) -> dict[tuple, Path]:
    """The folders of all cases on two processes, and by (step, lora) of the same run on one."""
    folder = tmp_path_factory.mktemp("runs")
    ones = {(step, lora): folder / f"{step}-{lora}" for step in STEPS for lora in (False, True)}
    twos = {case: folder / "-".join(map(str, case)) for case in CASES}
    run_several(
        [(STEPS[step][0], flags(step, start, ones[step, lora], 1, zero_flags(step, 0, lora))) for step, lora in ones],
        folder, processes=1,
    )  # fmt: skip
    run_several(
        [(STEPS[case[0]][0], flags(case[0], start, output, 2, zero_flags(*case))) for case, output in twos.items()], folder
    )
    return ones | twos


@pytest.mark.parametrize(("step", "stage", "lora"), CASES)
def test_two_processes_equal_one(step, stage, lora, outputs):
    output = outputs[step, stage, lora]
    for name in LOSSES[step]:
        found, expected = logged(output, name), logged(outputs[step, lora], name)
        assert len(found) == len(expected) >= 3
        assert found == pytest.approx(expected, abs=1e-4), name
    saved = [output / "actor", output / "critic"] if step == "ppo" else [output]
    for folder in saved:
        assert (folder / "model.safetensors").exists() and (folder / "sanbu_template.json").exists()
        assert (folder / "adapter" / "adapter_model.safetensors").exists() == lora


@pytest.mark.parametrize("step", list(STEPS))
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(step, start, tmp_path):
    stage = zero_flags(step, 2, False)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    succeed(STEPS[step][0], flags(step, start, whole, 2, (*stage, "--save_steps", "1", "--save_total_limit", "0")), processes=2)
    # What a kill after the second step leaves behind: the checkpoints until then, a metrics file that ran on, a half checkpoint.
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step-00000002", cut / "checkpoints" / "step-00000002")
    (cut / "checkpoints" / ".writing-step-00000003").mkdir()
    shutil.copy(whole / "metrics.jsonl", cut / "metrics.jsonl")
    succeed(STEPS[step][0], flags(step, start, cut, 2, (*stage, "--resume")), processes=2)
    for name in LOSSES[step]:
        assert logged(cut, name) == logged(whole, name), name
    done = json.loads((cut / "sanbu_done.json").read_text())
    assert done["flags"]["resume"] == "auto"
