"""Checks that need nothing but the flags: ranges, combinations, the form of the texts."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from errors import nearest, refuse
from training.utils.flags.common import BATCH_FLAGS
from training.utils.flags.deepspeed_file import check_against_flags, check_offload, check_precision, check_words
from training.utils.flags.no_effect import check_no_effect
from training.utils.flags.steps import CommonArguments, PPOArguments, SFTArguments

logger = logging.getLogger("sanbu")


def validate(args: Any) -> None:
    """Raise UserError for a value out of range or flags that contradict each other."""
    check_ranges(args)
    refuse(not all(args.data_path), "--data_path holds an empty name; give names of data sets or paths of files.")
    check_columns(args)
    check_output(args)
    stages = {name.removesuffix("zero_stage"): value for name, value in vars(args).items() if name.endswith("zero_stage")}
    if isinstance(args, CommonArguments):
        check_training(args, stages)
    check_no_effect(args, stages)


def check_training(args: CommonArguments, stages: dict[str, int | str]) -> None:
    """Raise UserError for flags of a training step that contradict each other. stages: by the prefix of each model's flags."""
    check_data(args)
    check_allowed(args)
    if isinstance(args, SFTArguments):
        check_lengths(args)
    if isinstance(args, PPOArguments):
        check_rollouts(args)
        check_rewards(args)
        check_objective(args)
        check_memory_mode(args)
    check_against_flags(args, stages)
    check_words(args.deepspeed_config)
    check_offload(args)
    if args.dtype != "auto":
        check_precision(args.deepspeed_config, args.dtype)
    refuse(
        args.optimizer == "fused_adam" and (args.offload or args.offload_optimizer),
        "--optimizer fused_adam works on the card, --offload moves its states to the host; use auto.",
    )
    check_quantization(args, stages)
    for prefix in stages:
        check_adapters(args, prefix)


def check_ranges(args: Any) -> None:
    """Raise UserError for a number that is not finite or outside its flag's range."""
    for one in fields(args):
        value = getattr(args, one.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        refuse(isinstance(value, int) and abs(value) > 2**63, f"--{one.name} {value}: must be less than 2^63.")
        refuse(not math.isfinite(value), f"--{one.name} {value}: must be finite.")
        within = one.metadata["within"]
        refuse(not within.holds(value), f"--{one.name} {value}: {within.wrong}.")


def check_columns(args: Any) -> None:
    """Raise UserError for --columns that cannot be read."""
    pairs = [pair.split("=") for pair in (args.columns or "").split(",") if args.columns]
    refuse(
        any(len(pair) != 2 or not all(pair) for pair in pairs) or len({pair[0] for pair in pairs}) < len(pairs),
        f"--columns {args.columns}: expected our_name=name_in_the_file,…, each name of ours once.",
    )


def check_output(args: Any) -> None:
    """Raise UserError for an --output that cannot be written, before the models answer."""
    if not getattr(args, "output", None):
        return
    output = Path(args.output)
    refuse(
        output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK),
        f"--output {output} cannot be written; name a file in an existing folder of yours.",
    )


def check_allowed(args: CommonArguments) -> None:
    """Raise UserError for names in --allow that are no flags, or flags that cannot change within a run."""
    kinds = {one.name: one.metadata["resume"] for one in fields(args)}
    sizes = set(chain(*BATCH_FLAGS.values()))
    may = ", ".join(name for name, kind in kinds.items() if kind == "allow" or name in sizes)
    for name in args.allowed:
        near = nearest(name, kinds)
        refuse(name not in kinds, f"--allow {name}: no such flag{f'; is it {near}' if near else ''}.")
        refuse(kinds[name] == "same", f"--allow {name}: it cannot change within a run; these can: {may}.")


def numbers(text: str) -> list[float]:
    """Return the finite numbers of a text with commas; [] if it has anything else."""
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        return []
    return values if all(map(math.isfinite, values)) else []


def check_data(args: CommonArguments) -> None:
    """Raise UserError for data and shares that cannot be read, a step without a share, or a missing --deepspeed_config."""
    split, shares = f"--data_split {args.data_split}", numbers(args.data_split)
    refuse(
        len(shares) != 3 or min(shares) < 0 or not sum(shares),
        f"{split}: expected three shares for steps 1, 2 and 3, such as 2,4,4.",
    )
    refuse(
        shares[args.phase - 1] == 0 and not getattr(args, "sft_only_data_path", None),
        f"{split} leaves nothing for {args.title}; raise its share.",
    )
    refuse(
        args.deepspeed_config and not Path(args.deepspeed_config).is_file(),
        f"--deepspeed_config {args.deepspeed_config}: no such file; name a JSON of DeepSpeed keys.",
    )


def check_lengths(args: SFTArguments) -> None:
    """Raise UserError unless both limits of prompt and answer are given, or none, and --max_seq_len is their sum."""
    limits = {"source": args.max_source_length, "target": args.max_target_length}
    for given, absent in (("source", "target"), ("target", "source")):
        refuse(
            limits[given] and not limits[absent],
            f"--max_{given}_length needs --max_{absent}_length too; to limit both together give --max_seq_len alone.",
        )
    total = sum(filter(None, limits.values()))
    refuse(
        total and args.max_seq_len != total,
        f"--max_seq_len {args.max_seq_len} is not --max_source_length + --max_target_length = {total}; drop it, the two say "
        "enough.",
    )


def check_quantization(args: CommonArguments, prefixes: Iterable[str]) -> None:
    """Raise UserError for a quantised base without adapters: integers cannot be trained."""
    names = ("lora_dim", "pre_seq_len", "ptuning_checkpoint")
    adapters = [f"{prefix}{name}" for prefix in prefixes for name in names]
    refuse(
        args.quantization_bit and not any(getattr(args, name) for name in adapters),
        f"--quantization_bit {args.quantization_bit} freezes the weights; give --{' or --'.join(adapters)} something to train "
        "over them, or drop it.",
    )


def check_adapters(args: CommonArguments, prefix: str) -> None:
    """Raise UserError for LoRA that cannot learn, LoRA beside P-Tuning, or a prefix from a folder that is not there."""
    rank, folder = getattr(args, f"{prefix}lora_dim"), getattr(args, f"{prefix}ptuning_checkpoint")
    refuse(
        rank and not getattr(args, f"{prefix}lora_alpha"),
        f"--{prefix}lora_alpha 0 multiplies the adapters by 0, and nothing is learned; drop it, and it is twice the rank.",
    )
    tuned = next((name for name in ("pre_seq_len", "ptuning_checkpoint") if getattr(args, prefix + name)), None)
    refuse(
        rank and tuned,
        f"--{prefix}{tuned} and --{prefix}lora_dim: a prefix and adapters are not trained together; drop one of the two.",
    )
    refuse(
        folder and not Path(folder).expanduser().is_dir(),
        f"--{prefix}ptuning_checkpoint {folder}: no such folder; name one that P-Tuning saved.",
    )
    name = f"{prefix}learning_rate"
    rate = getattr(args, name)
    if tuned and rate == next(one.default for one in fields(args) if one.name == name):
        sentence = "--%s is at its default of %g, which suits whole weights; a prefix learns at rates like 1e-3 to 2e-2."
        logger.warning(sentence, name, rate)


def check_rollouts(args: PPOArguments) -> None:
    """Raise UserError for examples that fit no batch; warn of a minibatch larger than a rollout, as published launchers have."""
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    refuse(
        0 < (args.max_tokens_per_device or 0) < longest,
        f"--max_tokens_per_device {args.max_tokens_per_device} cannot hold one example of --max_prompt_seq_len + "
        f"--max_answer_seq_len = {longest} tokens; raise it to {longest} or more.",
    )
    refuse(
        not all(args.stop_strings),
        "--stop_strings holds an empty text, which stands at the beginning of every answer; drop it.",
    )
    if args.generation_weights == "layerwise" and args.actor_zero_stage not in (3, "auto"):
        sentence = "--generation_weights layerwise has no effect with --actor_zero_stage %d: every process has whole weights."
        logger.warning(sentence, args.actor_zero_stage)
    rollout = args.answers_at_once * args.generation_batches
    minibatch = args.per_device_training_batch_size * args.gradient_accumulation_steps
    if minibatch > rollout:
        sentence = (
            "A minibatch of %d answers a process (per_device_training_batch_size x gradient_accumulation_steps) is "
            "more than the %d of a rollout: each rollout is one optimizer step. --generation_batches %d would fill it."
        )
        logger.warning(sentence, minibatch, rollout, math.ceil(minibatch / args.answers_at_once))


def check_rewards(args: PPOArguments) -> None:
    """Raise UserError if nothing scores the answers, or a source, an address, a weight or a model is missing or misspelt."""
    refuse(
        not args.reward_model and not args.reward_function and not args.reward_endpoint,
        "--reward_model false leaves nothing to score with; give --reward_function or --reward_endpoint.",
    )
    needed = f"{args.title} needs --critic_model_name_or_path"
    refuse(
        not args.critic_model_name_or_path and args.reward_model,
        f"{needed}: the reward model, which step 2 trains. Without one give --reward_function or --reward_endpoint, and "
        "--reward_model false.",
    )
    refuse(
        not args.critic_model_name_or_path and args.has_critic,
        f"{needed} with --advantage gae: the critic starts from it; name a reward model, or the SFT model, or take --advantage "
        "grpo, rloo or reinforce++, which have no critic.",
    )
    for spec in args.reward_function:
        file, _, name = spec.rpartition(":")
        wrong = f"--reward_function {spec}"
        refuse(not name.isidentifier() or not file.endswith(".py"), f"{wrong}: expected FILE.py:NAME, a file and a function in it.")
        refuse(not Path(file).expanduser().is_file(), f"{wrong}: no file {file}; name an existing Python file.")
        content = Path(file).expanduser().read_text(encoding="utf-8", errors="replace")  # not run before the device is chosen
        absent = not re.search(rf"\b{name}\b|import \*", content)
        refuse(absent, f"{wrong}: no such name in the file; expected a function {name}(prompts, answers).")
    for url in args.reward_endpoint:
        sentence = f"--reward_endpoint {url}: expected an address such as http://127.0.0.1:8000/score."
        refuse(not is_web_address(url), sentence)
    if args.reward_weights is not None:
        names = ["reward model"] * args.reward_model + args.reward_function + args.reward_endpoint
        given, weights = f"--reward_weights {args.reward_weights}", numbers(args.reward_weights)
        expected = f"expected {len(names)} numbers with commas, in this order: {', '.join(names)}."
        refuse(len(weights) != len(names), f"{given}: {expected}")
        refuse(not any(weights), f"{given}: every score would be 0; give a source another weight.")


def is_web_address(url: str) -> bool:
    """Return True for a whole address of http or https."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url == "".join(url.split())
    except ValueError:  # a port that is no number, brackets that do not close
        return False


def check_objective(args: PPOArguments) -> None:
    """Raise UserError for flags of the objective that contradict each other."""
    refuse(
        args.advantage in ("grpo", "rloo") and args.num_return_sequences < 2,
        f"--advantage {args.advantage} compares the answers to one prompt with each other, and --num_return_sequences "
        f"{args.num_return_sequences} leaves nothing to compare; give 2 or more, such as 4.",
    )
    refuse(
        args.kl_target and not args.kl_coef,
        f"--kl_target {args.kl_target} moves --kl_coef by factors, and 0 stays 0; give it a start such as 0.05.",
    )
    refuse(0 < args.dual_clip <= 1, f"--dual_clip {args.dual_clip}: must be more than 1, such as 3, or 0 for none.")
    refuse(
        args.overlong_tokens > args.max_answer_seq_len,
        f"--overlong_tokens {args.overlong_tokens} is more than --max_answer_seq_len {args.max_answer_seq_len}, the limit that "
        "it counts back from; lower it.",
    )


def check_memory_mode(args: PPOArguments) -> None:
    """Raise UserError for what a shared trunk cannot have: it is frozen, whole and on the device, under trained adapters."""
    if args.memory_mode != "shared":
        return
    for role in ("actor", "critic") if args.has_critic else ("actor",):
        refuse(
            not getattr(args, f"{role}_lora_dim"),
            f"--memory_mode shared trains adapters over frozen weights, and --{role}_lora_dim is 0; give a rank such as 16, or "
            "take --memory_mode separate.",
        )
    for name in ("offload_reference_model", "offload_reward_model"):
        sentence = f"--{name} contradicts --memory_mode shared: there is no such copy; drop one of the two flags."
        refuse(getattr(args, name), sentence)
    for name in ("critic_pre_seq_len", "critic_ptuning_checkpoint"):
        sentence = f"--{name} with --memory_mode shared: a prefix has no place there; take --memory_mode separate."
        refuse(getattr(args, name), sentence)
    actor, critic = args.actor_zero_stage, args.critic_zero_stage
    refuse(
        "critic" in args.models and 3 in (actor, critic) and actor != critic,
        f"--actor_zero_stage {actor} and --critic_zero_stage {critic} with --memory_mode shared: the one trunk is split over "
        "the processes by stage 3, or whole; give 3 to both, or to none.",
    )
