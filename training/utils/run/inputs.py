"""Check the models, data and folders that the flags of a step name, before torch is imported, which takes seconds."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from models.checkpoint_folder import CheckpointFolder, open_checkpoint
from training.utils.data.paths import check_source
from training.utils.run import heartbeat
from training.utils.run.environment import check_writable, data_paths
from training.utils.run.manifest import read_manifest


def check_inputs(args: Any) -> None:
    """Raise UserError for a model, data set, checkpoint or output folder that a step cannot use.

    Of several nodes none ends here: the others would wait for it. The run finds the same and says it with the node's name.
    """
    if heartbeat.several_nodes():
        return
    for path in data_paths(args):
        check_source(path)
    check_resume(args)
    check_models(args)
    check_writable(Path(args.output_dir))


def check_models(args: Any, made: Collection[Path] = ()) -> None:
    """Raise UserError for a model that is not there, is not whole or cannot play its part. made: folders that steps before
    this one will write, which are not looked at.
    """
    models = {role: open_checkpoint(path) for role, path in args.models.items() if Path(path) not in made}
    for checkpoint in models.values():
        checkpoint.check_vocabulary()
    check_roles(args, models)
    for checkpoint in models.values():
        checkpoint.weights  # noqa: B018  (reads the headers of the files, and raises for what is missing or cut)


def check_resume(args: Any) -> None:
    """Raise UserError for a checkpoint to resume from that is not there or not whole."""
    if args.resume not in (None, "auto"):
        read_manifest(Path(args.resume))


def check_roles(args: Any, models: Mapping[str, CheckpointFolder]) -> None:
    """Raise UserError for a reward model as actor, which would lose its scores, and for a language model as reward model,
    which would get a random head. A critic may start from a language model.
    """
    actor, critic = models.get("actor"), models.get("critic")
    if actor is not None and actor.gives_scores:
        raise UserError(f"--actor_model_name_or_path {actor.path} is a reward model; name the SFT model, which step 1 trains.")
    if critic is not None and args.reward_model and not critic.gives_scores:
        raise UserError(
            f"--critic_model_name_or_path {critic.path} is no reward model ({critic.architecture}); name one that step 2 "
            "trained, or score with --reward_function or --reward_endpoint and --reward_model false."
        )
