"""The three steps on two real processes equal the one-process run: ZeRO 0-3, with and without LoRA, tiny models."""

import json
import shutil
from pathlib import Path

import pytest

from tests.launching import logged, write_pairs
from tests.several import run_several
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.distributed

COMMON = ["--dtype", "fp32", "--seed", "7", "--logging_steps", "1", "--data_split", "1,1,1", "--eval_fraction", "0.1"]
STEPS = {
    "sft": ("training.step1_sft.main", ["--max_seq_len", "64", "--learning_rate", "1e-3", "--max_steps", "3"]),
    "reward": ("training.step2_reward.main", ["--max_seq_len", "64", "--learning_rate", "1e-3", "--max_steps", "3"]),
    "ppo": (
        "training.step3_ppo.main",
        ["--max_prompt_seq_len", "48", "--max_answer_seq_len", "8", "--actor_learning_rate", "1e-3",
         "--critic_learning_rate", "1e-3", "--num_warmup_steps", "0", "--max_steps", "3", "--ppo_epochs", "2",
         "--eval_prompts", "4"],
    ),
}  # fmt: skip
LOSSES = {"sft": ["train/loss"], "reward": ["train/loss"], "ppo": ["train/score", "train/actor_loss", "train/critic_loss"]}


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


# Every step under every stage, and with LoRA where what it does depends on the stage.
CASES = [
    *(("sft", stage, lora) for stage, lora in ((0, False), (1, True), (2, False), (3, True))),
    *(("reward", stage, lora) for stage, lora in ((0, True), (1, False), (2, False), (3, False))),
    *(("ppo", stage, lora) for stage, lora in ((0, True), (1, False), (2, False), (3, False), (3, True))),
]
KEPT = ("--save_steps", "1", "--save_total_limit", "0")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[tuple, Path]:
    """The folders of all cases on two processes, by (step, lora) of the same run on one, by step of what was resumed."""
    folder = tmp_path_factory.mktemp("runs")
    start = {"data": write_pairs(folder / "pairs.jsonl", 120), "base": tiny_checkpoint(folder / "base", "llama")}
    ones = {(step, lora): folder / f"{step}-{lora}" for step in STEPS for lora in (False, True)}
    start["reward"] = ones["reward", False]
    twos = {case: folder / "-".join(map(str, case)) for case in CASES}
    run_several(
        [(STEPS[step][0], flags(step, start, ones[step, lora], 1, zero_flags(step, 0, lora))) for step, lora in ones], folder, 1
    )
    runs = []
    for case, output in twos.items():
        kept = KEPT if case[1:] == (2, False) else ()
        runs.append((STEPS[case[0]][0], flags(case[0], start, output, 2, (*zero_flags(*case), *kept))))
    run_several(runs, folder)
    cuts = {step: folder / f"{step}-cut" for step in STEPS}
    for step, cut in cuts.items():
        leave_after_two_steps(twos[step, 2, False], cut)
    resumed = (*KEPT, "--resume")
    run_several(
        [(STEPS[step][0], flags(step, start, cuts[step], 2, (*zero_flags(step, 2, False), *resumed))) for step in STEPS], folder
    )
    return ones | twos | cuts


def leave_after_two_steps(whole: Path, cut: Path) -> None:
    """Write what a kill leaves behind: the checkpoint, a metrics file that ran on, half a checkpoint."""
    shutil.copytree(whole / "checkpoints" / "step-00000002", cut / "checkpoints" / "step-00000002")
    (cut / "checkpoints" / ".writing-step-00000003").mkdir()
    shutil.copy(whole / "metrics.jsonl", cut / "metrics.jsonl")


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


@pytest.mark.detail(50)
@pytest.mark.parametrize("step", list(STEPS))
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(step, outputs):
    for name in LOSSES[step]:
        assert logged(outputs[step], name) == logged(outputs[step, 2, False], name), name
    done = json.loads((outputs[step] / "sanbu_done.json").read_text())
    assert done["flags"]["resume"] == "auto"
