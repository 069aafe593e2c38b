"""The memory of a run: pure arithmetic from counts of weights, from what a pass holds (footprint.py), setting and machine.

Bytes everywhere; a GiB is 2^30. How DeepSpeed holds an engine follows training/utils/engine/configs.py and DeepSpeed's
runtime/zero/stage_1_and_2.py and stage3.py. With T trained and F frozen weights of e bytes on n processes:

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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

GIB = 2**30
BUCKET = 500_000_000  # elements; DeepSpeed's reduce_bucket_size
# Elements, under ZeRO-3. Parameters below SMALL stay whole on every process. The window of live ones is wide, or every layer
# would be fetched twice (1.2e9 is 6B / 5). A frozen model's engine has DeepSpeed's own window and prefetch.
SMALL = 10_000
LIVE, PREFETCH = 1_200_000_000, 30_000_000
LIVE_FROZEN, PREFETCH_FROZEN = 1_000_000_000, 50_000_000
SUB_GROUP = 1_000_000_000  # elements that ZeRO-3 steps at once
CONTEXT = 1.5 * GIB  # of a card: driver context, communicators, fragments; vendors' pages say 1 to 1.5
PROCESS = 1.0 * GIB  # of the host: Python, torch and DeepSpeed, before any weight
TIGHT = 0.92  # of the memory

Sizes = dict[str, float]  # bytes by column of the plan: weights, gradients, optimizer, activations, …


@dataclass(frozen=True)
class Weights:
    """Elements of a network. trained and frozen count parameters in the model's dtype, small_… those of them with fewer than
    SMALL elements; largest: of the largest module; integers: bytes of quantised layers with their scales, which ZeRO never splits.
    """

    trained: int
    frozen: int
    small_trained: int
    small_frozen: int
    largest: int
    integers: int

    @property
    def total(self) -> int:
        """Return the number of all parameters without the quantised ones."""
        return self.trained + self.frozen

    @property
    def small(self) -> int:
        """Return the number of elements that ZeRO-3 does not split."""
        return self.small_trained + self.small_frozen

    @property
    def all_frozen(self) -> Weights:
        """Return the counts of the same network without training."""
        return replace(self, trained=0, frozen=self.total, small_trained=0, small_frozen=self.small)

    @property
    def trained_alone(self) -> Weights:
        """Return the counts without the frozen weights, which belong to another network."""
        return replace(self, frozen=0, small_frozen=0, integers=0, largest=min(self.largest, self.trained))


@dataclass(frozen=True)
class Peak:
    """The most bytes at once beside weights and finished gradients. logits: the output matrix's share of them at that moment."""

    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Return the sum of both."""
        return self.activations + self.logits

    @property
    def sizes(self) -> Sizes:
        """Return both as columns."""
        return {"activations": float(self.activations), "logits": float(self.logits)}


@dataclass(frozen=True)
class Machine:
    """The machine of a run. device_memory: bytes of a card, 0 on a CPU; host_memory: bytes of a node, shared by its processes."""

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
    """A network that is trained. training, evaluation: what their passes hold."""

    weights: Weights
    training: Peak
    evaluation: Peak


@dataclass(frozen=True)
class Frozen:
    """A network that is only evaluated. role: whose stage it follows; shared: its weights are another network's."""

    weights: Weights
    evaluation: Peak
    role: str
    offload: bool = False
    shared: bool = False

    def stage(self, setting: Setting) -> int:
        """Return its ZeRO stage; only stage 3 keeps weights in host memory."""
        return 3 if self.offload else setting.stages[self.role]


@dataclass(frozen=True)
class Rollout:
    """Sampling: the role that answers, bytes of its KV cache, and what reading the prompts holds."""

    role: str
    cache: int
    reading: Peak


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
    """The memory that a setting takes. card: bytes of one card by column at the moment that needs the most (``moment``);
    host: bytes of one node by column.
    """

    setting: Setting
    machine: Machine
    card: Sizes
    host: Sizes
    moment: str

    @property
    def on_card(self) -> float:
        """Return bytes of one card."""
        return sum(self.card.values())

    @property
    def on_host(self) -> float:
        """Return bytes of one node."""
        return sum(self.host.values())

    @property
    def fits(self) -> bool:
        """Return True where card and host are large enough."""
        return self.load <= 1.0

    @property
    def load(self) -> float:
        """Return the share of the memory that is taken, of card or host, whichever is fuller."""
        host = self.on_host / self.machine.host_memory
        return max(host, self.on_card / self.machine.device_memory) if self.machine.accelerator else host

    @property
    def verdict(self) -> str:
        """Return fits, tight or no."""
        return "no" if not self.fits else "tight" if self.load > TIGHT else "fits"


@dataclass
class EngineMemory:
    """Bytes of one engine: of a card always, while gradients are made and in the step; of the host, for each process."""

    always: Sizes
    backward: Sizes
    step: Sizes
    host: Sizes


def add(*several: Sizes) -> Sizes:
    """Return the sum, column by column."""
    total: Sizes = {}
    for sizes in several:
        for name, size in sizes.items():
            total[name] = total.get(name, 0.0) + size
    return total


def pinned(size: float) -> float:
    """Return the bytes that torch takes for pinned memory: the next power of two (ATen/core/CachingHostAllocator.h)."""
    return float(2 ** math.ceil(math.log2(size))) if size >= 1 else 0.0


def weight_bytes(counts: Weights, element: int, stage: int, processes: int) -> float:
    """Return bytes of a network's weights on one process; small ones and integers are whole under stage 3 too."""
    split = counts.total / processes + counts.small if stage == 3 else counts.total
    return element * split + counts.integers


def gathered(counts: Weights, element: int, stage: int, window: int) -> Sizes:
    """Return what a pass has fetched of split weights: all of them, or a window of so many elements."""
    return {"gathered": float(element * min(counts.total - counts.small, window))} if stage == 3 else {}


def engine_memory(
    counts: Weights, element: int, stage: int, processes: int, *, offload_optimizer: bool, offload_param: bool,
    bucket: int = BUCKET, accelerator: bool = True,
) -> EngineMemory:
    """Return the memory of an engine that trains. On a CPU the buckets count as far as they are touched."""
    trained, half = counts.trained, element == 2
    share = trained if stage == 0 else trained / processes
    touched = bucket if accelerator else min(bucket, trained)
    pin = pinned if accelerator else float
    on_host = offload_optimizer and stage >= 1
    always: Sizes = {"weights": weight_bytes(counts, element, stage, processes)}
    backward: Sizes = {}
    step: Sizes = {"buffers": 4.0 * min(share, SUB_GROUP if stage == 3 else share)} if half and not on_host else {}
    host: Sizes = {}
    if on_host:
        copies = element * share * (2 if stage == 2 else 1)
        # masters of stages 1 and 2 are pinned, those of stage 3 are not; float32 gradients are in all
        masters = 4 * share if stage == 3 else pin(4 * share)
        host = {"optimizer": 8 * share + masters, "gradients": pin(4 * share) + pin(copies)}
    else:
        always["optimizer"] = 12.0 * share if stage or half else 8.0 * share
    if stage <= 1:
        backward["gradients"] = float(element * trained)
    elif not on_host:
        (backward if stage == 2 else always)["gradients"] = float(element * share)
    if stage == 0:
        reduction = element * min(trained, bucket) if processes > 1 else 0
        step = {"buffers": max(reduction, step.get("buffers", 0.0))}
    elif stage == 3:
        always["buffers"] = float(element * touched)
        backward |= gathered(counts, element, stage, LIVE + PREFETCH)
        if processes > 1:
            backward["buffers"] = float(element * min(bucket, trained) / processes)
    else:
        overlapping = stage == 2 and half  # overlap_comm has a second bucket
        backward["buffers"] = float(element * touched * (2 if overlapping else 1))
        if on_host:
            always["buffers"] = float(element * counts.largest)
            host["buffers"] = pin(element * counts.largest)
    if stage < 3:
        step = add(step, {"gradients": backward.get("gradients", 0.0)})
    if stage == 3 and offload_param:
        host["weights"] = pin(element * counts.total / processes)
        always["weights"] = float(element * counts.small + counts.integers)
    return EngineMemory(always, backward, step, host)


def plan(job: Job, setting: Setting, machine: Machine) -> Plan:
    """Return the memory that the setting takes on the machine."""
    n, element = machine.devices, job.element
    always: Sizes = {"reserve": CONTEXT if machine.accelerator else 0.0}
    process: Sizes = {"reserve": PROCESS if machine.accelerator else 0.0}  # of the host
    loaded = [0.0]  # bytes of a whole network while a process reads it, beside what already is on the host
    for model in job.frozen.values():
        if model.shared:
            continue
        size = {"weights": weight_bytes(model.weights, element, model.stage(setting), n)}
        always, process = (always, add(process, size)) if model.offload else (add(always, size), process)
        if setting.stages[model.role] != 3:
            loaded.append(weight_bytes(model.weights, element, 0, n))
    engines: dict[str, EngineMemory] = {}
    for role, network in job.trained.items():
        counts = network.weights.trained_alone if job.shared else network.weights
        engines[role] = engine_memory(
            counts, element, setting.stages[role], n, bucket=job.bucket, accelerator=machine.accelerator,
            offload_optimizer=setting.offload_optimizer, offload_param=setting.offload_param,
        )
        always, process = add(always, engines[role].always), add(process, engines[role].host)
        if setting.stages[role] != 3 and not job.shared:
            loaded.append(weight_bytes(network.weights, element, 0, n))
        if job.ema and role != "critic":
            process = add(process, {"optimizer": 4.0 * network.weights.trained / n})
    moment, most = max(moments(job, setting, engines), key=lambda one: sum(one[1].values()))
    card = {name: size for name, size in add(always, most).items() if size}
    # With cards, weights pass through the host on their way: as much beside what is kept there, at most. Else the card is the host.
    process = add(process, {"loading": max(loaded)} if machine.accelerator else card)
    return Plan(setting, machine, card, {name: size * machine.per_node for name, size in process.items() if size}, moment)


def moments(job: Job, setting: Setting, engines: dict[str, EngineMemory]) -> Iterator[tuple[str, Sizes]]:
    """Yield name and bytes of every moment that might need the most, beside what is held always."""
    waiting: Sizes = {}
    for role, network in job.trained.items():
        memory, label = engines[role], "" if role == "model" else f" of the {role}"
        yield f"training{label}", add(waiting, memory.backward, network.training.sizes)
        yield f"optimizer step{label}", add(waiting, memory.step)
        trunk = gathered(network.weights, job.element, setting.stages[role], LIVE + PREFETCH)
        yield f"evaluation{label}", add(network.evaluation.sizes, trunk)
        if job.both_gradients:
            waiting = {"gradients": memory.backward.get("gradients", 0.0)}
    for name, model in job.frozen.items():
        trunk = gathered(model.weights, job.element, model.stage(setting), LIVE_FROZEN + PREFETCH_FROZEN)
        yield f"scoring by the {name}", add(model.evaluation.sizes, trunk)
    if job.rollout is not None:
        counts, stage = job.trained[job.rollout.role].weights, setting.stages[job.rollout.role]
        whole = {"gathered": float(job.element * counts.total)} if stage == 3 else {}
        if setting.layerwise:
            whole = gathered(counts, job.element, stage, LIVE + PREFETCH)
        yield "generation", add(job.rollout.reading.sizes, whole, {"kv_cache": float(job.rollout.cache)})
