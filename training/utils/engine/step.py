"""One optimizer step over many micro-batches, of one engine or of two together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from training.utils.engine.deepspeed_internals import (
    as_if_overflowed,
    forgotten_loss_scale,
    gradient_norm,
    has_overflow,
)
from training.utils.run.process_group import Run


def optimizer_step(engine, micro_batches: Sequence[Any], loss_of: Callable[[Any], Tensor], run: Run) -> float:
    """Accumulate the gradients of all micro-batches, then step once.

    ``loss_of(micro_batch)`` is a sum over this process's tokens divided by the denominator of the whole global batch, so the
    losses of all micro-batches and processes add up to the loss of the global batch. DeepSpeed averages gradients over
    processes; the factor world_size undoes that. Returns the loss of the global batch. Raises UserError, before the weights
    move, if it is not finite.
    """
    total = accumulate(engine, micro_batches, loss_of, run)
    engine.step()
    return total


def accumulate(engine, micro_batches: Sequence[Any], loss_of: Callable[[Any], Tensor], run: Run) -> float:
    """optimizer_step up to its last engine.step(), which the caller owes."""
    total = 0.0
    for index, micro_batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        engine.set_gradient_accumulation_boundary(last)
        loss = loss_of(micro_batch)
        watch = getattr(engine, "saturation", None)
        with watch.backward(first=index == 0) if watch else nullcontext():
            engine.backward(loss * run.world_size * forgotten_loss_scale(engine), scale_wrt_gas=False)
        total += loss.item()
        if last:
            return run.agree(total)
        engine.step()
    return total


def step_together(engines: Sequence[Any]) -> None:
    """engine.step() of all engines, or of none if the float16 gradients of any overflowed: neither weights nor schedules
    move then, and only the loss scale of those that overflowed goes down. All processes call it, each after accumulate.
    """
    overflowed = [engine.fp16_enabled() and has_overflow(engine.optimizer) for engine in engines]
    for engine, own in zip(engines, overflowed, strict=True):
        with as_if_overflowed(engine.optimizer) if any(overflowed) and not own else nullcontext():
            engine.step()


def optimizer_metrics(engine) -> dict[str, float]:
    """Learning rate, and the norm of the last global gradient before clipping.

    Under ZeRO-0 in float32 the engine does not know the norm; it is left out then.
    """
    norm = gradient_norm(engine)
    return {"lr": engine.get_lr()[0]} | ({} if norm is None else {"grad_norm": float(norm)})
