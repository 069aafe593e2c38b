"""The exponential moving average of the actor's weights, in float32 on the host, each process with its part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.utils.engine.state import SavedTensors
from training.utils.run.deepspeed_internals import optimizer_places
from training.utils.run.process_group import Run

AVERAGE = "average"  # its kind in the files of a checkpoint


@dataclass
class Share:
    """Elements start … start + length of a flattened parameter, where this process can read them in float32."""

    source: Tensor
    start: int


class MovingAverage:
    """average <- decay · average + (1 - decay) · weights after each optimizer step; it starts as the weights themselves.

    A decay of 0.992 averages over about 1 / (1 - decay) = 125 steps.

    Only what the engine trains is kept: with LoRA the adapters, with P-Tuning the prefix. What is averaged is what the optimizer
    moves, float32 also where the network computes in 16 bits: there most steps of an average would round away. A process
    keeps the part that it owns under ZeRO 1 to 3, or its even share of each parameter, so no step communicates.
    """

    def __init__(self, engine: Any, decay: float, run: Run) -> None:
        self.engine, self.decay, self.run = engine, decay, run
        shares = self._shares()
        self.averages = {name: share.source.to("cpu", torch.float32, copy=True) for name, share in shares.items()}
        self.starts = {name: share.start for name, share in shares.items()}

    @property
    def network(self) -> nn.Module:
        """The model inside the engine's module, whose parameter names are used."""
        return self.engine.module.model

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights after a call of engine.step(); a step that DeepSpeed skipped (fp16 overflow) counts for none."""
        if not self.engine.was_step_applied():
            return
        for name, share in self._shares().items():
            # lerp, not b·a + (1-b)·w: a weight that rests has itself as average, to the last bit.
            self.averages[name].lerp_(share.source.to("cpu", torch.float32), 1.0 - self.decay)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Return all averages, whole, in float32 on the host of the processes that write; {} on the others.

        All processes call it. Names are those of ``network.named_parameters()``; see checkpoint.export.
        """
        whole: dict[str, Tensor] = {}
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            shape = getattr(parameter, "ds_shape", parameter.shape)
            flat = torch.zeros(shape.numel(), dtype=torch.float32, device=self.engine.device)
            if name in self.averages:
                mine, start = self.averages[name], self.starts[name]
                flat[start : start + mine.numel()] = mine.to(flat.device)
            if self.run.world_size > 1:
                # Parts do not overlap: each sum has one term that is not 0.
                dist.all_reduce(flat) if self.run.nodes.several else dist.reduce(flat, dst=0)
            if self.run.nodes.keeps_disk:
                whole[name] = flat.view(shape).cpu()
        return whole

    def tensors(self) -> dict[str, Tensor]:
        """Return this process's part, for its files in a checkpoint (engine/state.py)."""
        return {f"{AVERAGE}:{self.starts[name]}:{name}": average for name, average in self.averages.items()}

    def read(self, saved: SavedTensors) -> None:
        """Go on from a checkpoint's files. Raises UserError for what they lack."""
        for name, average in self.averages.items():
            saved.fill(average, AVERAGE, name, self.starts[name])

    def load_former(self, state: dict[str, Any]) -> None:
        """Go on from this process's part of an older checkpoint, of the same processes and ZeRO stage."""
        for name, average in self.averages.items():
            average.copy_(state["averages"][name][: len(average)])  # ZeRO-3 padded the last part

    def _shares(self) -> dict[str, Share]:
        """Return what this process keeps the average of: what it owns, or its even share of what all of them own."""
        shares: dict[str, Share] = {}
        for name, place in optimizer_places(self.engine, self.network).items():
            first, last = 0, place.length
            if place.whole:
                first, last = (place.length * rank // self.run.world_size for rank in (self.run.rank, self.run.rank + 1))
            shares[name] = Share(place.of(place.slot)[first:last], place.start + first)
        return shares
