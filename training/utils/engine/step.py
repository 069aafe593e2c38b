"""Accumulate gradients over many micro-batches; step one engine, or two together."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from training.utils.engine.extras import extras
from training.utils.run.deepspeed_internals import as_if_overflowed, forgotten_loss_scale, gradient_norm, has_overflow
from training.utils.run.process_group import Run


class Accumulation:
    """The gradients of one optimizer step: ``count`` calls of backward, then total; the caller owes engine.step().

    A loss is a sum over this process's tokens divided by the denominator of the whole global batch, so the losses of all
    micro-batches and processes add up to the loss of the global batch. DeepSpeed averages gradients over processes; the
    factor world_size undoes that.
    """

    def __init__(self, engine, count: int, run: Run) -> None:
        self.engine, self.count, self.run = engine, count, run
        self.done, self.loss = 0, 0.0

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        engine, first = self.engine, self.done == 0
        self.done += 1
        last = self.done == self.count
        engine.set_gradient_accumulation_boundary(last)
        watch = extras(engine).saturation
        with watch.backward(first) if watch else nullcontext():
            engine.backward(loss * self.run.world_size * forgotten_loss_scale(engine), scale_wrt_gas=False)
        self.loss += loss.item()
        if not last:
            engine.step()  # counts the micro-batch, no more

    def total(self) -> float:
        """Return the loss of the global batch. Raises UserError, before the weights move, if it is not finite."""
        return self.run.agree(self.loss)


def optimizer_step(engine, micro_batches: Sequence[Any], loss_of: Callable[[Any], Tensor], run: Run) -> float:
    """Accumulate the gradients of loss_of(micro_batch) over all micro-batches, then step once. Returns the loss."""
    gradients = Accumulation(engine, len(micro_batches), run)
    for micro_batch in micro_batches:
        gradients.backward(loss_of(micro_batch))
    total = gradients.total()
    engine.step()
    return total


def step_together(engines: Sequence[Any]) -> None:
    """Call engine.step() of all engines, or of none if the float16 gradients of any overflowed: neither weights nor schedules
    move then, and only the loss scale of those that overflowed goes down. All processes call it, after Accumulation.
    """
    overflowed = [engine.fp16_enabled() and has_overflow(engine.optimizer) for engine in engines]
    for engine, own in zip(engines, overflowed, strict=True):
        with as_if_overflowed(engine.optimizer) if any(overflowed) and not own else nullcontext():
            engine.step()


def optimizer_metrics(engine) -> dict[str, float]:
    """Return the learning rate, and the norm of the last global gradient before clipping.

    Under ZeRO-0 in float32 the engine does not know the norm; it is left out then.
    """
    norm = gradient_norm(engine)
    return {"lr": engine.get_lr()[0]} | ({} if norm is None else {"grad_norm": float(norm)})
