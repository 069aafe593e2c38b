"""Flags that would change nothing beside the others: a table with one row a reason, and one loop over it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

from errors import UserError
from training.utils.flags.steps import (
    CommonArguments,
    DPOArguments,
    EvaluateArguments,
    PPOArguments,
    RewardArguments,
    SFTArguments,
)

logger = logging.getLogger("sanbu")


class Row(NamedTuple):
    """flags: names, with spaces. idle: true where they have no effect. reason: goes on after "--FLAG has no effect"."""

    flags: str
    idle: Callable[[Any], Any]
    reason: str


ROWS = {
    EvaluateArguments: (
        Row("temperature top_p top_k", lambda args: not args.do_sample, "on greedy answers; add --do_sample"),
        Row("num_fewshot apply_chat_template", lambda args: not args.lm_eval, "without --lm_eval; name a task"),
    ),
    CommonArguments: (
        Row(
            "num_warmup_steps",
            lambda args: args.lr_scheduler_type == "constant" and args.num_warmup_steps,
            "with --lr_scheduler_type constant; take constant_with_warmup",
        ),
        Row("allow", lambda args: args.allow and not args.resume, "without --resume; give it too"),
    ),
    DPOArguments: (
        Row(
            "offload_reference_model",
            lambda args: args.lora_dim and not args.ref_model_name_or_path,
            "with --lora_dim: the reference is the trained model without its adapter, not a copy; drop that",
        ),
    ),
    PPOArguments: (
        Row("ema_decay", lambda args: not args.enable_ema, "without --enable_ema; give it too"),
        Row(
            "unsupervised_text_column",
            lambda args: not args.unsupervised_dataset_name,
            "without --unsupervised_dataset_name; name the data set",
        ),
        Row(
            "unsup_coef",
            lambda args: args.unsup_coef and not args.unsupervised_dataset_name,
            "without --unsupervised_dataset_name; name the data set",
        ),
        Row(
            "critic_lora_dim critic_pre_seq_len critic_ptuning_checkpoint",
            lambda args: not args.critic_model_name_or_path,
            "without --critic_model_name_or_path; name the model",
        ),
        Row("offload_reward_model", lambda args: not args.reward_model, "with --reward_model false; drop that"),
        Row("reward_timeout reward_retries", lambda args: not args.reward_endpoint, "without --reward_endpoint; give one"),
        Row("kl_horizon", lambda args: not args.kl_target, "without --kl_target; give it too"),
        Row("overlong_penalty", lambda args: not args.overlong_tokens, "without --overlong_tokens; give both"),
        Row("overlong_tokens", lambda args: not args.overlong_penalty, "without --overlong_penalty; give both"),
        # Not the critic's memory flags: most recipes have them, and --advantage grpo is to work with every recipe.
        Row(
            "critic_warmup_rollouts whiten_rewards lam cliprange_value critic_dropout",
            lambda args: not args.has_critic,
            "without --advantage gae; give its default where a recipe says otherwise",
        ),
    ),
}


def row_of_rate(prefix: str) -> Row:
    """Return the row for the learning rate of a model that has no score head: under LoRA its adapters have all the training."""
    rate, of_adapters, rank = f"{prefix}learning_rate", f"{prefix}lora_learning_rate", f"{prefix}lora_dim"
    return Row(
        rate,
        lambda args: getattr(args, rank) and getattr(args, rate) != getattr(args, of_adapters),
        f"with --{rank}: adapters are trained at --{of_adapters}; give that",
    )


def row_of_modules(prefix: str) -> Row:
    """Return the row for the modules of a model's adapters."""
    rank = f"{prefix}lora_dim"
    return Row(f"{prefix}lora_module_name", lambda args: not getattr(args, rank), f"without --{rank}; give a rank such as 16")


# Recipes and launchers have these for their runs with LoRA, without it or with a critic: said only to who types them.
TYPED = {
    SFTArguments: (row_of_rate(""), row_of_modules("")),
    RewardArguments: (row_of_modules(""),),
    DPOArguments: (row_of_rate(""), row_of_modules("")),
    PPOArguments: (
        row_of_rate("actor_"),
        row_of_modules("actor_"),
        row_of_modules("critic_"),
        Row(
            "critic_learning_rate critic_lora_learning_rate critic_weight_decay",
            lambda args: not args.has_critic,
            "without --advantage gae; give that",
        ),
    ),
}


def rows_of_model(prefix: str) -> tuple[Row, ...]:
    """Return the rows for the flags of one model. prefix: "", "actor_" or "critic_"."""
    rank, alpha = f"{prefix}lora_dim", f"{prefix}lora_alpha"
    length, saved = f"{prefix}pre_seq_len", f"{prefix}ptuning_checkpoint"
    without_rank = f"without --{rank}; give a rank such as 16"
    return (
        Row(f"{prefix}lora_learning_rate {prefix}lora_dropout", lambda args: not getattr(args, rank), without_rank),
        Row(alpha, lambda args: getattr(args, alpha) and not getattr(args, rank), without_rank),
        Row(
            f"{prefix}prefix_projection",
            lambda args: not getattr(args, length) and not getattr(args, saved),
            f"without --{length}; give a length",
        ),
    )


def rows_of_stages(stages: dict[str, int | str]) -> tuple[Row, ...]:
    """Return the rows for the flags that need a ZeRO stage. stages: by the prefix of each model's flags."""
    highest = max(3 if stage == "auto" else stage for stage in stages.values())
    named = " or ".join(f"--{prefix}zero_stage" for prefix in stages)
    return (
        Row("offload offload_optimizer", lambda args: highest < 1, f"below {named} 1; raise it"),
        Row("offload_param", lambda args: highest < 3, f"below {named} 3; raise it"),
    )


def rows_for(args: Any, stages: dict[str, int | str]) -> Iterator[Row]:
    """Yield the rows that concern these arguments."""
    for cls, rows in ROWS.items():
        if isinstance(args, cls):
            yield from rows
    for prefix in stages:
        yield from rows_of_model(prefix)
    if stages:
        yield from rows_of_stages(stages)


def check_no_effect(args: Any, stages: dict[str, int | str]) -> None:
    """Raise UserError for a flag that is not at its default and has no effect. stages: as in rows_of_stages."""
    defaults = {one.name: one.default for one in fields(args)}
    for flags, idle, reason in rows_for(args, stages):
        for name in flags.split():
            if name in defaults and getattr(args, name) != defaults[name] and idle(args):
                raise UserError(f"--{name} has no effect {reason}, or drop it.")


def say_no_effect(args: Any, typed: Collection[str]) -> None:
    """Warn of each flag of the command line that has no effect. typed: the names of all flags that stand there."""
    for flags, idle, reason in TYPED.get(type(args), ()):
        for name in flags.split():
            of_adapters = name.replace("learning_rate", "lora_learning_rate")
            both = of_adapters != name and of_adapters in typed  # each rate has its place then
            if name in typed and not both and idle(args):
                logger.warning("--%s %s has no effect %s, or drop it.", name, getattr(args, name), reason)
