"""What a step will need: its flags and the configs of its models -> plans for settings, the cheapest that fits, a refusal.

No weight is read: networks are built on the meta device (training/utils/memory/footprint.py). The arithmetic is in memory.py.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from errors import UserError
from models.checkpoint_folder import gets_prefix, open_checkpoint
from models.device import DTYPES, free_memory, has_accelerator
from training.utils.flags.checks import needing_stage_3
from training.utils.flags.deepspeed_file import check_precision, read_deepspeed_config
from training.utils.flags.steps import DPOArguments, PPOArguments, RewardArguments
from training.utils.memory.arithmetic import (
    BUCKET,
    GIB,
    SPARE_COLUMNS,
    Frozen,
    Job,
    Machine,
    Network,
    Plan,
    Rollout,
    Setting,
    plan,
)
from training.utils.memory.footprint import Footprint, Peak
from training.utils.run.environment import container_free
from training.utils.run.process_group import Run

AUTO = "auto"  # of stages and modules


@dataclass(frozen=True)
class Candidate:
    """A setting that could be taken, and the flags that ask for it."""

    setting: Setting
    flags: str


class StepMemory:
    """A step's flags and models. configs: by role, "model", or "actor" and "critic" ("reference" for DPO's own)."""

    def __init__(
        self, args: Any, configs: dict[str, PretrainedConfig], *, dtype: torch.dtype, attn: str, prefixed: tuple[str, ...] = ()
    ) -> None:
        """prefixed: roles whose folder holds a saved prefix."""
        self.args, self.configs, self.dtype, self.attn, self.prefixed = args, configs, dtype, attn, prefixed
        self.roles = [role for role in ("model", "actor", "critic") if role in configs]
        self.ppo = isinstance(args, PPOArguments)
        self._footprints: dict[tuple, Footprint] = {}
        # Here, as checks.py cannot know what --dtype auto becomes.
        check_precision(args.deepspeed_config, next(name for name, one in DTYPES.items() if one == dtype))
        zero = read_deepspeed_config(args.deepspeed_config).get("zero_optimization", {})
        self.bucket = int(float(zero.get("reduce_bucket_size", BUCKET)))

    # --- flags ----------------------------------------------------------------------------------------------------------

    def flag(self, role: str, name: str, otherwise: Any = 0) -> Any:
        """The value of a role's flag."""
        return getattr(self.args, name if role == "model" else f"{role}_{name}", otherwise)

    @property
    def trained(self) -> list[str]:
        """The roles that learn."""
        return [role for role in self.roles if role != "critic" or self.args.has_critic]

    @property
    def setting(self) -> Setting:
        """The one that the flags ask for; a stage that is still "auto" counts as 0."""
        args = self.args
        stages = {role: self.flag(role, "zero_stage") for role in self.roles}
        stages = {role: 0 if stage == AUTO else int(stage) for role, stage in stages.items()}
        return Setting(
            stages=stages,
            checkpointing={role: self.flag(role, "gradient_checkpointing", False) for role in self.roles},
            offload_optimizer=args.offload or args.offload_optimizer,
            offload_param=args.offload_param or args.offload,
            offload_reference=getattr(args, "offload_reference_model", False),
            offload_reward=getattr(args, "offload_reward_model", False),
            layerwise=getattr(args, "generation_weights", "") == "layerwise",
        )

    # --- models ---------------------------------------------------------------------------------------------------------

    def footprint(self, role: str, *, checkpointing: bool = False, frozen: bool = False) -> Footprint:
        """The network of a role, as it is trained, or as it is without what the run adds (reference, reward model)."""
        key = (role, checkpointing, frozen)
        if key not in self._footprints:
            own = "model" if role == "reference" else role
            adapted = self.flag(own, "lora_dim") or self.flag(own, "pre_seq_len") or own in self.prefixed
            options: dict[str, Any] = {"quantization_bit": self.args.quantization_bit if adapted else 0}
            if not frozen:
                options["lora_dim"] = self.flag(own, "lora_dim")
                options["lora_module_name"] = self.flag(own, "lora_module_name", AUTO)
                options["pre_seq_len"] = self.flag(own, "pre_seq_len") or (1 if own in self.prefixed else 0)
                options["prefix_projection"] = self.flag(own, "prefix_projection", False)
            scalar = role == "critic" or isinstance(self.args, RewardArguments)
            self._footprints[key] = Footprint(
                self.configs.get(role, self.configs.get(own)), dtype=self.dtype, attn=self.attn, scalar=scalar,
                gradient_checkpointing=checkpointing, frozen=frozen, **options,
            )  # fmt: skip
        return self._footprints[key]

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.args.max_prompt_seq_len + self.args.max_answer_seq_len if self.ppo else self.args.max_seq_len

    @property
    def rows_each(self) -> int:
        """Rows of one example: a pair is two."""
        return 2 if isinstance(self.args, (RewardArguments, DPOArguments)) else 1

    def rows(self, batch: int | None = None) -> int:
        """Rows of a micro-batch; --max_tokens_per_device counts tokens instead."""
        if batch is not None:
            return batch * self.rows_each
        if self.args.max_tokens_per_device:
            return max(self.rows_each, self.args.max_tokens_per_device // self.length)
        size = self.args.per_device_training_batch_size if self.ppo else self.args.per_device_train_batch_size
        return size * self.rows_each

    def job(self, setting: Setting, batch: int | None = None) -> Job:
        """What memory.plan asks for. batch: examples in a micro-batch, where not what the flags say."""
        args, rows, length = self.args, self.rows(batch), self.length
        keep = args.max_answer_seq_len if self.ppo else None
        shared = getattr(args, "memory_mode", "separate") == "shared"
        looked = rows if self.ppo else (batch or args.per_device_eval_batch_size) * self.rows_each
        trained, frozen = {}, {}
        for role in self.trained:
            network = self.footprint(role, checkpointing=setting.checkpointing[role])
            passes = network.training(rows, length, keep)
            # As many rows without a backward pass hold less, and need not be looked at.
            evaluated = network.forward(looked, length, keep) if looked > rows else passes
            trained[role] = Network(network.weights, passes, evaluated)
        if self.ppo:
            frozen["reference"] = self.frozen("actor", rows, keep, setting.offload_reference, trained)
            if "critic" in self.roles and args.reward_model:
                reward = self.frozen("critic", rows, None, setting.offload_reward, trained)
                frozen["reward model"] = dataclasses.replace(reward, shared=shared)
        elif isinstance(args, DPOArguments) and (args.ref_model_name_or_path or not args.lora_dim):
            frozen["reference"] = self.frozen("reference", rows, None, setting.offload_reference, trained)
        return Job(
            element=torch.empty(0, dtype=self.dtype).element_size(), trained=trained, frozen=frozen,
            rollout=self.rollout() if self.ppo else None, bucket=self.bucket, shared=shared,
            ema=getattr(args, "enable_ema", False), both_gradients=getattr(args, "align_overflow", False),
        )  # fmt: skip

    def frozen(self, role: str, rows: int, keep: int | None, offload: bool, trained: dict[str, Network]) -> Frozen:
        """The reference ("actor", or DPO's "reference") or the reward model ("critic"), and what it holds while it scores."""
        own = "model" if role == "reference" else role
        adapted = self.flag(own, "lora_dim") or self.flag(own, "pre_seq_len") or own in self.prefixed
        if adapted or role not in self.trained:  # DPO's reference may be another model
            network = self.footprint(role, frozen=True)
            return Frozen(network.weights, network.forward(rows, self.length, keep), own, offload)
        counts = trained[own].weights  # the same network; beside its training, scoring needs no look unless weights are fetched
        small = counts.small_trained + counts.small_frozen
        counts = dataclasses.replace(counts, trained=0, frozen=counts.total, small_trained=0, small_frozen=small)
        passes = self.footprint(own).forward(rows, self.length, keep) if offload else trained[own].evaluation
        return Frozen(counts, passes, own, offload)

    def rollout(self) -> Rollout:
        """Sampling: the answers that are in work at once, with columns to spare, and the numbers that tokens are drawn from."""
        args, network = self.args, self.footprint("actor")
        rows = args.answers_at_once
        cache = network.cache(rows, self.length + SPARE_COLUMNS)
        reading = network.forward(rows, args.max_prompt_seq_len, 1)
        # Float32 logits of a row, their softmax, its sum and the draw; with top-p or top-k sorted values and places too.
        drawn = rows * network.vocabulary * 4 * (4 if args.top_p == 1.0 and not args.top_k else 8)
        blocks = network.blocks
        return Rollout("actor", cache + 2 * cache // blocks, Peak(reading.activations, max(reading.logits, drawn)))

    # --- answers --------------------------------------------------------------------------------------------------------

    def plan(self, setting: Setting, machine: Machine, batch: int | None = None) -> Plan:
        """The memory of a setting."""
        return plan(self.job(setting, batch), setting, machine)

    def plan_as_run(self, setting: Setting, machine: Machine) -> Plan:
        """As plan; with --generation_weights auto a rollout goes layer by layer where gathered weights do not fit."""
        found = self.plan(setting, machine)
        if found.fits or getattr(self.args, "generation_weights", "") != AUTO:
            return found
        return self.plan(dataclasses.replace(setting, layerwise=True), machine)

    def largest_batch(self, setting: Setting, machine: Machine, limit: int = 4096) -> int:
        """The largest micro-batch (examples) that fits; 0 if none does."""
        if not self.plan(setting, machine, 1).fits:
            return 0
        low, high = 1, 2
        while high <= limit and self.plan(setting, machine, high).fits:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.plan(setting, machine, middle).fits else (low, middle)
        return low

    def candidates(self) -> Iterator[Candidate]:
        """Settings from the fastest to the slowest. ZeRO 1 and 2 cost next to nothing, recomputed activations a third of
        the arithmetic, ZeRO-3 half as much communication again, states in host memory a transfer a step, weights there
        one in every pass, and weights that are not gathered for sampling one for every token.
        """
        checkpointing = not (any(self.flag(role, "pre_seq_len") for role in self.roles) and self.own_prefix is False)
        again = (False, True) if checkpointing else (False,)
        order: list[tuple[int, bool, str, bool, bool]] = [(stage, False, "", False, False) for stage in (0, 1, 2)]
        order += [(2, True, "", False, False)] if True in again else []
        order += [(3, twice, "", frozen, False) for frozen in self._frozen_choices for twice in again]
        for stage in (2, 3):
            order += [(stage, twice, "optimizer", frozen, False) for frozen in self._frozen_choices for twice in again]
        order += [(3, again[-1], "all", self._frozen_choices[-1], layerwise) for layerwise in (False, True)[: 1 + self.ppo]]
        for one in order:
            yield self.candidate(*one)

    @property
    def own_prefix(self) -> bool:
        """Whether the networks put prefixes in themselves (ChatGLM), where recomputing drops none."""
        return all(hasattr(self.configs[role], "pre_seq_len") for role in self.roles)

    @property
    def _frozen_choices(self) -> tuple[bool, ...]:
        shared = getattr(self.args, "memory_mode", "separate") == "shared"
        return (False, True) if self.ppo and not shared else (False,)

    def candidate(self, stage: int, checkpointing: bool, offload: str, frozen: bool, layerwise: bool) -> Candidate:
        """offload: "" | "optimizer" | "all"; frozen: reference and reward model in host memory; layerwise: as in Setting."""
        setting = Setting(
            stages=dict.fromkeys(self.roles, stage), checkpointing=dict.fromkeys(self.roles, checkpointing),
            offload_optimizer=bool(offload), offload_param=offload == "all", offload_reference=frozen, offload_reward=frozen,
            layerwise=layerwise,
        )  # fmt: skip
        flags = []
        for role in self.roles:
            prefix = "" if role == "model" else f"{role}_"
            flags.append(f"--{prefix}zero_stage {stage}")
            if checkpointing:
                flags.append(f"--{prefix}gradient_checkpointing")
        if offload:
            flags.append("--offload" if offload == "all" else "--offload_optimizer")
        if frozen:
            flags.append("--offload_reference_model")
            if "critic" in self.roles and self.args.reward_model:
                flags.append("--offload_reward_model")
        if layerwise:
            flags.append("--generation_weights layerwise")
        return Candidate(setting, " ".join(flags))

    def cheapest(self, machine: Machine, batch: int | None = None) -> tuple[Candidate, Plan] | None:
        """The fastest setting that fits, with room to spare if any has that."""
        tight = None
        for candidate in self.candidates():
            found = self.plan(candidate.setting, machine, batch)
            if found.verdict == "fits":
                return candidate, found
            if found.fits and tight is None:
                tight = candidate, found
        return tight


# --- before a run -------------------------------------------------------------------------------------------------------


def step_memory(args: Any, dtype: torch.dtype, attn: str) -> StepMemory:
    """From a step's flags alone: the configs come from the folders that they name."""
    checkpoints = {role: open_checkpoint(path) for role, path in args.models.items()}
    configs = {role: open_checkpoint(checkpoint.weights).config() for role, checkpoint in checkpoints.items()}
    prefixed = []
    for role, checkpoint in checkpoints.items():
        if role == "reference":
            continue
        options = args.prefix_options("" if role == "model" else role)
        if gets_prefix(checkpoint, args.output_dir, **options) and not options["pre_seq_len"]:
            prefixed.append(role)
    return StepMemory(args, configs, dtype=dtype, attn=attn, prefixed=tuple(prefixed))


def this_machine(run: Run) -> Machine:
    """What the run has, by the process that has the least: free memory of a card and of a host, or of the container in it."""
    import psutil

    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or run.world_size)
    host = -run.maximum(-min(float(psutil.virtual_memory().available), container_free()))
    if not has_accelerator():
        return Machine(run.world_size, local, 0.0, host, accelerator=False)
    card = -run.maximum(-float(free_memory() or math.inf))
    return Machine(run.world_size, local, card, host)


def check_run_fits(args: Any, run: Run) -> None:
    """check_fits for a run that has begun. All processes call it, and all come to the same end."""
    check_fits(args, this_machine(run), dtype=run.dtype, attn=run.attention)


def check_fits(args: Any, machine: Machine, *, dtype: torch.dtype, attn: str) -> None:
    """Set every --zero_stage auto, and raise UserError if the run cannot fit, with the nearest setting that does; --force
    lets it start. Reads no weights.
    """
    memory = step_memory(args, dtype, attn)
    names = {role: "zero_stage" if role == "model" else f"{role}_zero_stage" for role in memory.roles}
    automatic = [name for name in names.values() if getattr(args, name) == AUTO]
    if automatic:
        choose_stage(memory, machine, automatic)
    if args.force:
        return
    wanted = memory.plan_as_run(memory.setting, machine)
    if not wanted.fits:
        raise UserError(refusal(memory, wanted, machine))


def choose_stage(memory: StepMemory, machine: Machine, automatic: list[str]) -> None:
    """The lowest stage with which the run, otherwise as its flags say, fits and they all have an effect; 3 if none does."""
    chosen = 3
    for stage in (0, 1, 2, 3):
        for name in automatic:
            setattr(memory.args, name, stage)
        setting = memory.setting
        impossible = (stage == 0 and setting.offload_optimizer) or (stage < 3 and needing_stage_3(memory.args))
        if not impossible and memory.plan_as_run(setting, machine).fits:
            chosen = stage
            break
    for name in automatic:
        setattr(memory.args, name, chosen)


def refusal(memory: StepMemory, wanted: Plan, machine: Machine) -> str:
    """The sentence for a run that does not fit."""
    config = memory.configs[memory.roles[0]]
    on_card = machine.accelerator and wanted.on_card > machine.device_memory
    sizes = wanted.card if on_card else wanted.host
    largest = max((part for part in sizes if part != "reserve"), key=sizes.get)
    need = (
        f"{wanted.on_card / GIB:.1f} GiB on each of {machine.devices} cards, which have {machine.device_memory / GIB:.1f}"
        if on_card
        else f"{wanted.on_host / GIB:.2f} GiB of the host, which has {machine.host_memory / GIB:.2f}"
    )
    sentence = (
        f"{memory.args.title} of this {config.model_type} model does not fit: it needs {need} ({largest.replace('_', ' ')} "
        f"{sizes[largest] / GIB:.2f})"
    )
    smaller, found = "", memory.cheapest(machine)
    if found is None:
        name = "per_device_training_batch_size" if memory.ppo else "per_device_train_batch_size"
        smaller, found = f"--{name} 1 ", memory.cheapest(machine, 1)
    if found is None:
        lora = "--actor_lora_dim and --critic_lora_dim" if memory.ppo else "--lora_dim"
        return f"{sentence}, and no setting does; take more cards, adapters ({lora}) or a smaller model. --force starts anyway."
    candidate, other = found
    card = f"{other.on_card / GIB:.1f} GiB a card, " if machine.accelerator else ""
    return (
        f"{sentence}. Nearest setting that fits: {smaller}{candidate.flags} ({card}{other.on_host / GIB:.2f} GiB on the "
        "host). --force starts anyway."
    )
