"""Private touches of DeepSpeed, one function each, written against DeepSpeed 0.14.4 to 0.19."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.weight_files import load_pickled


def forget_shared_memory_collectives() -> None:
    """Keep DeepSpeed on a CPU from its shared-memory operator: compiling it takes half a minute, and a compiler.

    The table is there from DeepSpeed's import on, or made when it is first read, by looking for compilers: 0.3 s.
    """
    import deepspeed

    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def wait_for_all_gathers() -> None:
    """Let ZeRO-3 on a CPU wait for all weights that it gathers: DeepSpeed 0.14 waits for the last alone, which suffices on a
    card's stream; gloo ends gathers in any order, and parts of weights were whatever lay in memory.
    """
    from deepspeed import comm
    from deepspeed.runtime.zero.partition_parameters import Init

    if "launch_handles[-1].wait()" not in inspect.getsource(Init._allgather_params_coalesced):
        return
    gather = comm.all_gather_into_tensor

    def at_once(*args: Any, **more: Any) -> Any:
        handle = gather(*args, **more)
        if handle is not None:
            handle.wait()
        return handle

    comm.all_gather_into_tensor = at_once


def keep_all_micro_batches(optimizer) -> None:
    """Let ZeRO 1 and 2 with the optimizer on the host add up gradients: DeepSpeed 0.14 does so only where its configuration, not
    set_gradient_accumulation_boundary(), tells of several micro-batches; otherwise the last one alone counted.
    """
    copy = getattr(type(optimizer), "copy_grads_in_partition", None)
    if copy and "gradient_accumulation_steps > 1" in inspect.getsource(copy):
        optimizer.gradient_accumulation_steps = 2  # any number above 1


def skip_muon_kernels() -> None:
    """Import DeepSpeed's Muon uncompiled: every ZeRO engine imports it, and TorchInductor with it took 2 s of CPU."""
    from deepspeed.runtime import compiler

    if not hasattr(compiler, "compile"):  # DeepSpeed 0.14 has neither
        return
    known, compiler.compile = compiler.compile, lambda: lambda function: function
    with suppress(ImportError):  # older versions have no Muon
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    compiler.compile = known


def load_data(path: str | Path, map_location: Any = None, mmap: bool = False) -> Any:
    """Return what torch.save or DeepSpeed wrote, of tensors, plain values and the four types of DeepSpeed's states alone.

    Raises UnpicklingError for any other: loading by pickle would run the code that a file names. mmap: read tensors on use.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
    return load_pickled(path, map_location, mmap)


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


@dataclass
class Place:
    """Where the optimizer has the float32 elements of a parameter that this process owns: elements start … of the flattened
    parameter, ``length`` of them, are elements offset … of slot, a tensor that the optimizer moves. whole: every process owns
    the whole parameter, as without ZeRO.
    """

    slot: Tensor
    offset: int
    start: int
    length: int
    whole: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Return these elements, live and flat, of slot or of a tensor of its shape in the optimizer's state."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


def optimizer_places(engine, model: nn.Module) -> dict[str, Place]:
    """Return the places of a model's trained parameters by name, without those of which this process owns nothing.

    model: engine.module or a part of it.
    """
    optimizer = engine.optimizer
    flat = dict(flat_groups(optimizer))
    masters = {} if flat else plain_masters(optimizer)
    places: dict[str, Place] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            group, offset, most = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = most * dist.get_rank(parameter.ds_process_group)
            length = min(most, parameter.ds_numel - start)  # the last parts are padded, or empty
            place = Place(optimizer.fp32_partitioned_groups_flat[group], offset, start, length)
        elif in_shared_buffer(parameter):
            if parameter._hp_mapping is None:
                continue
            ours, theirs = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
            slot = optimizer.optimizer.param_groups[parameter._hp_mapping.param_group_index]["params"][0]
            place = Place(slot, ours.start, theirs.start, theirs.numel)
        else:
            slot, offset = flat.get(id(parameter), (masters.get(id(parameter), parameter), 0))
            place = Place(slot, offset, 0, parameter.numel(), whole=True)
        if place.length > 0:
            places[name] = place
    return places


def flat_groups(optimizer) -> Iterator[tuple[int, tuple[Tensor, int]]]:
    """Yield id of a 16-bit parameter, and the flat float32 tensor of its group with its position in it, for DeepSpeed's
    optimizer around a fused Adam without ZeRO; nothing for all others.
    """
    for slot, group in zip(getattr(optimizer, "fp32_groups_flat", ()), getattr(optimizer, "fp16_groups", ()), strict=False):
        offset = 0
        for parameter in group:
            yield id(parameter), (slot, offset)
            offset += parameter.numel()


def copy_masters(engine) -> None:
    """Let the network compute with the optimizer's float32 weights, rounded to its dtype. All processes call it."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2, bf16
        optimizer.update_lp_params()
    else:
        masters = plain_masters(optimizer)
        for parameter in engine.module.parameters():
            if id(parameter) in masters:
                parameter.data.copy_(masters[id(parameter)].data)


LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def scale_keeper(optimizer):
    """Return the object that has the loss scale: ZeRO's scaler, a configuration since DeepSpeed 0.18, or the optimizer."""
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", optimizer)


def loss_scale(optimizer) -> dict[str, Any]:
    """Return the loss scale and what its next changes depend on; little or nothing without float16."""
    keeper = scale_keeper(optimizer)
    return {name: getattr(keeper, name) for name in LOSS_SCALE if hasattr(keeper, name)}


def set_loss_scale(optimizer, saved: dict[str, Any]) -> None:
    """Go on from loss_scale()."""
    keeper = scale_keeper(optimizer)
    for name, value in saved.items():
        if hasattr(keeper, name):
            setattr(keeper, name, value)


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
