"""Does a step fit? From its flags and the configs of its models to a plan, to the stages for --zero_stage auto, or to a refusal.

No weight is read: networks are built on the meta device (footprint.py). The arithmetic is in arithmetic.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from errors import UserError
from models.checkpoint_folder import CheckpointFolder, gets_prefix, open_checkpoint
from models.device import DTYPES
from models.sizes import SPARE_COLUMNS
from training.utils.flags.checks import needing_stage_3
from training.utils.flags.deepspeed_file import check_precision, read_deepspeed_config
from training.utils.memory.arithmetic import (
    BUCKET,
    GIB,
    Frozen,
    Job,
    Machine,
    Network,
    Peak,
    Plan,
    Rollout,
    Setting,
    plan,
)
from training.utils.memory.footprint import Footprint

AUTO = "auto"  # of stages, dtypes and kernels


# --- what a step is, read from its flags once -------------------------------------------------------------------------


@dataclass(frozen=True)
class RoleFlags:
    """The flags of one role as far as memory is concerned. prefix: what stands before their names ("", "actor_", "critic_")."""

    prefix: str
    config: PretrainedConfig
    trained: bool
    scalar: bool
    zero_stage: int | str
    gradient_checkpointing: bool
    lora_dim: int
    lora_module_name: str
    pre_seq_len: int
    prefix_projection: bool

    @property
    def adapted(self) -> bool:
        """Return True where the model's own weights are frozen."""
        return bool(self.lora_dim or self.pre_seq_len)


@dataclass(frozen=True)
class StepShape:
    """A step as its flags and the configs of its models describe it: what the plan needs, and nothing that it changes.

    roles: those with flags of their own, "model", or "actor" and "critic". reference: config of DPO's frozen network, None without
    one. length: tokens of the longest row; answer, prompt: of its two halves in step 3. rows_each: rows of an example (a pair is
    two). rows, evaluated: rows of a micro-batch in training and in evaluation. sampled: answers in work at once.
    """

    title: str
    batch_flag: str
    roles: dict[str, RoleFlags]
    dtype: torch.dtype
    attention: str
    setting: Setting  # that the flags ask for; a stage "auto" counts as 0
    length: int
    rows_each: int
    rows: int
    evaluated: int
    quantization_bit: int
    needs_stage_3: bool
    bucket: int
    reference: PretrainedConfig | None = None
    prompt: int = 0
    answer: int | None = None
    sampled: int = 0
    sorts_logits: bool = False
    reward_model: bool = False
    shared: bool = False
    ema: bool = False
    both_gradients: bool = False
    chooses_weights: bool = False  # --generation_weights auto

    @property
    def trained(self) -> list[str]:
        """Return the roles that learn."""
        return [role for role, flags in self.roles.items() if flags.trained]


def read_step(
    args: Any, configs: dict[str, PretrainedConfig], *, dtype: torch.dtype, attention: str, prefixed: tuple[str, ...] = ()
) -> StepShape:
    """Return the shape of a step. configs: by the roles of args.models; prefixed: roles whose folder holds a saved prefix.

    Raises UserError where --deepspeed_config contradicts the dtype: checks.py cannot know what --dtype auto becomes.
    """
    check_precision(args.deepspeed_config, next(name for name, one in DTYPES.items() if one == dtype))
    zero = read_deepspeed_config(args.deepspeed_config).get("zero_optimization", {})
    ppo, pairs = args.section == "ppo", args.section in ("reward", "dpo")
    roles = {role: read_role(args, role, configs[role], role in prefixed) for role in configs if role != "reference"}
    length = args.max_prompt_seq_len + args.max_answer_seq_len if ppo else args.max_seq_len
    batch_flag = "per_device_training_batch_size" if ppo else "per_device_train_batch_size"
    each = 2 if pairs else 1
    rows = getattr(args, batch_flag) * each
    if args.max_tokens_per_device:
        rows = max(each, args.max_tokens_per_device // length)
    setting = Setting(
        stages={role: 0 if flags.zero_stage == AUTO else int(flags.zero_stage) for role, flags in roles.items()},
        checkpointing={role: flags.gradient_checkpointing for role, flags in roles.items()},
        offload_optimizer=args.offload or args.offload_optimizer,
        offload_param=args.offload or args.offload_param,
        offload_reference=(ppo or args.section == "dpo") and args.offload_reference_model,
    )
    shape = StepShape(
        args.title, batch_flag, roles, dtype, attention, setting, length, each, rows,
        evaluated=rows if ppo else args.per_device_eval_batch_size * each,
        quantization_bit=args.quantization_bit, needs_stage_3=bool(needing_stage_3(args)),
        bucket=int(float(zero.get("reduce_bucket_size", BUCKET))),
    )
    if args.section == "dpo" and (args.ref_model_name_or_path or not args.lora_dim):
        return replace(shape, reference=configs.get("reference", configs["model"]))
    return read_rollout(args, shape) if ppo else shape


def read_role(args: Any, role: str, config: PretrainedConfig, prefixed: bool) -> RoleFlags:
    """Return the flags of a role. A saved prefix counts as one of a single token: its length is that of the folder."""
    prefix = "" if role == "model" else f"{role}_"
    names = ("zero_stage", "gradient_checkpointing", "lora_dim", "lora_module_name", "pre_seq_len", "prefix_projection")
    flags = {name: getattr(args, prefix + name) for name in names}
    flags["pre_seq_len"] = flags["pre_seq_len"] or int(prefixed)
    scalar = role == "critic" or args.section == "reward"
    return RoleFlags(prefix, config, trained=role != "critic" or args.has_critic, scalar=scalar, **flags)


def read_rollout(args: Any, shape: StepShape) -> StepShape:
    """Add what step 3 has beside the other steps: rollouts, frozen networks, averages."""
    setting = replace(
        shape.setting, offload_reward=args.offload_reward_model, layerwise=args.generation_weights == "layerwise"
    )
    return replace(
        shape, setting=setting, prompt=args.max_prompt_seq_len, answer=args.max_answer_seq_len, sampled=args.answers_at_once,
        sorts_logits=args.top_p != 1.0 or bool(args.top_k), reward_model=args.reward_model and "critic" in shape.roles,
        shared=args.memory_mode == "shared", ema=args.enable_ema, both_gradients=args.align_overflow,
        chooses_weights=args.generation_weights == AUTO,
    )


# --- plans of settings ------------------------------------------------------------------------------------------------


class StepMemory:
    """Plans of one step for any setting and machine. Keeps the networks that it has looked at."""

    def __init__(self, shape: StepShape) -> None:
        self.shape = shape
        self._footprints: dict[tuple, Footprint] = {}

    def footprint(self, role: str, *, checkpointing: bool = False) -> Footprint:
        """Return the network of a role as it is trained."""
        flags = self.shape.roles[role]
        return self._network(
            role, flags, checkpointing, lora_dim=flags.lora_dim, lora_module_name=flags.lora_module_name,
            pre_seq_len=flags.pre_seq_len, prefix_projection=flags.prefix_projection,
        )

    def _network(self, key: str, flags: RoleFlags, checkpointing: bool = False, **adapters: Any) -> Footprint:
        if (key, checkpointing) not in self._footprints:
            self._footprints[key, checkpointing] = Footprint(
                flags.config, dtype=self.shape.dtype, attn=self.shape.attention, scalar=flags.scalar,
                quantization_bit=self.shape.quantization_bit if flags.adapted else 0,
                gradient_checkpointing=checkpointing, frozen=not adapters, **adapters,
            )
        return self._footprints[key, checkpointing]

    def _frozen(self, role: str, rows: int, offload: bool, *, config: PretrainedConfig | None = None, keep: int | None = None):
        """Return the network of a role without what the run trains. config: of another network in its place."""
        shape, flags = self.shape, self.shape.roles[role]
        if config is not None:
            flags = replace(flags, config=config)
        if config is not None or flags.adapted or not flags.trained:
            network = self._network(f"frozen {role}", flags)
        else:
            network = self.footprint(role)  # the same network, which has been looked at already
        return Frozen(network.weights.all_frozen, network.forward(rows, shape.length, keep), role, offload)

    def job(self, setting: Setting, batch: int | None = None) -> Job:
        """Return what arithmetic.plan asks for. batch: examples in a micro-batch, where not what the flags say."""
        shape = self.shape
        rows = shape.rows if batch is None else batch * shape.rows_each
        evaluated = shape.evaluated if batch is None else rows
        trained, frozen = {}, {}
        for role in shape.trained:
            network = self.footprint(role, checkpointing=setting.checkpointing[role])
            passes = network.training(rows, shape.length, shape.answer)
            # As many rows without a backward pass hold less, and need not be looked at.
            forward = network.forward(evaluated, shape.length, shape.answer) if evaluated > rows else passes
            trained[role] = Network(network.weights, passes, forward)
        if shape.sampled:
            frozen["reference"] = self._frozen("actor", rows, setting.offload_reference, keep=shape.answer)
        elif shape.reference is not None:
            frozen["reference"] = self._frozen("model", rows, setting.offload_reference, config=shape.reference)
        if shape.reward_model:
            reward = self._frozen("critic", rows, setting.offload_reward)
            frozen["reward model"] = replace(reward, shared=shape.shared)
        return Job(
            shape.dtype.itemsize, trained, frozen, self.rollout() if shape.sampled else None, shape.bucket, shape.ema,
            shape.both_gradients, shape.shared,
        )

    def rollout(self) -> Rollout:
        """Return sampling: the answers in work at once, with columns to spare, and the numbers that tokens are drawn from."""
        shape, network = self.shape, self.footprint("actor")
        cache = network.cache(shape.sampled, shape.length + SPARE_COLUMNS)
        reading = network.forward(shape.sampled, shape.prompt, 1)
        # Float32 logits of a row, their softmax, its sum and the draw; with top-p or top-k sorted values and indices too.
        drawn = shape.sampled * network.vocabulary * 4 * (8 if shape.sorts_logits else 4)
        # A layer that grows has its old and its new buffers at once.
        return Rollout("actor", cache + 2 * cache // network.blocks, Peak(reading.activations, max(reading.logits, drawn)))

    def plan(self, setting: Setting, machine: Machine, batch: int | None = None) -> Plan:
        """Return the memory of a setting."""
        return plan(self.job(setting, batch), setting, machine)

    def plan_as_run(self, setting: Setting, machine: Machine) -> Plan:
        """Return the plan; with --generation_weights auto a rollout goes layer by layer where gathered weights do not fit."""
        found = self.plan(setting, machine)
        if found.fits or not self.shape.chooses_weights:
            return found
        return self.plan(replace(setting, layerwise=True), machine)

    def largest_batch(self, setting: Setting, machine: Machine, limit: int = 4096) -> int:
        """Return the largest micro-batch (examples) that fits; 0 if none does."""
        if not self.plan(setting, machine, 1).fits:
            return 0
        low, high = 1, 2
        while high <= limit and self.plan(setting, machine, high).fits:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.plan(setting, machine, middle).fits else (low, middle)
        return low

    def cheapest(self, machine: Machine, batch: int | None = None) -> Plan | None:
        """Return the plan of the fastest setting that fits, with room to spare if any has that."""
        tight = None
        for setting in settings(self.shape):
            found = self.plan(setting, machine, batch)
            if found.verdict == "fits":
                return found
            if found.fits and tight is None:
                tight = found
        return tight


def settings(shape: StepShape) -> Iterator[Setting]:
    """Yield settings from the fastest to the slowest. ZeRO 1 and 2 cost next to nothing, recomputed activations a third of
    the arithmetic, ZeRO-3 half as much communication again, states in host memory a transfer a step, weights there
    one in every pass, and weights that are not gathered for sampling one for every token.
    """
    roles = shape.roles
    # Recomputation drops the prefixes that peft puts in; ChatGLM's networks put in their own.
    own_prefix = all(hasattr(flags.config, "pre_seq_len") for flags in roles.values())
    recomputed = (False, True) if own_prefix or not any(flags.pre_seq_len for flags in roles.values()) else (False,)
    frozen = (False, True) if shape.sampled and not shape.shared else (False,)  # reference and reward model on the host

    def setting(stage: int, recompute: bool = False, away: bool = False, **options: bool) -> Setting:
        stages, checkpointing = dict.fromkeys(roles, stage), dict.fromkeys(roles, recompute)
        return Setting(stages, checkpointing, offload_reference=away, offload_reward=away, **options)

    yield from (setting(stage) for stage in (0, 1, 2))
    yield from (setting(2, recompute) for recompute in recomputed[1:])
    for stage, offloaded in ((3, False), (2, True), (3, True)):
        yield from (setting(stage, again, away, offload_optimizer=offloaded) for away in frozen for again in recomputed)
    for layerwise in (False, True)[: 1 + bool(shape.sampled)]:
        yield setting(3, recomputed[-1], frozen[-1], offload_optimizer=True, offload_param=True, layerwise=layerwise)


def flags_of(setting: Setting, shape: StepShape) -> str:
    """Return the flags that ask for a setting."""
    words = []
    for role, flags in shape.roles.items():
        words.append(f"--{flags.prefix}zero_stage {setting.stages[role]}")
        words += [f"--{flags.prefix}gradient_checkpointing"] if setting.checkpointing[role] else []
    given = {
        "--offload": setting.offload_param,
        "--offload_optimizer": setting.offload_optimizer and not setting.offload_param,
        "--offload_reference_model": setting.offload_reference,
        "--offload_reward_model": setting.offload_reward and shape.reward_model,
        "--generation_weights layerwise": setting.layerwise,
    }
    return " ".join([*words, *(flag for flag, wanted in given.items() if wanted)])


# --- one section, one run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SectionPlan:
    """The plan of a step as it would run on a machine. stages: what --zero_stage auto becomes, by role."""

    memory: StepMemory
    machine: Machine
    stages: dict[str, int]
    plan: Plan

    @property
    def dtype(self) -> str:
        """Return fp32, fp16 or bf16."""
        return next(name for name, one in DTYPES.items() if one == self.memory.shape.dtype)

    @property
    def refusal(self) -> str:
        """Return the sentence for a run that does not fit; nothing where it fits."""
        return "" if self.plan.fits else refusal(self.memory, self.plan)


def section_plan(
    args: Any, configs: dict[str, PretrainedConfig], machine: Machine, *, dtype: str, attention: str
) -> SectionPlan:
    """Return the plan of a step on a machine. dtype, attention: what "auto" stands for there ("bf16", "sdpa")."""
    dtype = dtype if args.dtype == AUTO else args.dtype
    attention = attention if args.attn_implementation == AUTO else args.attn_implementation
    return planned(read_step(args, configs, dtype=DTYPES[dtype], attention=attention), machine)


def planned(shape: StepShape, machine: Machine) -> SectionPlan:
    """Return the plan of a step with the stages that "auto" stands for."""
    memory = StepMemory(shape)
    stages = choose_stages(memory, machine)
    setting = replace(shape.setting, stages=shape.setting.stages | stages)
    return SectionPlan(memory, machine, stages, memory.plan_as_run(setting, machine))


def choose_stages(memory: StepMemory, machine: Machine) -> dict[str, int]:
    """Return the stage of every role with --zero_stage auto: the lowest with which the run, otherwise as its flags say, fits
    and all flags have an effect; 3 if none does.
    """
    shape = memory.shape
    automatic = [role for role, flags in shape.roles.items() if flags.zero_stage == AUTO]
    if not automatic:
        return {}
    lowest = 3 if shape.needs_stage_3 else 1 if shape.setting.offload_optimizer else 0
    for stage in range(lowest, 3):
        stages = shape.setting.stages | dict.fromkeys(automatic, stage)
        if memory.plan_as_run(replace(shape.setting, stages=stages), machine).fits:
            return dict.fromkeys(automatic, stage)
    return dict.fromkeys(automatic, 3)


def check_fits(
    args: Any, machine: Machine, models: dict[str, CheckpointFolder], *, dtype: torch.dtype, attn: str
) -> dict[str, int]:
    """Return the flags that --zero_stage auto becomes, for the caller to put in; {} without one. Reads no weights.

    models: the checkpoints of args.models by role.

    Raises UserError with the nearest setting that fits if the run cannot fit; --force lets it start.
    """
    configs, prefixed = {}, []
    for role, checkpoint in models.items():
        configs[role] = open_checkpoint(checkpoint.weights).config()
        options = args.prefix_options("" if role == "model" else role) if role != "reference" else {}
        if options and gets_prefix(checkpoint, args.output_dir, **options):
            prefixed.append(role)
    found = planned(read_step(args, configs, dtype=dtype, attention=attn, prefixed=tuple(prefixed)), machine)
    if not args.force and not found.plan.fits:
        raise UserError(found.refusal)
    return {f"{found.memory.shape.roles[role].prefix}zero_stage": stage for role, stage in found.stages.items()}


def refusal(memory: StepMemory, wanted: Plan) -> str:
    """Return the sentence for a run that does not fit: what it needs, and the nearest setting that fits."""
    shape, machine = memory.shape, wanted.machine
    if machine.accelerator and wanted.on_card > machine.device_memory:
        sizes = wanted.card
        has = f"{machine.device_memory / GIB:.1f}"
        need = f"{wanted.on_card / GIB:.1f} GiB on each of {machine.devices} cards, which have {has}"
    else:
        sizes = wanted.host
        need = f"{wanted.on_host / GIB:.2f} GiB of the host, which has {machine.host_memory / GIB:.2f}"
    largest = max((name for name in sizes if name != "reserve"), key=sizes.get)
    kind = next(iter(shape.roles.values())).config.model_type
    sentence = (
        f"{shape.title} of this {kind} model does not fit: it needs {need} ({largest.replace('_', ' ')} {sizes[largest] / GIB:.2f})"
    )
    smaller, other = "", memory.cheapest(machine)
    if other is None:
        smaller, other = f"--{shape.batch_flag} 1 ", memory.cheapest(machine, 1)
    if other is None:
        lora = "--actor_lora_dim and --critic_lora_dim" if shape.sampled else "--lora_dim"
        return f"{sentence}, and no setting does; take more cards, adapters ({lora}) or a smaller model. --force starts anyway."
    card = f"{other.on_card / GIB:.1f} GiB a card, " if machine.accelerator else ""
    return (
        f"{sentence}. Nearest setting that fits: {smaller}{flags_of(other.setting, shape)} ({card}{other.on_host / GIB:.2f} GiB "
        "on the host). --force starts anyway."
    )
