"""The memory of a run: pure arithmetic from counts of weights, from what a pass holds (footprint.py), setting and machine.

Bytes everywhere; a GiB is 2^30. What a step holds is a list of rows: column, bytes, place, moment. How DeepSpeed holds an
engine follows training/utils/engine/configs.py and DeepSpeed's runtime/zero/stage_1_and_2.py and stage3.py. With T trained
and F frozen weights of e bytes on n processes:

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
from dataclasses import dataclass, replace
from typing import NamedTuple

GIB = 2**30
BUCKET = 500_000_000  # elements; DeepSpeed's reduce_bucket_size
# Elements, under ZeRO-3. Parameters below SMALL stay whole on every process. The window of live ones is wide, or every layer
# would be fetched twice (1.2e9 is 6B / 5). A frozen model's engine has DeepSpeed's own window and prefetch.
SMALL = 10_000
LIVE, PREFETCH = 1_200_000_000, 30_000_000
WINDOW, WINDOW_FROZEN = LIVE + PREFETCH, 1_000_000_000 + 50_000_000
SUB_GROUP = 1_000_000_000  # elements that ZeRO-3 steps at once
CONTEXT = 1.5 * GIB  # of a card: driver context, communicators, fragments; vendors' pages say 1 to 1.5
PROCESS = 1.0 * GIB  # of the host: Python, torch and DeepSpeed, before any weight
TIGHT = 0.92  # of the memory
CARD, HOST, ALWAYS = "card", "host", "always"

Sizes = dict[str, float]  # bytes by column of the plan: weights, gradients, optimizer, activations, …


class Row(NamedTuple):
    """Bytes that a process holds. column: of the plan; place: CARD or HOST; moment: its name, or ALWAYS."""

    column: str
    size: float
    place: str = CARD
    moment: str = ALWAYS


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

    def rows(self, moment: str) -> list[Row]:
        """Return both as rows of a moment."""
        return [Row("activations", self.activations, CARD, moment), Row("logits", self.logits, CARD, moment)]


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
    """The places where things are kept. stages, checkpointing: by role ("model", or "actor" and "critic")."""

    stages: dict[str, int]
    checkpointing: dict[str, bool]
    offload_optimizer: bool = False
    offload_param: bool = False
    offload_reference: bool = False
    offload_reward: bool = False
    layerwise: bool = False  # answers are drawn without gathering the weights (--generation_weights)


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


def plan(rows: list[Row], setting: Setting, machine: Machine) -> Plan:
    """Return the memory that these rows take on the machine. Without cards, the host holds their rows too."""
    card, moment = worst(row for row in rows if row.place == CARD)
    host, _ = worst(row for row in rows if row.place == HOST or not machine.accelerator)
    return Plan(setting, machine, card, {column: size * machine.per_node for column, size in host.items()}, moment)


def worst(rows: Iterable[Row]) -> tuple[Sizes, str]:
    """Return bytes by column at the moment that needs the most, and the name of that moment."""
    by_moment: dict[str, Sizes] = {}
    for column, size, _, moment in rows:
        if size:
            sizes = by_moment.setdefault(moment, {})
            sizes[column] = sizes.get(column, 0.0) + size
    always = by_moment.pop(ALWAYS, {})
    moment, most = max(by_moment.items(), key=lambda one: sum(one[1].values()), default=(ALWAYS, {}))
    return {column: always.get(column, 0.0) + most.get(column, 0.0) for column in always | most}, moment


def pinned(size: float) -> float:
    """Return the bytes that torch takes for pinned memory: the next power of two (ATen/core/CachingHostAllocator.h)."""
    return float(2 ** math.ceil(math.log2(size))) if size >= 1 else 0.0


def weight_bytes(counts: Weights, element: int, stage: int, processes: int) -> float:
    """Return bytes of a network's weights on one process; small ones and integers are whole under stage 3 too."""
    split = counts.total / processes + counts.small if stage == 3 else counts.total
    return element * split + counts.integers


def gathered(counts: Weights, element: int, stage: int, moment: str, window: int = WINDOW) -> list[Row]:
    """Return what a pass has fetched of split weights: all of them, or a window of so many elements."""
    return [Row("gathered", element * min(counts.total - counts.small, window), CARD, moment)] if stage == 3 else []


def engine_rows(
    counts: Weights,
    element: int,
    stage: int,
    machine: Machine,
    *,
    offload_optimizer: bool = False,
    offload_param: bool = False,
    bucket: int = BUCKET,
    label: str = "",
) -> list[Row]:
    """Return what an engine that trains holds, without its passes. On a CPU the buckets count as far as they are touched.

    bucket: elements. label: ends the names of its moments, "training" and "optimizer step".
    """
    n, trained, half = machine.devices, counts.trained, element == 2
    training, step = f"training{label}", f"optimizer step{label}"
    share = trained if stage == 0 else trained / n
    touched = bucket if machine.accelerator else min(bucket, trained)
    pin = pinned if machine.accelerator else float
    on_host = offload_optimizer and stage >= 1
    if stage == 3 and offload_param:
        rows = [Row("weights", element * counts.small + counts.integers)]
        rows.append(Row("weights", pin(element * counts.total / n), HOST))
    else:
        rows = [Row("weights", weight_bytes(counts, element, stage, n))]
    if on_host:
        # Masters of stages 1 and 2 are pinned, those of stage 3 are not; float32 gradients are in all.
        rows.append(Row("optimizer", 8 * share + (4 * share if stage == 3 else pin(4 * share)), HOST))
        rows.append(Row("gradients", pin(4 * share) + pin(element * share * (2 if stage == 2 else 1)), HOST))
    else:
        rows.append(Row("optimizer", 12 * share if stage or half else 8 * share))
    gradients = element * (trained if stage <= 1 else 0 if on_host else share)
    rows += [Row("gradients", gradients, CARD, moment) for moment in ([ALWAYS] if stage == 3 else [training, step])]
    casts = 4 * min(share, SUB_GROUP if stage == 3 else share) if half and not on_host else 0
    reduced = element * min(trained, bucket) if stage == 0 and n > 1 else 0
    rows.append(Row("buffers", max(casts, reduced), CARD, step))
    if stage in (1, 2):
        buckets = 2 if stage == 2 and half else 1  # overlap_comm has a second one
        rows.append(Row("buffers", element * touched * buckets, CARD, training))
        if on_host:
            rows += [Row("buffers", element * counts.largest), Row("buffers", pin(element * counts.largest), HOST)]
    if stage == 3:
        rows += [Row("buffers", element * touched), *gathered(counts, element, stage, training)]
        rows.append(Row("buffers", element * min(bucket, trained) / n if n > 1 else 0, CARD, training))
    return rows
