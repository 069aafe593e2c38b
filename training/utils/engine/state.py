"""The state of a trained model by the names of its parameters, which any number of processes under any ZeRO stage can read.

A process writes the elements that it owns of every trained parameter: the float32 weight and what the optimizer keeps beside
it. In a file each such piece has the key KIND:START:NAME, where START is the position of its first element in the
flattened parameter. Whoever reads looks up the pieces that its own elements lie in. Frozen weights are in no file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError, refuse
from training.utils.engine.extras import extras
from training.utils.run.deepspeed_internals import (
    copy_masters,
    loss_scale,
    optimizer_places,
    set_loss_scale,
)

WEIGHT, STEP = "weight", "step"
FILE_BYTES = 1 << 27  # of a file at most, but for one larger tensor: what a card's tensors take on the host while they are written
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of DeepSpeed's engine


def engine_tensors(engine, keeps_disk: bool) -> dict[str, Tensor]:
    """Return what this process writes of the float32 weights and the optimizer's state, flat, by KIND:START:NAME; no copies.

    keeps_disk: it writes, too, what every process owns whole.
    """
    optimizer = base_optimizer(engine)
    tensors = {}
    for name, place in optimizer_places(engine, engine.module).items():
        if place.whole and not keeps_disk:
            continue
        tensors[f"{WEIGHT}:{place.start}:{name}"] = place.of(place.slot)
        for kind, value in optimizer.state.get(place.slot, {}).items():
            piece = torch.tensor([float(value)]) if kind == STEP else place.of(value)
            tensors[f"{kind}:{place.start}:{name}"] = piece
    return tensors


def base_optimizer(engine) -> torch.optim.Optimizer:
    """Return the optimizer inside DeepSpeed's, whose state is that of its flat tensors."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def write_tensors(folder: Path, rank: int, tensors: dict[str, Tensor]) -> Iterator[Path]:
    """Write tensors into files of about FILE_BYTES; yield each when it is written."""
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][key] = tensor
        size += tensor.nbytes
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(files):
        path = folder / f"rank-{rank}-{number}.safetensors"
        save_file(content, path)
        yield path


class SavedTensors:
    """The pieces of tensors in the files of a folder; nothing is read but headers until it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pieces: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))  # name, kind, start -> file
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118  (it is no dictionary)
                kind, start, name = key.split(":", 2)
                self.pieces[name][kind][int(start)] = file

    def kinds(self, name: str) -> list[str]:
        """Return what was saved of a parameter."""
        return list(self.pieces[name])

    def piece(self, kind: str, name: str, start: int) -> Tensor:
        """Return one piece, mapped from its file."""
        return self.pieces[name][kind][start].get_tensor(f"{kind}:{start}:{name}")

    def step(self, name: str) -> float:
        """Return how often the optimizer has moved a parameter."""
        return self.piece(STEP, name, next(iter(self.pieces[name][STEP]))).item()

    def fill(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """Copy the elements from start on into a flat tensor. Raises UserError if the files do not have all of them."""
        missing = len(target)
        for begin in self.pieces[name][kind]:
            piece = self.piece(kind, name, begin)
            first, last = max(start, begin), min(start + len(target), begin + len(piece))
            if first < last:
                target[first - start : last - start].copy_(piece[first - begin : last - begin])
                missing -= last - first
        if missing:
            raise UserError(
                f"{self.folder} lacks {missing} elements ({kind}) of {name}, which this run trains: it is of other flags, or the "
                "files of other nodes are not there; give the flags of the run, or copy the files of all nodes together."
            )


def read_engine(engine, saved: SavedTensors) -> None:
    """Fill weights and optimizer with what the files hold for this process. Raises UserError for what they lack."""
    optimizer = base_optimizer(engine)
    steps: dict[Tensor, float] = defaultdict(float)
    for name, place in optimizer_places(engine, engine.module).items():
        saved.fill(place.of(place.slot), WEIGHT, name, place.start)
        kinds = [kind for kind in saved.kinds(name) if kind != WEIGHT]
        for kind in kinds:
            state = optimizer.state[place.slot]
            if kind == STEP:
                steps[place.slot] = max(steps[place.slot], saved.step(name))
                continue
            if kind not in state:
                state[kind] = torch.zeros_like(place.slot)
            saved.fill(place.of(state[kind]), kind, name, place.start)
    for slot, number in steps.items():
        optimizer.state[slot][STEP] = as_step(optimizer, slot, number)


def as_step(optimizer: torch.optim.Optimizer, slot: Tensor, number: float) -> Tensor | int:
    """Return a number of steps as the optimizer keeps it: torch's in a tensor, DeepSpeed's as a number."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):  # AdamW is no Adam before torch 2.6
        return int(number)
    return torch.tensor(number, dtype=torch.float32, device=slot.device if optimizer.defaults.get("fused") else "cpu")


def engine_facts(engine) -> dict[str, Any]:
    """Return what is the same on all processes, for JSON: counters, the place in the schedule, its length, the loss scale."""
    schedule = {"schedule": engine.lr_scheduler.last_epoch, "schedule_steps": extras(engine).schedule_steps}
    return {name: getattr(engine, name) for name in COUNTERS} | schedule | {"loss_scale": loss_scale(engine.optimizer)}


def set_engine_facts(
    engine, facts: dict[str, Any], resized: bool, longer: float = 1, larger: float | None = None
) -> None:
    """Set counters, schedule and loss scale, and let the network compute with the optimizer's weights. All processes call it.

    The learning rate is that of the schedule of this run at the place of the saved one. resized: batches have another size from
    here on, so that the schedule has another number of steps for the same data; the place is the same share of it, in whole steps:
    rounded up, the run would go on behind the end of a cosine, where it rises again. longer: the epochs of this run by those of
    the saved one. larger: the examples of a step by those of the saved run, if that was of --max_steps: its schedule says
    nothing of the data, and the place is that of the examples that it took. Raises UserError where an older checkpoint does not
    say the length of its schedule.
    """
    refuse(
        resized and "schedule_steps" not in facts,
        "The checkpoint is of an older version and does not say how long its schedule is, so that no batch size can change; resume "
        "it without naming one in --allow.",
    )
    for name in COUNTERS:
        setattr(engine, name, facts[name])
    scheduler = engine.lr_scheduler
    place = facts["schedule"]
    if resized and larger:
        place = int(place / larger)
    elif resized:
        place = place * extras(engine).schedule_steps // round(facts["schedule_steps"] * longer)
    scheduler.last_epoch = place
    scheduler._last_lr = scheduler.get_lr()
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
    set_loss_scale(engine.optimizer, facts["loss_scale"])
    copy_masters(engine)
