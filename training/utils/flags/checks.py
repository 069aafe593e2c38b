"""Checks that need nothing but the flags: ranges, combinations, the form of the texts."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from errors import UserError
from training.utils.flags.deepspeed_file import check_precision, check_stage
from training.utils.flags.no_effect import check_no_effect
from training.utils.flags.steps import CommonArguments, PPOArguments, SFTArguments

logger = logging.getLogger("sanbu")


def validate(args: Any) -> None:
    """Raise UserError for a value out of range or flags that contradict each other."""
    check_ranges(args)
    check_columns(args)
    check_output(args)
    stages = {name.removesuffix("zero_stage"): value for name, value in vars(args).items() if name.endswith("zero_stage")}
    if isinstance(args, CommonArguments):
        check_training(args, stages)
    check_no_effect(args, stages)


def check_training(args: CommonArguments, stages: dict[str, int | str]) -> None:
    """Raise UserError for flags of a training step that contradict each other. stages: by the prefix of each model's flags."""
    check_data(args)
    if isinstance(args, SFTArguments):
        check_lengths(args)
    if isinstance(args, PPOArguments):
        check_rollouts(args)
        check_rewards(args)
        check_objective(args)
        check_memory_mode(args)
    check_stage(args.deepspeed_config, stages)
    if args.dtype != "auto":
        check_precision(args.deepspeed_config, args.dtype)
    if args.optimizer == "fused_adam" and (args.offload or args.offload_optimizer):
        raise UserError("--optimizer fused_adam works on the card, --offload moves its states to the host; use auto.")
    check_quantization(args, stages)
    for prefix in stages:
        check_lora(args, prefix)
        check_prefix(args, prefix)


def check_ranges(args: Any) -> None:
    """Raise UserError for a number that is not finite or outside its flag's range."""
    for one in fields(args):
        value = getattr(args, one.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        within = one.metadata["within"]
        if not math.isfinite(value) or not within.holds(value):
            wrong = within.wrong if math.isfinite(value) else "must be finite"
            raise UserError(f"--{one.name} {value}: {wrong}.")


def check_columns(args: Any) -> None:
    """--columns can be read."""
    pairs = [pair.split("=") for pair in (args.columns or "").split(",") if args.columns]
    if any(len(pair) != 2 or not all(pair) for pair in pairs) or len({pair[0] for pair in pairs}) < len(pairs):
        raise UserError(f"--columns {args.columns}: expected our_name=name_in_the_file,…, each name of ours once.")


def check_output(args: Any) -> None:
    """--output of an evaluation can be written: better said before the models answer than after."""
    if not getattr(args, "output", None):
        return
    output = Path(args.output)
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        raise UserError(f"--output {output} cannot be written; name a file in an existing folder of yours.")


def check_data(args: CommonArguments) -> None:
    """--data_path and --data_split can be read, and this step gets a share; --deepspeed_config exists."""
    if not all(args.data_path):
        raise UserError("--data_path holds an empty name; give names of data sets or paths of files.")
    try:
        shares = [float(share) for share in args.data_split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares):
        raise UserError(f"--data_split {args.data_split}: expected three shares for steps 1, 2 and 3, such as 2,4,4.")
    if shares[args.phase - 1] == 0 and not getattr(args, "sft_only_data_path", None):
        raise UserError(f"--data_split {args.data_split} leaves nothing for {args.title}; raise its share.")
    if args.deepspeed_config and not Path(args.deepspeed_config).is_file():
        raise UserError(f"--deepspeed_config {args.deepspeed_config}: no such file; name a JSON of DeepSpeed keys.")


def check_lengths(args: SFTArguments) -> None:
    """The limits of prompt and answer come together, and say the same as --max_seq_len where that is given too."""
    apart = {"max_source_length": args.max_source_length, "max_target_length": args.max_target_length}
    absent = [name for name, value in apart.items() if value is None]
    if len(absent) == 1:
        (given,) = apart.keys() - set(absent)
        raise UserError(f"--{given} needs --{absent[0]} too; to limit both together give --max_seq_len alone.")
    if not absent and args.max_seq_len != sum(apart.values()):
        raise UserError(
            f"--max_seq_len {args.max_seq_len} is not --max_source_length + --max_target_length "
            f"= {sum(apart.values())}; drop it, the two say enough."
        )


def check_quantization(args: CommonArguments, prefixes: Iterable[str]) -> None:
    """Integers cannot be trained: a quantised base needs adapters over it."""
    names = ("lora_dim", "pre_seq_len", "ptuning_checkpoint")
    adapters = [f"{prefix}{name}" for prefix in prefixes for name in names]
    if args.quantization_bit and not any(getattr(args, name) for name in adapters):
        raise UserError(
            f"--quantization_bit {args.quantization_bit} freezes the weights; give --{' or --'.join(adapters)} something "
            "to train over them, or drop it."
        )


def check_lora(args: CommonArguments, prefix: str) -> None:
    """Raise UserError for adapters that a scale of 0 keeps from learning."""
    if getattr(args, f"{prefix}lora_dim") and not getattr(args, f"{prefix}lora_alpha"):
        raise UserError(
            f"--{prefix}lora_alpha 0 multiplies the adapters by 0, and nothing is learned; drop it, and it is twice the rank."
        )


def check_prefix(args: CommonArguments, prefix: str) -> None:
    """P-Tuning beside nothing else that trains, from a folder that is there."""
    tuned = next((name for name in ("pre_seq_len", "ptuning_checkpoint") if getattr(args, prefix + name)), None)
    if tuned is None:
        return
    if getattr(args, f"{prefix}lora_dim"):
        raise UserError(
            f"--{prefix}{tuned} and --{prefix}lora_dim: a prefix and adapters are not trained together; drop one of the two."
        )
    folder = getattr(args, f"{prefix}ptuning_checkpoint")
    if folder and not Path(folder).expanduser().is_dir():
        raise UserError(f"--{prefix}ptuning_checkpoint {folder}: no such folder; name one that P-Tuning saved.")
    rate = f"{prefix}learning_rate"
    if getattr(args, rate) == next(one.default for one in fields(args) if one.name == rate):
        logger.warning(
            "--%s is at its default of %g, which suits whole weights; a prefix learns at rates like 1e-3 to 2e-2.",
            rate, getattr(args, rate),
        )  # fmt: skip


def check_rollouts(args: PPOArguments) -> None:
    """Batches fit together. A minibatch larger than a rollout is said, not refused: published launchers have it."""
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    if 0 < args.max_tokens_per_device < longest:
        raise UserError(
            f"--max_tokens_per_device {args.max_tokens_per_device} cannot hold one example of --max_prompt_seq_len + "
            f"--max_answer_seq_len = {longest} tokens; raise it to {longest} or more."
        )
    if not all(args.stop_strings):
        raise UserError("--stop_strings holds an empty text, which stands at the beginning of every answer; drop it.")
    if args.generation_weights == "layerwise" and args.actor_zero_stage not in (3, "auto"):
        logger.warning(
            "--generation_weights layerwise has no effect with --actor_zero_stage %d: every process has whole weights.",
            args.actor_zero_stage,
        )
    rollout = args.answers_at_once * args.generation_batches
    minibatch = args.per_device_training_batch_size * args.gradient_accumulation_steps
    if minibatch > rollout:
        logger.warning(
            "A minibatch of %d answers a process (per_device_training_batch_size x gradient_accumulation_steps) is "
            "more than the %d of a rollout: each rollout is one optimizer step. --generation_batches %d would fill it.",
            minibatch, rollout, math.ceil(minibatch / args.answers_at_once),
        )  # fmt: skip


def check_rewards(args: PPOArguments) -> None:
    """Something scores the answers, from files and addresses that can be read; the models that the flags ask for are named."""
    outside = {"reward_function": args.reward_function, "reward_endpoint": args.reward_endpoint}
    if not args.reward_model and not any(outside.values()):
        raise UserError("--reward_model false leaves nothing to score with; give --reward_function or --reward_endpoint.")
    if not args.critic_model_name_or_path and args.reward_model:
        raise UserError(
            f"{args.title} needs --critic_model_name_or_path: the reward model, which step 2 trains. Without one give "
            "--reward_function or --reward_endpoint, and --reward_model false."
        )
    if not args.critic_model_name_or_path and args.has_critic:
        raise UserError(
            f"{args.title} needs --critic_model_name_or_path with --advantage gae: the critic starts from it; name a reward "
            "model, or the SFT model, or take --advantage grpo, rloo or reinforce++, which have no critic."
        )
    for spec in args.reward_function:
        file, _, name = spec.rpartition(":")
        if not name.isidentifier() or not file.endswith(".py"):
            raise UserError(f"--reward_function {spec}: expected FILE.py:NAME, a file and a function in it.")
        if not Path(file).expanduser().is_file():
            raise UserError(f"--reward_function {spec}: no file {file}; name an existing Python file.")
    for url in args.reward_endpoint:
        if not is_web_address(url):
            raise UserError(f"--reward_endpoint {url}: expected an address such as http://127.0.0.1:8000/score.")
    check_reward_weights(args)


def check_reward_weights(args: PPOArguments) -> None:
    """One finite number for each source, and not all of them 0."""
    if args.reward_weights is None:
        return
    names = ["reward model"] * args.reward_model + args.reward_function + args.reward_endpoint
    try:
        weights = args.reward_weight_list
    except ValueError:
        weights = []
    if len(weights) != len(names) or not all(map(math.isfinite, weights)):
        raise UserError(
            f"--reward_weights {args.reward_weights}: expected {len(names)} numbers with commas, in this order: "
            f"{', '.join(names)}."
        )
    if not any(weights):
        raise UserError(f"--reward_weights {args.reward_weights}: every score would be 0; give a source another weight.")


def is_web_address(url: str) -> bool:
    """Whether a text is a whole address of http or https."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url == "".join(url.split())
    except ValueError:   # a port that is no number, brackets that do not close
        return False


def check_objective(args: PPOArguments) -> None:
    """Raise UserError for flags of the objective that contradict each other."""
    if args.advantage in ("grpo", "rloo") and args.num_return_sequences < 2:
        raise UserError(
            f"--advantage {args.advantage} compares the answers to one prompt with each other, and --num_return_sequences "
            f"{args.num_return_sequences} leaves nothing to compare; give 2 or more, such as 4."
        )
    if args.kl_target and not args.kl_coef:
        raise UserError(
            f"--kl_target {args.kl_target} moves --kl_coef by factors, and 0 stays 0; give it a start such as 0.05."
        )
    if args.dual_clip and args.dual_clip <= 1:
        raise UserError(f"--dual_clip {args.dual_clip}: must be more than 1, such as 3, or 0 for none.")
    if args.overlong_tokens > args.max_answer_seq_len:
        raise UserError(
            f"--overlong_tokens {args.overlong_tokens} is more than --max_answer_seq_len {args.max_answer_seq_len}, the "
            "limit that it counts back from; lower it."
        )


def check_memory_mode(args: PPOArguments) -> None:
    """A shared trunk is frozen, whole and on the device; what is trained are adapters over it."""
    if args.memory_mode != "shared":
        return
    trained = {"actor": True, "critic": args.has_critic}
    for role in (role for role in trained if trained[role]):
        if not getattr(args, f"{role}_lora_dim"):
            raise UserError(
                f"--memory_mode shared trains adapters over frozen weights, and --{role}_lora_dim is 0; give a rank such as 16, "
                "or take --memory_mode separate."
            )
    for name in ("offload_reference_model", "offload_reward_model"):
        if getattr(args, name):
            raise UserError(f"--{name} contradicts --memory_mode shared: there is no such copy; drop one of the two flags.")
    for name in ("critic_pre_seq_len", "critic_ptuning_checkpoint"):
        if getattr(args, name):
            raise UserError(f"--{name} with --memory_mode shared: a prefix has no place there; take --memory_mode separate.")
    stages = args.actor_zero_stage, args.critic_zero_stage
    if "critic" in args.models and 3 in stages and stages[0] != stages[1]:
        raise UserError(
            f"--actor_zero_stage {stages[0]} and --critic_zero_stage {stages[1]} with --memory_mode shared: the one trunk is split "
            "over the processes by stage 3, or whole; give 3 to both, or to none."
        )
