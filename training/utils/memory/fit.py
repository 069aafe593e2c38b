"""Does a step fit? From its flags and the configs of its models to a plan, to the stages for --zero_stage auto, or to a refusal.

No weight is read: networks are built on the meta device (footprint.py). The arithmetic is in arithmetic.py.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from errors import UserError
from models.checkpoint_folder import CheckpointFolder, gets_prefix, open_checkpoint
from models.device import DTYPES
from models.sizes import MOST_PACKED, SPARE_COLUMNS
from training.utils.flags.deepspeed_file import check_precision, read_deepspeed_config
from training.utils.memory.arithmetic import (
    BUCKET,
    CARD,
    CONTEXT,
    GIB,
    HOST,
    PROCESS,
    WINDOW_FROZEN,
    Machine,
    Plan,
    Row,
    Setting,
    Weights,
    engine_rows,
    gathered,
    plan,
    weight_bytes,
)
from training.utils.memory.footprint import Footprint

NETWORKS: dict[tuple, Footprint] = {}  # by all that decides their sizes: a process measures each network once
AUTO = "auto"  # of stages, dtypes, kernels and --generation_weights
LARGEST_BATCH = 8191
ADAPTERS = ("lora_dim", "lora_module_name", "pre_seq_len", "prefix_projection")
# ZeRO stage and options, from the fastest to the slowest. ZeRO 1 and 2 cost next to nothing, recomputed activations a third of
# the arithmetic, ZeRO-3 half as much communication again, states in host memory a transfer a step, weights there one in every
# pass, and weights that are not gathered for sampling one for every token. Options are those of Setting.
STATES, ALL, FROZEN = {"offload_optimizer"}, {"offload_optimizer", "offload_param"}, {"offload_reference", "offload_reward"}
CANDIDATES: tuple[tuple[int, set[str]], ...] = (
    *((stage, set()) for stage in (0, 1, 2)),
    (2, {"recompute"}),
    *(
        (stage, states | frozen | again)
        for stage, states in ((3, set()), (2, STATES), (3, STATES))
        for frozen in (set(), FROZEN)
        for again in (set(), {"recompute"})
    ),
    (3, ALL | FROZEN | {"recompute"}),
    (3, ALL | FROZEN | {"recompute", "layerwise"}),
)


class StepMemory:
    """The memory of one step, as its flags and the configs of its models describe it, for any setting and machine.

    configs: by the roles of args.models. dtype: "fp32", "fp16" or "bf16".
    Raises UserError where --deepspeed_config contradicts the dtype: checks.py cannot know what --dtype auto becomes.

    roles: those with flags of their own, and what stands before the names of these ("", "actor_", "critic_"). reference: config
    of DPO's frozen network, None without one. each: rows of an example (a pair is two). rows, evaluated: rows of a micro-batch
    in training and in evaluation. length: tokens of the longest row, answer: of these, the ones that are scored (None: all).
    setting: what the flags ask for; a stage "auto" counts as 0. added: flags of with_flags beside those asked for.
    """

    def __init__(self, args: Any, configs: dict[str, PretrainedConfig], *, dtype: str, attention: str) -> None:
        check_precision(args.deepspeed_config, dtype)
        self.args, self.configs, self.dtype, self.attention = args, configs, dtype, attention
        self.ppo = args.section == "ppo"
        self.roles = {role: "" if role == "model" else f"{role}_" for role in configs if role != "reference"}
        self.trained = [role for role in self.roles if role != "critic" or args.has_critic]
        own_reference = args.section == "dpo" and (args.ref_model_name_or_path or not args.lora_dim)
        self.reference = configs.get("reference", configs["model"]) if own_reference else None
        self.shared = self.ppo and args.memory_mode == "shared"
        self.each = 2 if args.section in ("reward", "dpo") else 1
        self.answer = args.max_answer_seq_len if self.ppo else None
        self.length = args.max_prompt_seq_len + args.max_answer_seq_len if self.ppo else args.max_seq_len
        self.batch_flag = "per_device_training_batch_size" if self.ppo else "per_device_train_batch_size"
        self.rows = getattr(args, self.batch_flag) * self.each
        if args.max_tokens_per_device:
            self.rows = max(self.each, args.max_tokens_per_device // self.length)
        self.evaluated = self.rows if self.ppo else args.per_device_eval_batch_size * self.each
        stages = {role: self.flag(role, "zero_stage") for role in self.roles}
        self.automatic = [role for role in self.roles if stages[role] == AUTO]
        self.setting = Setting(
            stages={role: 0 if stage == AUTO else int(stage) for role, stage in stages.items()},
            checkpointing={role: self.flag(role, "gradient_checkpointing") for role in self.roles},
            offload_optimizer=args.offload or args.offload_optimizer,
            offload_param=args.offload or args.offload_param,
            offload_reference=(self.ppo or args.section == "dpo") and args.offload_reference_model,
            offload_reward=self.ppo and args.offload_reward_model,
            layerwise=self.ppo and args.generation_weights == "layerwise",
        )
        self.element = DTYPES[dtype].itemsize
        zero = read_deepspeed_config(args.deepspeed_config).get("zero_optimization", {})
        self.bucket = int(float(zero.get("reduce_bucket_size", BUCKET)))
        self.added: dict[str, Any] = {}

    def with_flags(self, **changes: Any) -> StepMemory:
        """Return the memory of the same step with other flags."""
        other = StepMemory(replace(self.args, **changes), self.configs, dtype=self.dtype, attention=self.attention)
        other.added = self.added | changes
        return other

    def variants(self) -> list[StepMemory]:
        """Return the step as asked, and the same adapters over less: shared weights, a base of 4 bits, both.

        Shared weights want LoRA on all that learns, one network under all models, and no model put away to the host.
        """
        args, of_all = self.args, list(self.configs.values())
        put_away = self.ppo and (args.offload_reference_model or args.offload_reward_model)
        shareable = self.ppo and not self.shared and not put_away and args.reward_model and "critic" in self.roles
        shareable = shareable and all(self.flag(role, "lora_dim") for role in self.trained)
        shareable = shareable and len({config.to_json_string() for config in of_all}) == 1
        integers = args.quantization_bit or any(getattr(config, "quantization_bit", 0) for config in of_all)
        found = [self, *([self.with_flags(memory_mode="shared")] if shareable else [])]
        if not integers and all(self.is_adapted(role) for role in self.trained):
            found += [one.with_flags(quantization_bit=4) for one in found]
        return found

    def flag(self, role: str, name: str) -> Any:
        """Return the value of a role's flag."""
        return getattr(self.args, self.roles[role] + name)

    def adapters(self, role: str) -> dict[str, Any]:
        """Return the flags of a role's adapters."""
        return {name: self.flag(role, name) for name in ADAPTERS}

    def is_adapted(self, role: str) -> bool:
        """Return True where the model's own weights are frozen."""
        return bool(self.flag(role, "lora_dim") or self.flag(role, "pre_seq_len"))

    @property
    def without_adapters(self) -> list[str]:
        """The flags that would give LoRA to the networks whose own weights are trained."""
        return [f"{self.roles[role]}lora_dim" for role in self.trained if not self.is_adapted(role)]

    @property
    def ways_out(self) -> str:
        """What is left for a step that fits nowhere, in words."""
        lora = " and ".join(f"--{name}" for name in self.without_adapters)
        return f"more cards{f', adapters ({lora} 16)' if lora else ''} or a smaller model"

    def network(self, role: str, *, recompute: bool = False, trained: bool = True) -> Footprint:
        """Return the network of a role as it is trained, or without adapters. Role "reference": DPO's frozen network."""
        adapted = self.is_adapted("model" if role == "reference" else role)
        config = self.reference if role == "reference" else self.configs[role]
        settings = {
            "dtype": DTYPES[self.dtype],
            "attn": self.attention,
            "scalar": role == "critic" or self.args.section == "reward",
            "gradient_checkpointing": recompute,
            "quantization_bit": self.args.quantization_bit if adapted else 0,
            **(self.adapters(role) if adapted and trained else {}),
        }
        key = (config.to_json_string(), *settings.values())
        if key not in NETWORKS:
            NETWORKS[key] = Footprint(config, **settings)
        return NETWORKS[key]

    # --- what a setting holds -----------------------------------------------------------------------------------------

    def table(self, setting: Setting, machine: Machine, batch: int | None = None) -> list[Row]:
        """Return all that a process holds. batch: examples in a micro-batch, where not what the flags say."""
        rows = self.rows if batch is None else batch * self.each
        evaluated = self.evaluated if batch is None else rows
        table = [Row("reserve", CONTEXT), Row("reserve", PROCESS, HOST)] if machine.accelerator else []
        waiting = 0.0  # gradients of the actor, while the critic has its own (--align_overflow)
        for role in self.trained:
            label = "" if role == "model" else f" of the {role}"
            held = self.trained_rows(role, label, setting, machine, rows, evaluated)
            table += held
            table += [Row("gradients", waiting, CARD, f"{moment}{label}") for moment in ("training", "optimizer step")]
            if self.ppo and self.args.align_overflow:
                waiting = sum(row.size for row in held if row.column == "gradients" and row.moment == f"training{label}")
        if self.ppo:
            table += self.frozen_rows("reference", "actor", setting, machine, rows)
            if self.args.reward_model and "critic" in self.roles:
                table += self.frozen_rows("reward model", "critic", setting, machine, rows)
            table += self.rollout_rows(setting, machine)
        elif self.reference is not None:
            table += self.frozen_rows("reference", "model", setting, machine, rows)
        return table

    def trained_rows(
        self, role: str, label: str, setting: Setting, machine: Machine, rows: int, evaluated: int
    ) -> list[Row]:
        """Return what a network holds that is trained: its engine and its passes."""
        network, stage = self.network(role, recompute=setting.checkpointing[role]), setting.stages[role]
        weights = network.weights
        passes = forward = network.training(rows, self.length, self.answer)
        if evaluated > rows:  # as many rows without a backward pass hold less, and need not be looked at
            forward = network.forward(evaluated, self.length, self.answer)
        engine = engine_rows(
            weights.trained_alone if self.shared else weights,
            self.element,
            stage,
            machine,
            offload_optimizer=setting.offload_optimizer,
            offload_param=setting.offload_param,
            bucket=self.bucket,
            label=label,
        )
        loading = [] if self.shared else self.loading_rows(role, weights, stage, machine)
        averaged = self.ppo and self.args.enable_ema and role != "critic"
        return [
            *engine,
            *passes.rows(f"training{label}"),
            *forward.rows(f"evaluation{label}"),
            *gathered(weights, self.element, stage, f"evaluation{label}"),
            Row("optimizer", 4 * weights.trained / machine.devices if averaged else 0, HOST),
            *loading,
        ]

    def frozen_rows(self, name: str, role: str, setting: Setting, machine: Machine, rows: int) -> list[Row]:
        """Return what a network holds that is only evaluated. role: whose stage it follows; only stage 3 keeps it on the host."""
        reference = name == "reference"
        offload = setting.offload_reference if reference else setting.offload_reward
        network = self.network(role if self.ppo else name, trained=False)
        stage, moment = 3 if offload else setting.stages[role], f"scoring by the {name}"
        passes = network.forward(rows, self.length, self.answer if reference else None).rows(moment)
        passes += gathered(network.weights, self.element, stage, moment, WINDOW_FROZEN)
        if self.shared and not reference:  # its weights are the reference's
            return passes
        counts = network.weights
        size = weight_bytes(counts, self.element, stage, machine.devices)
        here = counts.integers + self.element * counts.small if offload else size  # ZeRO moves neither
        loading = self.loading_rows(name, counts, setting.stages[role], machine)
        return [Row("weights", here), Row("weights", size - here, HOST), *passes, *loading]

    def loading_rows(self, name: str, weights: Weights, stage: int, machine: Machine) -> list[Row]:
        """Return a network on its way to the card: whole on the host of each process, beside what is kept there, at most."""
        if stage == 3 or not machine.accelerator:
            return []
        return [Row("loading", weight_bytes(weights, self.element, 0, machine.devices), HOST, f"loading the {name}")]

    def rollout_rows(self, setting: Setting, machine: Machine) -> list[Row]:
        """Return sampling: the answers in work at once, with columns to spare, and the numbers that tokens are drawn from. A CPU
        lays out float32 weights of small models a second time.
        """
        args, network, sampled = self.args, self.network("actor"), self.args.answers_at_once
        cache = network.cache(sampled, self.length + SPARE_COLUMNS)
        cache += 2 * cache // network.blocks  # a layer that grows has its old and its new buffers at once
        reading = network.forward(sampled, args.max_prompt_seq_len, 1)
        # Float32 logits of a row, their softmax, its sum and the draw; with top-p or top-k sorted values and indices too.
        drawn = sampled * network.vocabulary * 4 * (8 if args.top_p != 1.0 or args.top_k else 4)
        weights, stage = network.weights, setting.stages["actor"]
        if setting.layerwise:
            whole = gathered(weights, self.element, stage, "generation")
        else:
            packed = self.element == 4 and not machine.accelerator and weights.total <= MOST_PACKED
            copies = (stage == 3) + packed
            whole = [Row("gathered", copies * self.element * weights.total, CARD, "generation")]
        passes = replace(reading, logits=max(reading.logits, drawn)).rows("generation")
        return [*passes, *whole, Row("kv_cache", cache, CARD, "generation")]

    # --- plans of settings --------------------------------------------------------------------------------------------

    def plan(self, setting: Setting, machine: Machine, batch: int | None = None) -> Plan:
        """Return the memory of a setting."""
        return plan(self.table(setting, machine, batch), setting, machine)

    def plan_as_run(self, setting: Setting, machine: Machine) -> Plan:
        """Return the plan; with --generation_weights auto a rollout goes layer by layer where gathered weights do not fit."""
        planned = self.plan(setting, machine)
        if planned.fits or not (self.ppo and self.args.generation_weights == AUTO):
            return planned
        return self.plan(replace(setting, layerwise=True), machine)

    def largest_batch(self, setting: Setting, machine: Machine) -> int:
        """Return the largest micro-batch (examples) that fits; 0 if none does."""
        return bisect_left(
            range(1, LARGEST_BATCH + 1), True, key=lambda batch: not self.plan(setting, machine, batch).fits
        )

    def settings(self, machine: Machine) -> list[Setting]:
        """Return the settings that this step can take on a machine, from the fastest to the slowest.

        One card shares nothing: there a stage above 0 only adds buffers, but for what it alone can move to the host.
        """
        possible = {*ALL, *(["layerwise"] if self.ppo else []), *(FROZEN if self.ppo and not self.shared else [])}
        # Recomputation drops the prefixes that peft puts in; ChatGLM's networks put in their own.
        own_prefix = all(hasattr(self.configs[role], "pre_seq_len") for role in self.roles)
        if own_prefix or not any(self.flag(role, "pre_seq_len") for role in self.roles):
            possible.add("recompute")
        settings = []
        for stage, wanted in CANDIDATES:
            if machine.devices == 1:
                stage = 3 if wanted >= ALL else 2 if wanted >= STATES else 0
            stages, again = dict.fromkeys(self.roles, stage), dict.fromkeys(self.roles, "recompute" in wanted & possible)
            setting = Setting(stages, again, **dict.fromkeys(wanted & possible - {"recompute"}, True))
            setting = replace(setting, layerwise=setting.layerwise or (stage == 3 and self.setting.layerwise))
            settings += [setting] if setting not in settings else []
        return settings

    def ways(self, machine: Machine) -> list[tuple[StepMemory, Setting]]:
        """Return the settings of all variants, from the fastest to the slowest.

        A base of 4 bits rounds what is learned over, and is multiplied out in every pass: it stands behind all that moves
        states or frozen models, and before what moves all weights.
        """
        found = [(place, one, setting) for one in self.variants() for place, setting in enumerate(one.settings(machine))]
        found.sort(key=lambda way: (way[2].offload_param, way[1].args.quantization_bit, way[0]))
        return [way[1:] for way in found]

    def cheapest(self, machine: Machine, batch: int | None = None) -> tuple[StepMemory, Plan] | None:
        """Return the variant and the plan of the fastest way that fits, with room to spare if any has that."""
        tight = None
        for memory, setting in self.ways(machine):
            planned = memory.plan(setting, machine, batch)
            if planned.verdict == "fits":
                return memory, planned
            tight = tight or ((memory, planned) if planned.fits else None)
        return tight

    def flags_of(self, setting: Setting) -> str:
        """Return the flags that ask for a setting, and for what with_flags added."""
        words = [f"--{name} {value}" for name, value in self.added.items()]
        for role, prefix in self.roles.items():
            words.append(f"--{prefix}zero_stage {setting.stages[role]}")
            words += [f"--{prefix}gradient_checkpointing"] if setting.checkpointing[role] else []
        reward_model = self.ppo and self.args.reward_model and "critic" in self.roles
        wanted = {
            "--offload": setting.offload_param,
            "--offload_optimizer": setting.offload_optimizer and not setting.offload_param,
            "--offload_reference_model": setting.offload_reference,
            "--offload_reward_model": setting.offload_reward and reward_model,
            "--generation_weights layerwise": setting.layerwise,
        }
        return " ".join([*words, *(flag for flag in wanted if wanted[flag])])


# --- one section, one run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SectionPlan:
    """The plan of a step as it would run on a machine. stages: what --zero_stage auto becomes, by role."""

    memory: StepMemory
    machine: Machine
    stages: dict[str, int]
    plan: Plan

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
    return planned(StepMemory(args, configs, dtype=dtype, attention=attention), machine)


def planned(memory: StepMemory, machine: Machine) -> SectionPlan:
    """Return the plan with the stage that --zero_stage auto stands for: the lowest with which the run, otherwise as its flags
    say, fits and all flags have an effect; 3 if none does.
    """
    lowest = 3 if memory.args.offload_param else 1 if memory.setting.offload_optimizer else 0
    for stage in range(lowest if memory.automatic else 3, 4):
        stages = dict.fromkeys(memory.automatic, stage)
        found = memory.plan_as_run(replace(memory.setting, stages=memory.setting.stages | stages), machine)
        if found.fits:
            break
    return SectionPlan(memory, machine, stages, found)


def check_fits(
    args: Any, machine: Machine, models: dict[str, CheckpointFolder], *, dtype: str, attention: str
) -> dict[str, int]:
    """Return the flags that --zero_stage auto becomes, for the caller to put in; {} without one. Reads no weights.

    models: the checkpoints of args.models by role. A saved prefix counts as one of a single token: its length is the folder's.
    Raises UserError with the nearest setting that fits if the run cannot fit; --force lets it start.
    """
    configs, prefixes = {}, {}
    for role, checkpoint in models.items():
        configs[role] = open_checkpoint(checkpoint.weights).config()
        if role != "reference":
            options = args.prefix_options("" if role == "model" else role)
            if gets_prefix(checkpoint, args.output_dir, **options) and not options["pre_seq_len"]:
                prefixes["pre_seq_len" if role == "model" else f"{role}_pre_seq_len"] = 1
    found = section_plan(replace(args, **prefixes), configs, machine, dtype=dtype, attention=attention)
    if not args.force and not found.plan.fits:
        raise UserError(found.refusal)
    return {f"{found.memory.roles[role]}zero_stage": stage for role, stage in found.stages.items()}


def refusal(memory: StepMemory, wanted: Plan) -> str:
    """Return the sentence for a run that does not fit: what it needs, and the nearest setting that fits."""
    machine = wanted.machine
    if machine.accelerator and wanted.on_card > machine.device_memory:
        sizes = wanted.card
        has = f"{machine.device_memory / GIB:.1f}"
        need = f"{wanted.on_card / GIB:.1f} GiB on each of {machine.devices} cards, which have {has}"
    else:
        sizes = wanted.host
        need = f"{wanted.on_host / GIB:.2f} GiB of the host, which has {machine.host_memory / GIB:.2f}"
    largest = max((name for name in sizes if name != "reserve"), key=sizes.get)
    kind = next(iter(memory.configs.values())).model_type
    sentence = (
        f"{memory.args.title} of this {kind} model does not fit: it needs {need} "
        f"({largest.replace('_', ' ')} {sizes[largest] / GIB:.2f})"
    )
    smaller, found = "", memory.cheapest(machine)
    if found is None:
        smaller, found = f"--{memory.batch_flag} 1 ", memory.cheapest(machine, 1)
    if found is None:
        return f"{sentence}, and no setting does; take {memory.ways_out}. --force starts anyway."
    other, fitting = found
    card = f"{fitting.on_card / GIB:.1f} GiB a card, " if machine.accelerator else ""
    return (
        f"{sentence}. Nearest setting that fits: {smaller}{other.flags_of(fitting.setting)} ({card}{fitting.on_host / GIB:.2f} "
        "GiB on the host). --force starts anyway."
    )
