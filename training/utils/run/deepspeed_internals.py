"""Private touches of DeepSpeed, one function each, written against DeepSpeed 0.14.4 to 0.19."""

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def forget_shared_memory_collectives() -> None:
    """Keep DeepSpeed on a CPU from its shared-memory operator: compiling it takes half a minute, and a compiler."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def save_on_every_disk(engine) -> None:
    """Let this process write, too, what is equal on all below ZeRO-3; DeepSpeed lets rank 0 alone write it."""
    engine.save_non_zero_checkpoint = True


def load_data(path: str | Path, map_location: Any = None, mmap: bool = False) -> Any:
    """Return what torch.save or DeepSpeed wrote, of tensors, plain values and the four types of DeepSpeed's states alone.

    Raises UnpicklingError for any other: loading by pickle would run the code that a file names. mmap: read tensors on use.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
    return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and zipfile.is_zipfile(path))


def load_data_alone(engine) -> None:
    """Let engine.load_checkpoint() read its files by load_data; DeepSpeed reads them by pickle, which runs code."""
    engine.checkpoint_engine.load = load_data


def plain_masters(optimizer) -> dict[int, Tensor]:
    """Return id of a 16-bit parameter -> its float32 master in DeepSpeed's optimizers without ZeRO; {} for all others."""
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if isinstance(optimizer, FP16_UnfusedOptimizer):
        masters = optimizer.fp32_groups
    elif isinstance(optimizer, FP16_Optimizer):
        flat = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        masters = [torch._utils._unflatten_dense_tensors(one, like) for one, like in flat]   # views
    else:
        return {}
    pairs = zip(chain(*optimizer.fp16_groups), chain(*masters), strict=True)
    return {id(parameter): master for parameter, master in pairs}


def in_shared_buffer(parameter: nn.Parameter) -> bool:
    """Tell whether ZeRO 1 or 2, or the bf16 optimizer, keeps a float32 master of the parameter in a flat buffer."""
    return hasattr(parameter, "_hp_mapping")


def master_fragment(parameter: nn.Parameter) -> tuple[Tensor, int] | None:
    """Return this process's float32 elements of a parameter with in_shared_buffer, and the position of the first of them in
    the flattened parameter; None if it owns none.
    """
    mapping = parameter._hp_mapping
    return None if mapping is None else (mapping.get_hp_fragment().detach(), mapping.lp_fragment_address.start)


def forgotten_loss_scale(engine) -> float:
    """Return the factor that engine.backward leaves out: the loss scale in float16 under ZeRO-0, where DeepSpeed 0.19 scales only
    for its ZeRO optimizers though step() divides all the same; 1 everywhere else, and in versions that scale.

    Without it gradients vanish in float16 and what is left is divided by 65536: Adam's epsilon rules, nothing is clipped.
    """
    from deepspeed.runtime import base_optimizer

    zero = getattr(base_optimizer, "ZeROOptimizer", None)
    if not engine.fp16_enabled() or not hasattr(zero, "scale_if_loss") or hasattr(engine.optimizer, "scale_if_loss"):
        return 1.0  # before scale_if_loss came, each optimizer had a backward of its own that scaled
    return float(engine.optimizer.loss_scale)


def gradient_norm(engine) -> float | None:
    """Return the norm of the last global gradient before clipping; None where the engine does not know it. DeepSpeed's float16
    optimizer for ZeRO-0 remembers it times the loss scale.
    """
    norm = engine.get_global_grad_norm()
    if norm is not None and "Unfused" in type(engine.optimizer).__name__:
        norm = norm / engine.optimizer.loss_scale
    return norm


def overflow_checker(optimizer):
    """Return the object whose has_overflow() step() asks: under ZeRO-0 one of its own, else the optimizer."""
    return getattr(optimizer, "overflow_checker", optimizer)


def has_overflow(optimizer) -> bool:
    """Tell whether accumulated gradients hold an infinity or NaN on any process: what DeepSpeed's optimizers ask in step()."""
    checker = getattr(optimizer, "overflow_checker", None)  # ZeRO-0
    return checker.check() if checker else optimizer.has_overflow(getattr(optimizer, "partition_gradients", True))


@contextmanager
def as_if_overflowed(optimizer) -> Iterator[None]:
    """Make optimizer.step() drop its gradients inside, as after an overflow, and leave the loss scale alone."""
    checker = overflow_checker(optimizer)
    before = vars(checker).get("has_overflow")  # of SaturationWatch
    checker.has_overflow = lambda *_, **__: True
    optimizer._update_scale = lambda *_, **__: None
    try:
        yield
    finally:
        del checker.has_overflow, optimizer._update_scale
        if before:
            checker.has_overflow = before


def forget_fetch_order(engine) -> None:
    """Forget the recorded order of modules from which ZeRO-3 fetches ahead: fetches then depend on the layer alone.

    Recorded orders are those of training passes, and the passes of processes differ in a rollout (one reads a prompt,
    another a token).
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    try:
        coordinator = offload.get_param_coordinator()
    except TypeError:  # DeepSpeed before 0.15 has one for training and one for evaluation
        coordinator = offload.get_param_coordinator(training=False)
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


@contextmanager
def kept_gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep gathered ZeRO-3 weights whole inside: hooks let go of weights that nobody uses."""
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.ds_active_sub_modules.add("generation")
        yield
    finally:
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard("generation")
