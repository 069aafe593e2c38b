"""Float16 on chips that saturate: take their overflow flag for DeepSpeed's search for infinities.

DeepSpeed skips a float16 step and lowers the loss scale when it finds an infinity in the gradients. A chip that turns
overflow into the largest number (Ascend 910A) never shows one: the scale only climbs and training silently degrades. The
chip's own flag takes the place of the search: cleared before each backward pass and read after it, so that what overflows
harmlessly in a forward pass (the mask of attention scores) does not count; with gradient checkpointing the forward inside
the backward pass does.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from models.device import clear_overflow_flag, overflow_flag, saturates
from training.utils.run.deepspeed_internals import overflow_checker

logger = logging.getLogger("sanbu")


class SaturationWatch:
    """Remembers whether a backward pass of the current global batch overflowed, and tells DeepSpeed's optimizer."""

    def __init__(self, engine) -> None:
        self.device, self.seen = engine.device, False
        checker = overflow_checker(engine.optimizer)
        finds_infinities = checker.has_overflow
        # All processes ask it at the same point of step(), and all ask both.
        checker.has_overflow = lambda *args, **more: self.anywhere() | finds_infinities(*args, **more)

    def anywhere(self) -> bool:
        """Tell whether it happened on any process. All processes call it."""
        flag = torch.tensor([float(self.seen)], device=self.device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    @contextmanager
    def backward(self, first: bool) -> Iterator[None]:
        """Watch one backward pass; first: that of the first micro-batch of a global batch."""
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
