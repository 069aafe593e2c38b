"""What float16 needs beyond DeepSpeed: the loss scale that its engine forgets under ZeRO-0, and chips that saturate.

DeepSpeed skips a float16 step and lowers the loss scale when it finds an infinity in the gradients. A chip that turns
overflow into the largest number (Ascend 910A) never shows one: the scale only climbs and training silently degrades. The
chip's own flag takes the place of the search: cleared before each backward pass and read after it, so that what overflows
harmlessly in a forward pass (the mask of attention scores) does not count; with gradient checkpointing the forward inside
the backward pass does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from models.device import clear_overflow_flag, overflow_flag, saturates

logger = logging.getLogger("sanbu")


def forgotten_loss_scale(engine) -> float:
    """The factor that engine.backward leaves out: the loss scale in float16 under ZeRO-0, where DeepSpeed 0.19 scales only
    for its ZeRO optimizers though step() divides all the same; 1 everywhere else, and in versions that scale.

    Without it gradients vanish in float16 and what is left is divided by 65536: Adam's epsilon rules, nothing is clipped.
    """
    from deepspeed.runtime import base_optimizer

    zero = getattr(base_optimizer, "ZeROOptimizer", None)
    if not engine.fp16_enabled() or not hasattr(zero, "scale_if_loss") or hasattr(engine.optimizer, "scale_if_loss"):
        return 1.0  # before scale_if_loss came, each optimizer had a backward of its own that scaled
    return float(engine.optimizer.loss_scale)


def gradient_norm(engine) -> float | None:
    """The norm of the last global gradient before clipping; None where the engine does not know it. DeepSpeed's float16
    optimizer for ZeRO-0 remembers it times the loss scale.
    """
    norm = engine.get_global_grad_norm()
    if norm is not None and "Unfused" in type(engine.optimizer).__name__:
        norm = norm / engine.optimizer.loss_scale
    return norm


class SaturationWatch:
    """Remembers whether a backward pass of the current global batch overflowed, and tells DeepSpeed's optimizer."""

    def __init__(self, engine) -> None:
        self.device, self.seen = engine.device, False
        checker = getattr(engine.optimizer, "overflow_checker", engine.optimizer)  # the first under ZeRO-0
        finds_infinities = checker.has_overflow
        # All processes ask it at the same point of step(), and all ask both.
        checker.has_overflow = lambda *args, **more: self.anywhere() | finds_infinities(*args, **more)

    def anywhere(self) -> bool:
        """Whether it happened on any process. All processes call it."""
        flag = torch.tensor([float(self.seen)], device=self.device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    @contextmanager
    def backward(self, first: bool) -> Iterator[None]:
        """Around one backward pass; first: that of the first micro-batch of a global batch."""
        clear_overflow_flag()
        yield
        self.seen = overflow_flag() or (self.seen and not first)


def watch_saturation(engine) -> SaturationWatch | None:
    """Watch an engine that trains in float16 on a chip that saturates; None for all others."""
    if not (saturates() and engine.fp16_enabled()):
        return None
    logger.warning(
        "This chip saturates instead of overflowing to infinity (Ascend 910A): its overflow flag decides which float16 steps "
        "are skipped. If every step is, set SANBU_OVERFLOW_FLAG=0 and a static loss scale in --deepspeed_config."
    )
    return SaturationWatch(engine)
