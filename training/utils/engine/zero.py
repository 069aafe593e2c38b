"""DeepSpeed: configurations, engines, one optimizer step over many micro-batches, whole weights under ZeRO-3."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from models.device import has_accelerator
from models.weight_files import first_line
from training.utils.engine.half_precision import forgotten_loss_scale, gradient_norm, watch_saturation
from training.utils.flags.deepspeed_file import read_deepspeed_config
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")


def precision_config(dtype: torch.dtype) -> dict[str, Any]:
    """The fp16/bf16 sections; nothing for float32."""
    if dtype == torch.float16:
        return {"fp16": {"enabled": True, "loss_scale_window": 100, "initial_scale_power": 16}}
    if dtype == torch.bfloat16:
        return {"bf16": {"enabled": True}}
    return {}


def get_train_ds_config(
    offload: bool,
    dtype: torch.dtype,
    stage: int = 2,
    *,
    offload_param: bool = False,
    max_grad_norm: float = 1.0,
    world_size: int = 1,
    zero_hpz_partition_size: int = 1,
    zero_quantized_weights: bool = False,
    zero_quantized_gradients: bool = False,
    zero_quantized_nontrainable_weights: bool = False,
    override: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration of an engine that trains.

    Batch sizes are placeholders of one: a step of ours decides itself which micro-batches make a global batch and where it
    ends, and scales the loss by the number of target tokens in it. ``override`` (the content of --deepspeed_config) wins
    key by key. ZeRO++ options (hpz, quantised weights and gradients) exist under stage 3 only.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": stage >= 2 and dtype != torch.float32}
    if offload and stage >= 1:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": has_accelerator()}
    if stage == 3:
        if offload_param:
            zero["offload_param"] = {"device": "cpu", "pin_memory": has_accelerator()}
        # Small weights stay whole; the window of live ones is wide, or every layer would be fetched twice (1.2e9 is 6B / 5).
        zero |= {"stage3_param_persistence_threshold": 10_000, "stage3_max_live_parameters": 1_200_000_000}
        zero |= {"stage3_prefetch_bucket_size": 30_000_000, "stage3_gather_16bit_weights_on_model_save": False}
        if zero_hpz_partition_size > 1:
            zero["zero_hpz_partition_size"] = zero_hpz_partition_size
        for name, value in (
            ("zero_quantized_weights", zero_quantized_weights),
            ("zero_quantized_gradients", zero_quantized_gradients),
            ("zero_quantized_nontrainable_weights", zero_quantized_nontrainable_weights),
        ):
            if value:
                zero[name] = True
    config = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        # torch's AdamW is welcome beside the host: which operator serves is decided in build_optimizer.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": max_grad_norm,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        **precision_config(dtype),
    }
    return merge(config, override or {})


def get_eval_ds_config(offload: bool, dtype: torch.dtype, stage: int = 0, *, world_size: int = 1) -> dict[str, Any]:
    """The configuration of a frozen model's engine; only stage 3 saves anything without an optimizer."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 10_000
        zero["offload_param"] = {"device": "cpu" if offload else "none"}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        **precision_config(dtype),
    }


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """The base with the override's keys put over it, section by section."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


@dataclass(frozen=True)
class EngineOptions:
    """How one model is trained; ``EngineOptions.of(args, "actor")`` reads the flags with that prefix."""

    zero_stage: int
    offload_optimizer: bool
    offload_param: bool
    learning_rate: float
    lora_learning_rate: float
    weight_decay: float
    num_warmup_steps: int
    lr_scheduler_type: str
    optimizer: str
    betas: tuple[float, float]
    epsilon: float
    max_grad_norm: float
    zero_plus_plus: dict[str, Any]
    deepspeed_config: str | None

    @classmethod
    def of(cls, args, role: str = "") -> EngineOptions:
        """Read the flags; role is "" (steps 1 and 2), "actor" or "critic"."""
        prefix = f"{role}_" if role else ""
        get = lambda name: getattr(args, prefix + name)  # noqa: E731
        return cls(
            zero_stage=get("zero_stage"),
            offload_optimizer=args.offload or args.offload_optimizer,
            offload_param=args.offload_param or (args.offload and get("zero_stage") == 3),
            learning_rate=get("learning_rate"),
            lora_learning_rate=get("lora_learning_rate"),
            weight_decay=get("weight_decay"),
            num_warmup_steps=args.num_warmup_steps,
            lr_scheduler_type=args.lr_scheduler_type,
            optimizer=args.optimizer,
            betas=(args.adam_beta1, args.adam_beta2),
            epsilon=args.adam_epsilon,
            max_grad_norm=args.max_grad_norm,
            zero_plus_plus={
                name: getattr(args, name)
                for name in (
                    "zero_hpz_partition_size",
                    "zero_quantized_weights",
                    "zero_quantized_gradients",
                    "zero_quantized_nontrainable_weights",
                )
            },
            deepspeed_config=args.deepspeed_config,
        )

    def train_config(self, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
        """The DeepSpeed configuration of the engine."""
        return get_train_ds_config(
            self.offload_optimizer,
            dtype,
            self.zero_stage,
            offload_param=self.offload_param,
            max_grad_norm=self.max_grad_norm,
            world_size=world_size,
            override=read_deepspeed_config(self.deepspeed_config),
            **self.zero_plus_plus,
        )

    def loading_config(self, dtype: torch.dtype, world_size: int) -> dict[str, Any] | None:
        """What the factory needs to split the weights while it reads them: a configuration under stage 3, else None."""
        return self.train_config(dtype, world_size) if self.zero_stage == 3 else None


def parameter_groups(model: nn.Module, options: EngineOptions) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: LoRA or not, with weight decay (matrices) or without (biases, norms)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            groups.setdefault(("lora_" in name, dimensions >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": options.lora_learning_rate if lora else options.learning_rate,
            "weight_decay": options.weight_decay if decay else 0.0,
        }
        for (lora, decay), parameters in groups.items()
    ]


def build_optimizer(groups: list[dict[str, Any]], options: EngineOptions) -> torch.optim.Optimizer:
    """AdamW in the best implementation that this machine has; a fallback is logged once with its reason."""
    settings = {"betas": options.betas, "eps": options.epsilon}
    on_host = options.offload_optimizer and options.zero_stage >= 1 and has_accelerator()
    wanted = options.optimizer if options.optimizer != "auto" else ("cpu_adam" if on_host else "adamw")
    if wanted != "adamw":
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

            operator = DeepSpeedCPUAdam if wanted == "cpu_adam" else FusedAdam
            return operator(groups, **settings)  # both decouple weight decay by default
        except Exception as error:  # a compiler, toolkit or driver that is missing shows in many ways
            logger.warning(
                "DeepSpeed's %s cannot be built here (%s); torch's AdamW takes its place.", wanted, first_line(error)
            )
    try:
        return torch.optim.AdamW(groups, fused=True, **settings)
    except RuntimeError as error:   # older torch has no fused kernel for a CPU, some devices none at all
        logger.warning("torch's fused AdamW does not run here (%s); the plain one takes its place.", first_line(error))
        return torch.optim.AdamW(groups, **settings)


def build_engine(model: nn.Module, options: EngineOptions, *, dtype: torch.dtype, total_steps: int, world_size: int):
    """Wrap a model for training: optimizer, learning-rate schedule, ZeRO. total_steps counts optimizer steps of the whole run.

    DeepSpeed computes with every parameter in dtype. What was float32 under a 16-bit dtype (a prefix) is float32 in the
    optimizer, where it moves: trained_weights.
    """
    import deepspeed
    from transformers import get_scheduler

    exact = to_dtype([parameter for parameter in model.parameters() if parameter.requires_grad], dtype)
    optimizer = build_optimizer(parameter_groups(model, options), options)
    scheduler = get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps(options.num_warmup_steps, total_steps),
        num_training_steps=max(total_steps, 1),
    )
    config = options.train_config(dtype, world_size)
    skeleton = copy_structure(model) if options.zero_stage == 3 else None
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    keep_skeleton(engine, skeleton)
    engine.saturation = watch_saturation(engine)
    masters = plain_masters(engine.optimizer)
    for parameter, value in exact:
        if id(parameter) in masters:
            masters[id(parameter)].data.copy_(value)
        else:
            deepspeed.utils.safe_set_full_fp32_param(parameter, value.to(engine.device))
    return engine


def warmup_steps(wanted: int, total_steps: int) -> int:
    """Optimizer steps of warm-up: at most half of the run. A run of one step has none: warm-up begins at rate 0."""
    return min(wanted, total_steps // 2)


def to_dtype(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> list[tuple[nn.Parameter, Tensor]]:
    """Round parameters to dtype in place; returns those that changed, with their exact values. As DeepSpeed does itself,
    but for the parameters that ZeRO-3 splits late, after its check of dtypes.
    """
    changed = []
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.dtype != dtype and not hasattr(parameter, "ds_id"):
            changed.append((parameter, parameter.detach().clone()))
            parameter.data = parameter.data.to(dtype)
    return changed


def plain_masters(optimizer) -> dict[int, Tensor]:
    """id of a 16-bit parameter -> its float32 master, in DeepSpeed's optimizers without ZeRO; {} for all others."""
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


def trained_weights(engine, model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter of a model inside the engine, whole and in float32, by its name in model.named_parameters():
    what the optimizer moves, not its copy rounded to 16 bits. All processes call it.
    """
    import deepspeed

    masters = plain_masters(engine.optimizer)
    weights = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in masters:
            found = masters[id(parameter)]
        elif hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            found = deepspeed.utils.safe_get_full_fp32_param(parameter)
        else:
            found = parameter
        weights[name] = found.detach().to(torch.float32, copy=True)
    return weights


def build_frozen(
    model: nn.Module, *, stage: int, offload: bool, dtype: torch.dtype, device: torch.device, world_size: int
):
    """A model that is only evaluated: on the device as it is, or sharded by an engine under stage 3 or in host memory (offload)."""
    import deepspeed

    model.eval().requires_grad_(False)
    to_dtype(model.parameters(), dtype)  # a prefix too: its twin in the engine that trains is rounded
    if offload:
        stage = 3   # the only stage whose weights may live on the host
    if stage != 3:
        return model.to(device)
    skeleton = copy_structure(model)
    engine, *_ = deepspeed.initialize(
        model=model, config=get_eval_ds_config(offload, dtype, stage, world_size=world_size)
    )
    keep_skeleton(engine, skeleton)
    engine.module.eval()
    return engine


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


def has_overflow(optimizer) -> bool:
    """Whether accumulated gradients hold an infinity or NaN on any process: what DeepSpeed's optimizers ask in step()."""
    checker = getattr(optimizer, "overflow_checker", None)  # ZeRO-0
    return checker.check() if checker else optimizer.has_overflow(getattr(optimizer, "partition_gradients", True))


@contextmanager
def as_if_overflowed(optimizer) -> Iterator[None]:
    """In here optimizer.step() drops its gradients as after an overflow, and leaves the loss scale alone."""
    checker = getattr(optimizer, "overflow_checker", optimizer)
    before = vars(checker).get("has_overflow")  # of SaturationWatch
    checker.has_overflow = lambda *_, **__: True
    optimizer._update_scale = lambda *_, **__: None
    try:
        yield
    finally:
        del checker.has_overflow, optimizer._update_scale
        if before:
            checker.has_overflow = before


def optimizer_figures(engine) -> dict[str, float]:
    """Learning rate, and the norm of the last global gradient before clipping.

    Under ZeRO-0 in float32 the engine does not know the norm; it is left out then.
    """
    norm = gradient_norm(engine)
    return {"lr": engine.get_lr()[0]} | ({} if norm is None else {"grad_norm": float(norm)})


def copy_structure(model: nn.Module) -> nn.Module:
    """The same modules with empty parameters and buffers on the meta device; ties are kept, weights are not copied.

    Buffers too: those of quantised layers are the model. whole_model puts the engine's own in.

    Must be called before deepspeed.initialize: its hooks would be copied too.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        memo[id(parameter)] = nn.Parameter(
            torch.empty(shape, dtype=parameter.dtype, device="meta"), requires_grad=False
        )
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def keep_skeleton(engine, skeleton: nn.Module | None) -> None:
    """Remember it beside the engine's modules, not among them: it is no part of the network, and DeepSpeed before 0.15
    does not find an attribute that is a module.
    """
    engine.__dict__["plain_skeleton"] = skeleton


@contextmanager
def whole_model(engine, device: torch.device | None = None, keep: bool = True) -> Iterator[nn.Module | None]:
    """The trained module with whole weights: the module itself, or under ZeRO-3 a plain copy gathered once.

    All processes must enter and leave together. keep: this process wants the copy (rollouts: all of them, saving: those
    that write); under ZeRO-3 the others get None. It carries no DeepSpeed hooks, so nothing is gathered per token.
    """
    if getattr(engine, "plain_skeleton", None) is None:
        yield getattr(engine, "module", engine)  # a frozen model may be no engine
        return
    import deepspeed

    target = device or engine.device
    copied: dict[int, nn.Parameter] = {}
    plain = engine.plain_skeleton
    slots = dict(plain.named_parameters(remove_duplicate=False))
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if id(parameter) in copied:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            data = parameter.detach().to(target, copy=True) if keep else None
        copied[id(slots[name])] = nn.Parameter(data, requires_grad=False) if keep else None
    if keep:
        buffers = dict(engine.module.named_buffers(remove_duplicate=False))
        fill(plain, copied, {name: value.to(target) for name, value in buffers.items()})
        plain.eval()
    yield plain if keep else None
    if keep:
        empty = {id(parameter): placeholder(parameter) for parameter in plain.parameters()}
        fill(plain, empty, {})


def placeholder(parameter: nn.Parameter) -> nn.Parameter:
    """An empty parameter of the same shape on the meta device."""
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def fill(model: nn.Module, parameters: dict[int, nn.Parameter], buffers: dict[str, Tensor]) -> None:
    """Put the given parameters (by id of the one they replace) and buffers (by name) into the modules, ties included."""
    for prefix, module in model.named_modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in parameters:
                module._parameters[name] = parameters[id(old)]
        for name in list(module._buffers):
            full = f"{prefix}.{name}" if prefix else name
            if full in buffers:
                module._buffers[name] = buffers[full]
