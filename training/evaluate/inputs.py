"""Checks of the models and data that an evaluation names, before torch is imported."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from errors import UserError, refuse
from models.checkpoint_folder import CheckpointFolder, open_checkpoint
from training.utils.data.paths import check_sources
from training.utils.flags.steps import EvaluateArguments, RewardEvalArguments
from training.utils.run.environment import check_writable


def check_inputs(args: Any) -> None:
    """Raise UserError for a model or data set that is not there. args: the flags of an evaluation."""
    scores = isinstance(args, RewardEvalArguments)
    for name, value in vars(args).items():
        if value and (name.startswith("model_name_or_path") or name == "baseline"):
            check_reward_model(value) if scores else check_language_model(value, f"--{name}")
        elif value and name == "reward_model":
            check_reward_model(value, "--reward_model")
    check_sources(args.data_path, args.column_map)
    if isinstance(args, EvaluateArguments):
        refuse(
            not args.data_path and not args.lm_eval,
            "evaluate needs --data_path, records to answer, or --lm_eval, tasks.",
        )
        refuse(
            args.reward_model and not args.data_path,
            "--reward_model scores answers to the records of --data_path; name one.",
        )
        check_harness(args.lm_eval)
        check_writable(Path(args.output_dir))


def check_harness(tasks: list[str]) -> None:
    """Raise UserError for tasks of lm-eval where it is not installed, or under several processes."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    refuse(tasks and several, "--lm_eval runs in one process; start it by python -m scripts.evaluate.")
    refuse(
        tasks and find_spec("lm_eval") is None,
        "--lm_eval needs a package that is missing; pip install --no-deps -r requirements-eval.txt.",
    )


def check_language_model(path: str, flag: str) -> None:
    """Raise UserError for a checkpoint that is not there or is a reward model."""
    refuse(
        open_checkpoint(path).gives_scores,
        f"{flag} {path} is a reward model, which does not answer; name an SFT model or an actor.",
    )


def check_reward_model(path: str, flag: str = "--model_name_or_path") -> CheckpointFolder:
    """Open the checkpoint of a reward model or a critic. Raise UserError for a language model: its head would be random."""
    checkpoint = open_checkpoint(path)
    if not checkpoint.gives_scores:
        raise UserError(f"{flag} {path} is no reward model ({checkpoint.architecture}); step 2 trains one.")
    return checkpoint
