"""Flags of short runs of the steps, and the comparison of their curves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steps import step_of
from tests.launching import logged

COMMON = "--dtype fp32 --seed 7 --data_split 1,1,1 --eval_fraction 0.1 --num_warmup_steps 0 --max_steps 3 --logging_steps 1"
SUPERVISED = "--max_seq_len 64 --learning_rate 1e-3 --per_device_train_batch_size 2 --global_batch_size 8"
# A large epsilon keeps Adam from making steps of full size out of rounding, so that weights can be compared.
PPO = (
    "--max_prompt_seq_len 48 --max_answer_seq_len 8 --actor_learning_rate 1e-3 --critic_learning_rate 1e-3 "
    "--adam_epsilon 1e-2 --eval_prompts 4"
)
CURVES = {
    "sft": ("train/loss", "eval/loss"),
    "reward": ("train/loss", "eval/accuracy"),
    "dpo": ("train/loss", "train/margin", "eval/loss", "eval/accuracy", "eval/chosen", "eval/rejected"),
    "ppo": ("train/score", "train/kl", "train/actor_loss", "eval/score", "eval/win_rate"),
}


def step(
    kind: str,
    output: Path,
    data: Path,
    model: Path,
    more: str = "",
    *,
    critic: Path | None = None,
    processes: int = 1,
) -> tuple[str, list[str]]:
    """Return (module, flags) of three steps with a global batch of 8, or three rollouts of 8 prompts in minibatches of 4,
    whatever the number of processes. model: where the step starts, in step 3 the actor; more: flags that win.
    """
    files = f"--data_path {data} --output_dir {output}"
    if kind == "ppo":
        models = f"--actor_model_name_or_path {model}" + (f" --critic_model_name_or_path {critic}" if critic else "")
        sizes = f"--per_device_generation_batch_size {8 // processes} --per_device_training_batch_size {4 // processes} {PPO}"
    else:
        models, sizes = f"--model_name_or_path {model}", SUPERVISED
    return step_of(kind).module, f"{COMMON} {files} {models} {sizes} {more}".split()


def assert_same_curves(found: Path, expected: Path, names: tuple[str, ...], absolute: float = 1e-4) -> None:
    """Fail unless both runs logged the same values; absolute 0: bit for bit."""
    for name in names:
        values, whole = logged(found, name), logged(expected, name)
        assert values and values == pytest.approx(whole, abs=absolute, rel=0 if absolute == 0 else 1e-6), name


def assert_same_weights(found: Path, expected: Path, absolute: float = 0.0) -> None:
    """Fail unless two safetensors files hold the same tensors; absolute 0: bit for bit."""
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=absolute, rtol=1e-4 if absolute else 0)
