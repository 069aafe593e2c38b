"""The exponential moving average of the actor's weights, in float32 on the host, each process with its part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UserError
from training.utils.run.deepspeed_internals import in_shared_buffer, master_fragment, plain_masters
from training.utils.run.process_group import Run


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
        for name, parameter in self._trained():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            flat = torch.zeros(shape.numel(), dtype=torch.float32, device=self.engine.device)
            if name in self.averages:
                mine, start = self.averages[name], self.starts[name]
                mine = mine[: max(0, flat.numel() - start)]  # ZeRO-3 pads the last part
                flat[start : start + mine.numel()] = mine.to(flat.device)
            if self.run.world_size > 1:
                # Parts do not overlap: each sum has one term that is not 0.
                dist.all_reduce(flat) if self.run.nodes.several else dist.reduce(flat, dst=0)
            if self.run.nodes.keeps_disk:
                whole[name] = flat.view(shape).cpu()
        return whole

    def state_dict(self) -> dict[str, Any]:
        """Return this process's part, for its file in a checkpoint."""
        return {"averages": self.averages, "starts": self.starts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's part. Raises UserError if it is cut in another way than the engine is now."""
        shapes = {name: tensor.shape for name, tensor in self.averages.items()}
        if {name: tensor.shape for name, tensor in state["averages"].items()} != shapes or state["starts"] != self.starts:
            raise UserError(
                "--resume: the moving average in the checkpoint is not of this run's trained parameters; give the flags "
                "of the run that wrote it, or another --output_dir."
            )
        for name, tensor in state["averages"].items():
            self.averages[name].copy_(tensor)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.network.named_parameters() if parameter.requires_grad]

    def _shares(self) -> dict[str, Share]:
        """Return what this process owns of each trained parameter, in float32 where the optimizer has that."""
        import deepspeed

        masters = plain_masters(self.engine.optimizer)
        shares: dict[str, Share] = {}
        for name, parameter in self._trained():
            if hasattr(parameter, "ds_id"):
                source = deepspeed.utils.safe_get_local_fp32_param(parameter).detach()
                shares[name] = Share(source, source.numel() * dist.get_rank(parameter.ds_process_group))
            elif in_shared_buffer(parameter):
                if fragment := master_fragment(parameter):
                    shares[name] = Share(*fragment)
            else:
                flat = masters.get(id(parameter), parameter).detach().flatten()
                first, last = (flat.numel() * rank // self.run.world_size for rank in (self.run.rank, self.run.rank + 1))
                shares[name] = Share(flat[first:last], first)
        return shares
