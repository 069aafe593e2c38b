"""Checks of the models and data that an evaluation names, before torch is imported."""

from __future__ import annotations

from typing import Any

from errors import UserError
from models.checkpoint_folder import CheckpointFolder, open_checkpoint
from training.utils.data.paths import check_local
from training.utils.flags.steps import RewardEvalArguments


def check_inputs(args: Any) -> None:
    """Raise UserError for a model or data set that is not there. args: the flags of an evaluation."""
    for name, value in vars(args).items():
        if value and (name.startswith("model_name_or_path") or name == "baseline"):
            check_reward_model(value) if isinstance(args, RewardEvalArguments) else open_checkpoint(value)
    for path in args.data_path:
        check_local(path)


def check_reward_model(path: str) -> CheckpointFolder:
    """Open the checkpoint of a reward model or a critic. Raise UserError for a language model: its head would be random."""
    checkpoint = open_checkpoint(path)
    if not checkpoint.gives_scores:
        raise UserError(f"--model_name_or_path {path} is no reward model ({checkpoint.architecture}); step 2 trains one.")
    return checkpoint
