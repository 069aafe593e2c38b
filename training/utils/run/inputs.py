"""Check the models, data and folders that the flags of a step name, before torch is imported, which takes seconds."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from errors import UserError, refuse
from models.checkpoint_folder import (
    CheckpointFolder,
    check_context_length,
    check_module_name,
    check_quantized_base,
    check_recomputed_prefix,
    may_be_on_hub,
    open_checkpoint,
)
from models.families import linear_names
from training.utils.data.paths import check_sources
from training.utils.run import heartbeat
from training.utils.run.environment import check_writable, data_paths
from training.utils.run.manifest import read_manifest
from training.utils.run.ranks import check_alone


def check_inputs(args: Any) -> None:
    """Raise UserError for a model, data set, checkpoint or output folder that a step cannot use, and outside srun.

    Of several nodes none ends here: the others would wait for it. The run finds the same and says it with the node's name.
    """
    check_alone()
    if heartbeat.several_nodes():
        return
    if os.environ.get("DS_ACCELERATOR") == "cpu" or (version("torch").endswith("+cpu") and not find_spec("torch_npu")):
        check_cpu(args)
    check_sources(data_paths(args), args.column_map)
    check_resume(args)
    check_models(args)
    check_writable(Path(args.output_dir))
    if args.enable_tensorboard:
        check_writable(Path(args.tensorboard_path), "--tensorboard_path")


def check_cpu(args: Any) -> None:
    """Raise UserError for a dtype or kernels that a CPU does not have."""
    refuse(args.dtype == "fp16", "--dtype fp16: a CPU cannot train in it, and no card is used here; give fp32 or bf16.")
    kernels = args.attn_implementation
    refuse(kernels == "flash_attention_2", f"--attn_implementation {kernels}: a CPU has no such kernels; give auto.")


def check_models(args: Any, made: Mapping[Path, str] = MappingProxyType({}), ask_hub: bool = True) -> None:
    """Raise UserError for a model that is not there, is not whole, cannot play its part, or that the flags do not suit.

    made: folders that steps before this one will write -> the models that those start from. Of a model that is made only
    what it has from that one is looked at. ask_hub=False: models of the hub are not fetched.
    """
    found = {role: path for role, path in args.models.items() if ask_hub or not may_be_on_hub(path)}
    models = {role: open_checkpoint(path) for role, path in found.items() if Path(path) not in made}
    for checkpoint in models.values():
        checkpoint.check_vocabulary()
    check_roles(args, models)
    for role, checkpoint in models.items():
        checkpoint.weights  # noqa: B018  (reads the headers of the files, and raises for what is missing or cut)
        check_bits(args, role, checkpoint)
    for role, path in found.items():
        while Path(path) in made:
            path = made[Path(path)]
        if ask_hub or not may_be_on_hub(path):
            check_names_and_length(args, role, open_checkpoint(path))


def check_names_and_length(args: Any, role: str, checkpoint: CheckpointFolder) -> None:
    """Raise UserError if texts can be longer than a model's table of positions, or adapters go to layers that it has not."""
    prefix, own = role_prefix(role), role != "reference"
    check_context_length(checkpoint, *longest_text(args), **(args.prefix_options(prefix.rstrip("_")) if own else {}))
    check_adapters(args, role, open_checkpoint(checkpoint.weights).content)


def check_adapters(args: Any, role: str, config: dict[str, Any]) -> None:
    """Raise UserError for LoRA on layers that a model has not, and for a prefix that would be dropped. config: its config.json."""
    if role == "reference":
        return
    prefix, kind = role_prefix(role), config["model_type"]
    names, layers = getattr(args, f"{prefix}lora_module_name"), linear_names(config)
    if getattr(args, f"{prefix}lora_dim") and names != "auto" and layers:
        check_module_name(layers, names, kind, f"--{prefix}lora_module_name")
    if getattr(args, f"{prefix}pre_seq_len"):
        check_recomputed_prefix(kind, getattr(args, f"{prefix}gradient_checkpointing"))


def longest_text(args: Any) -> tuple[int, str]:
    """Return the tokens of the longest text of a step, and the flags that set them, for a sentence."""
    if args.section == "ppo":
        return args.max_prompt_seq_len + args.max_answer_seq_len, "--max_prompt_seq_len + --max_answer_seq_len ="
    return args.max_seq_len, "--max_seq_len"


def check_bits(args: Any, role: str, checkpoint: CheckpointFolder) -> None:
    """Raise UserError for weights stored as integers that nothing is trained over, or that are to be quantised otherwise."""
    if role == "reference":
        return
    prefix = role_prefix(role)
    flags = [getattr(args, f"{prefix}{name}") for name in ("lora_dim", "pre_seq_len", "ptuning_checkpoint")]
    adapted = any(flags) or checkpoint.weights != checkpoint.folder or bool(checkpoint.content.get("pre_seq_len"))
    check_quantized_base(checkpoint, args.quantization_bit if adapted else 0, adapters=adapted)


def role_prefix(role: str) -> str:
    """Return how the flags of a role begin: "" for the one model of a step, else actor_ or critic_."""
    return "" if role in ("model", "reference") else f"{role}_"


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
