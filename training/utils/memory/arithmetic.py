"""The memory of a run: pure arithmetic from counts of weights and what a pass holds (footprint.py), the setting,
and the machine. Bytes everywhere; a GiB is 2^30.

How DeepSpeed holds an engine follows training/utils/engine/configs.py and DeepSpeed's runtime/zero/stage_1_and_2.py and stage3.py.
With T trained and F frozen weights of e bytes on n processes:

    stage   card, always                                    while gradients are made             in the step
    0       e(T+F), Adam 8T, 16 bits: masters 4T            eT                                   16 bits: 4T
    1       e(T+F), masters and Adam 12T/n                  eT, one bucket                       16 bits: 4T/n
    2       e(T+F), masters and Adam 12T/n                  eT/n, a bucket or two                16 bits: 4T/n
    3       e(T+F)/n, 12T/n, gradients eT/n, one bucket     weights that are gathered            4T/n, at most 4·10^9

A bucket has 5·10^8 elements of e bytes, whatever the model, unless --deepspeed_config says reduce_bucket_size. Optimizer
states in host memory are 12T/n there, with float32 gradients 4T/n and copies of those on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

GIB = 2**30
# In this order in tables. gathered: weights that ZeRO-3 has whole for a while; buffers: communication and casts.
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "kv_cache", "gathered", "buffers", "reserve")
BUCKET = 500_000_000  # elements; DeepSpeed's reduce_bucket_size
LIVE, LIVE_FROZEN = 1_200_000_000 + 30_000_000, 1_000_000_000 + 50_000_000  # elements; zero.py's, and DeepSpeed's own
SUB_GROUP = 1_000_000_000  # elements that ZeRO-3 steps at once
SPARE_COLUMNS = 64  # inference/cache.py
CONTEXT = 1.5 * GIB  # of a card: driver context, communicators, fragments; hardware.md says 1 to 1.5
PROCESS = 1.0 * GIB  # of the host: Python, torch and DeepSpeed, before any weight
TIGHT = 0.92  # of the memory


class Counts(Protocol):
    """training.utils.memory.footprint.Weights."""

    trained: int
    frozen: int
    small_trained: int
    small_frozen: int
    largest: int
    integers: int


class Held(Protocol):
    """training.utils.memory.footprint.Peak."""

    activations: int
    logits: int


@dataclass(frozen=True)
class Machine:
    """What a run has. device_memory, host_memory: bytes of one card and of one node; on a CPU device_memory is 0, and all
    processes of a node share host_memory.
    """

    devices: int
    per_node: int
    device_memory: float
    host_memory: float
    accelerator: bool = True


@dataclass(frozen=True)
class Setting:
    """Where things are kept. stages, checkpointing: by role ("model", or "actor" and "critic")."""

    stages: dict[str, int]
    checkpointing: dict[str, bool]
    offload_optimizer: bool = False
    offload_param: bool = False
    offload_reference: bool = False
    offload_reward: bool = False
    layerwise: bool = False  # answers are drawn without gathering the weights (--generation_weights)


@dataclass(frozen=True)
class Network:
    """A network that is trained. training, evaluation: what their passes hold; with gradient checkpointing or without."""

    weights: Counts
    training: Held
    evaluation: Held


@dataclass(frozen=True)
class Frozen:
    """A network that is only evaluated. role: whose stage it follows; shared: its weights are another one's."""

    weights: Counts
    evaluation: Held
    role: str
    offload: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Rollout:
    """Sampling: weights of the network that answers, bytes of its cache, and what reading the prompts holds."""

    role: str
    cache: int
    reading: Held


@dataclass(frozen=True)
class Job:
    """A step as far as memory is concerned. element: bytes of a weight; bucket: elements; ema: float32 averages on the
    host; both_gradients: actor and critic have theirs at once (--align_overflow); shared: the trained networks compute
    with the weights of a frozen one (--memory_mode shared).
    """

    element: int
    trained: dict[str, Network]
    frozen: dict[str, Frozen] = field(default_factory=dict)
    rollout: Rollout | None = None
    bucket: int = BUCKET
    ema: bool = False
    both_gradients: bool = False
    shared: bool = False


@dataclass
class Plan:
    """The memory that a setting takes. card: bytes of one card by part at the moment that needs the most (``moment``);
    host: bytes of one node by part; device_limit, host_limit: what there is.
    """

    setting: Setting
    machine: Machine
    card: dict[str, float]
    host: dict[str, float]
    moment: str

    @property
    def on_card(self) -> float:
        """Bytes of one card."""
        return sum(self.card.values())

    @property
    def on_host(self) -> float:
        """Bytes of one node."""
        return sum(self.host.values())

    @property
    def fits(self) -> bool:
        """Both are enough."""
        return self.load <= 1.0

    @property
    def load(self) -> float:
        """The share of the memory that is taken, of card or host, whichever is fuller."""
        host = self.on_host / self.machine.host_memory
        return max(host, self.on_card / self.machine.device_memory) if self.machine.accelerator else host

    @property
    def verdict(self) -> str:
        """fits | tight | no."""
        return "no" if not self.fits else "tight" if self.load > TIGHT else "fits"


@dataclass
class EngineMemory:
    """What one engine holds of a card: always, while gradients are made, and in the step; and of its host, a process."""

    always: dict[str, float]
    backward: dict[str, float]
    step: dict[str, float]
    host: dict[str, float]


def add(*parts: dict[str, float]) -> dict[str, float]:
    """The sum, part by part."""
    total: dict[str, float] = {}
    for one in parts:
        for name, size in one.items():
            total[name] = total.get(name, 0.0) + size
    return total


def pinned(size: float) -> float:
    """Bytes that torch takes for pinned memory: the next power of two (ATen/core/CachingHostAllocator.h)."""
    return float(2 ** math.ceil(math.log2(size))) if size >= 1 else 0.0


def weights_of(counts: Counts, element: int, stage: int, processes: int, whole: bool = False) -> float:
    """Bytes of the weights of one network on one process; small ones and integers are whole under stage 3 too."""
    total = counts.trained + counts.frozen
    if stage == 3 and not whole:
        small = counts.small_trained + counts.small_frozen
        return element * (total / processes + small) + counts.integers
    return element * total + counts.integers


def engine_memory(
    counts: Counts, element: int, stage: int, processes: int, *, offload_optimizer: bool, offload_param: bool,
    bucket: int = BUCKET, accelerator: bool = True,
) -> EngineMemory:  # fmt: skip
    """An engine that trains. On a CPU the buckets count as far as they are touched."""
    trained, half = counts.trained, element == 2
    share = trained if stage == 0 else trained / processes
    touched = bucket if accelerator else min(bucket, trained)
    always = {"weights": weights_of(counts, element, stage, processes)}
    host: dict[str, float] = {}
    pin = pinned if accelerator else float
    states = 8.0 * trained + (4.0 * trained if half else 0.0) if stage == 0 else 12.0 * share
    on_host = offload_optimizer and stage >= 1
    if on_host:
        copies = element * share * (2 if stage == 2 else 1)
        # masters of stages 1 and 2 are pinned, those of stage 3 are not; float32 gradients are in all
        host = {"optimizer": 8 * share + (4 * share if stage == 3 else pin(4 * share)), "gradients": pin(4 * share) + pin(copies)}
    else:
        always["optimizer"] = states
    step = {"buffers": 4.0 * min(share, SUB_GROUP if stage == 3 else share)} if half and not on_host else {}
    if stage <= 1:
        backward = {"gradients": float(element * trained)}
    elif stage == 2:
        backward = {} if on_host else {"gradients": float(element * share)}
    else:
        backward = {}
        if not on_host:
            always["gradients"] = float(element * share)
    if stage == 0:
        reduction = element * min(trained, bucket) if processes > 1 else 0
        step = {"buffers": max(reduction, step.get("buffers", 0.0))}
    elif stage == 3:
        always["buffers"] = float(element * touched)
        split = element * (trained + counts.frozen - counts.small_trained - counts.small_frozen)
        backward["gathered"] = float(min(split, element * LIVE))
        if processes > 1:
            backward["buffers"] = float(element * min(bucket, trained) / processes)
    else:
        double = stage == 2 and half  # overlap_comm
        backward["buffers"] = float(element * touched * (2 if double else 1))
        if on_host:
            always["buffers"] = float(element * counts.largest)
            host["buffers"] = pin(element * counts.largest)
    if stage < 3:
        step = add(step, {"gradients": backward.get("gradients", 0.0)})
    if stage == 3 and offload_param:
        small = element * (counts.small_trained + counts.small_frozen)
        host["weights"] = pin(element * (trained + counts.frozen) / processes)
        always["weights"] = float(small + counts.integers)
    return EngineMemory(always, backward, step, host)


def held(what: Held) -> dict[str, float]:
    """As parts."""
    return {"activations": float(what.activations), "logits": float(what.logits)}


def plan(job: Job, setting: Setting, machine: Machine) -> Plan:
    """What the setting takes on the machine."""
    n, e = machine.devices, job.element
    engines: dict[str, EngineMemory] = {}
    always: dict[str, float] = {"reserve": CONTEXT if machine.accelerator else 0.0}
    per_process: dict[str, float] = {"reserve": PROCESS if machine.accelerator else 0.0}
    loading = 0.0  # most bytes of a process while a network is read, beside what already is on the host
    for model in job.frozen.values():
        stage = 3 if model.offload else setting.stages[model.role]
        size = weights_of(model.weights, e, stage, n)
        if model.shared:
            size = 0.0
        elif model.offload:
            per_process = add(per_process, {"weights": size})
            size = 0.0
        always = add(always, {"weights": size})
        if setting.stages[model.role] != 3 and not model.shared:
            loading = max(loading, weights_of(model.weights, e, 0, n))
    for role, network in job.trained.items():
        counts = network.weights
        if job.shared:
            counts = _Adapters(counts)
        engines[role] = engine_memory(
            counts, e, setting.stages[role], n, bucket=job.bucket, accelerator=machine.accelerator,
            offload_optimizer=setting.offload_optimizer, offload_param=setting.offload_param,
        )  # fmt: skip
        always = add(always, engines[role].always)
        per_process = add(per_process, engines[role].host)
        if setting.stages[role] != 3 and not job.shared:
            loading = max(loading, weights_of(network.weights, e, 0, n))
    moments = dict(_moments(job, setting, engines, n))
    if job.ema:
        average = 4.0 * sum(network.weights.trained for role, network in job.trained.items() if role != "critic") / n
        per_process = add(per_process, {"optimizer": average})
    local = machine.per_node
    moment, most = max(moments.items(), key=lambda one: sum(one[1].values()))
    card = {name: size for name, size in add(always, most).items() if size}
    host = {name: size * local for name, size in per_process.items() if size}
    if machine.accelerator:
        # Weights pass through the host on their way to the card: as much beside what is kept there, at most.
        if loading:
            host = add(host, {"loading": loading * local})
    else:  # the card is the host
        host = add(host, {name: size * local for name, size in card.items()})
    return Plan(setting, machine, card, host, moment)


def _moments(
    job: Job, setting: Setting, engines: dict[str, EngineMemory], processes: int
) -> Iterable[tuple[str, dict[str, float]]]:
    """Name and bytes, by part, of every moment that might need the most, beside what is held always."""
    e = job.element

    def gathered(counts: Counts, stage: int, live: int) -> dict[str, float]:
        split = counts.trained + counts.frozen - counts.small_trained - counts.small_frozen
        return {"gathered": float(e * min(split, live))} if stage == 3 else {}

    waiting: dict[str, float] = {}
    for role, network in job.trained.items():
        memory, label = engines[role], "" if role == "model" else f" of the {role}"
        yield f"training{label}", add(waiting, memory.backward, held(network.training))
        yield f"optimizer step{label}", add(waiting, memory.step)
        stage = setting.stages[role]
        trunk = gathered(network.weights, stage, LIVE)
        yield f"evaluation{label}", add(held(network.evaluation), trunk)
        if job.both_gradients:
            waiting = {"gradients": memory.backward.get("gradients", 0.0)}
    for name, model in job.frozen.items():
        stage = 3 if model.offload else setting.stages[model.role]
        yield f"scoring by the {name}", add(held(model.evaluation), gathered(model.weights, stage, LIVE_FROZEN))
    if job.rollout is not None:
        role = job.rollout.role
        counts = job.trained[role].weights
        whole = {"gathered": float(e * (counts.trained + counts.frozen))} if setting.stages[role] == 3 else {}
        if setting.layerwise:
            whole = gathered(counts, setting.stages[role], LIVE)
        yield "generation", add(held(job.rollout.reading), whole, {"kv_cache": float(job.rollout.cache)})


class _Adapters:
    """The counts of a network whose frozen weights belong to another one."""

    def __init__(self, counts: Counts) -> None:
        self.trained, self.small_trained = counts.trained, counts.small_trained
        self.frozen = self.small_frozen = self.integers = 0
        self.largest: Any = min(counts.largest, counts.trained)
