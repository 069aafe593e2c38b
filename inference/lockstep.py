"""Answers of a network whose weights stay split over the processes (ZeRO-3): every pass fetches them layer by layer, so
that all processes must run the network equally often, however many tokens each has to draw.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models.heads import base_model

IDLE_COLUMNS = 8  # of a prompt, in a pass that nobody reads; ChatGLM's needs the marks at the prompt's end


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Switch gradients off inside. With split weights all processes enter, each runs the network at least once, and whoever leaves
    first runs it on and on, unread, until the last one leaves.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # ZeRO-3 marks what it splits
        with torch.inference_mode():
            yield
        return
    network, steps = base_model(model), _Steps()
    hook = network.register_forward_pre_hook(steps.before, prepend=True, with_kwargs=True)
    # inference_mode would make inference tensors of the small weights that DeepSpeed keeps whole; training refuses those.
    with torch.no_grad():
        try:
            yield
        finally:
            hook.remove()
        while steps.others_go_on():
            network(**steps.idle)


class _Steps:
    """Asks before every pass who takes part."""

    def __init__(self) -> None:
        self.alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.idle: dict[str, Any] = {}  # a small pass that any process can make at any time

    def before(self, network: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        """Announce, as a hook, a pass that counts."""
        if not self.idle:
            columns = given["input_ids"].shape[1]
            for name in ("input_ids", "attention_mask", "position_ids"):
                if given.get(name) is not None:
                    self.idle[name] = given[name][:1, ..., -columns:][..., -IDLE_COLUMNS:]
            self.idle |= {"use_cache": False, "return_dict": True}
        self._announce(1, given["input_ids"].device)

    def others_go_on(self) -> bool:
        """Tell whether a process still has tokens to draw; it then begins a pass, which this one must make, too."""
        return self._announce(0, self.idle["input_ids"].device)

    def _announce(self, live: int, device: torch.device) -> bool:
        if self.alone:
            return False
        anyone = torch.tensor([live], dtype=torch.int32, device=device)
        dist.all_reduce(anyone, op=dist.ReduceOp.MAX)
        return not live and bool(anyone.item())
