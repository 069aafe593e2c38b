"""What an engine is told: DeepSpeed's configurations, and the flags of one model as EngineOptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from models.device import has_accelerator
from training.utils.flags.deepspeed_file import read_deepspeed_config
from training.utils.memory.arithmetic import LIVE, PREFETCH, SMALL


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
        zero |= {"stage3_param_persistence_threshold": SMALL, "stage3_max_live_parameters": LIVE}
        zero |= {"stage3_prefetch_bucket_size": PREFETCH, "stage3_gather_16bit_weights_on_model_save": False}
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
        zero["stage3_param_persistence_threshold"] = SMALL
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
