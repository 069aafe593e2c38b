"""DeepSpeed's configurations, and the flags of one model as EngineOptions."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from models.device import has_accelerator
from training.utils.flags.deepspeed_file import read_deepspeed_config
from training.utils.memory.arithmetic import LIVE, PREFETCH, SMALL

# Batch sizes are placeholders of one: a step of ours decides itself which micro-batches make a global batch and where it
# ends, and scales the loss by the number of target tokens in it.
PLACEHOLDERS = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9}
# Small weights stay whole; the window of live ones is wide, or every layer would be fetched twice (1.2e9 is 6B / 5).
STAGE_3 = {
    "stage3_param_persistence_threshold": SMALL,
    "stage3_max_live_parameters": LIVE,
    "stage3_prefetch_bucket_size": PREFETCH,
    "stage3_gather_16bit_weights_on_model_save": False,
}


def precision_config(dtype: torch.dtype) -> dict[str, Any]:
    """Return the fp16/bf16 sections; nothing for float32."""
    if dtype == torch.float16:
        return {"fp16": {"enabled": True, "loss_scale_window": 100, "initial_scale_power": 16}}
    return {"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}


def frozen_config(run, offload: bool) -> dict[str, Any]:
    """Return the configuration of a frozen model's engine. Only stage 3 saves anything without an optimizer."""
    device = "cpu" if offload else "none"
    zero = {"stage": 3, "stage3_param_persistence_threshold": SMALL, "offload_param": {"device": device}}
    return PLACEHOLDERS | {"train_batch_size": run.world_size, "zero_optimization": zero} | precision_config(run.dtype)


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Put the override's keys over the base, section by section."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def setting(key: str) -> str:
    """Return one name for a setting of the ZeRO section. DeepSpeed knows most under several, and refuses two of them together."""
    name = key.removeprefix("stage3_").replace("fp16_weights", "16bit_weights")
    return {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}.get(name, name)


@dataclass(frozen=True)
class EngineOptions:
    """The training of one model: flags by their names."""

    zero_stage: int
    learning_rate: float
    lora_learning_rate: float
    weight_decay: float
    num_warmup_steps: int
    lr_scheduler_type: str
    optimizer: str
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    offload: bool
    offload_optimizer: bool
    offload_param: bool
    deepspeed_config: str | None

    @classmethod
    def of(cls, args, role: str = "") -> EngineOptions:
        """Read the flags; role is "" (steps 1 and 2), "actor" or "critic", whose own flags begin with it."""
        own = {field.name: f"{role}_{field.name}" for field in fields(cls)}
        return cls(**{name: getattr(args, full if hasattr(args, full) else name) for name, full in own.items()})

    def train_config(self, run) -> dict[str, Any]:
        """Return the DeepSpeed configuration of an engine that trains; the content of --deepspeed_config wins key by key."""
        overlaps = self.zero_stage >= 2 and run.dtype != torch.float32
        zero: dict[str, Any] = {"stage": self.zero_stage, "overlap_comm": overlaps}
        on_host = {"device": "cpu", "pin_memory": has_accelerator()}
        if (self.offload or self.offload_optimizer) and self.zero_stage >= 1:
            zero["offload_optimizer"] = on_host
        if self.zero_stage == 3:
            zero |= STAGE_3
            if self.offload or self.offload_param:
                zero["offload_param"] = dict(on_host)
        file = read_deepspeed_config(self.deepspeed_config)
        others = {setting(key) for key in file.get("zero_optimization", {}) if key not in zero}
        zero = {key: value for key, value in zero.items() if setting(key) not in others}
        config = PLACEHOLDERS | {
            "train_batch_size": run.world_size,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            # torch's AdamW is welcome beside the host: which operator serves is decided in build_optimizer.
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": self.max_grad_norm,
        }
        return merge(config | precision_config(run.dtype), file)

    def loading_config(self, run) -> dict[str, Any] | None:
        """Return the configuration that splits the weights while they are read: under stage 3, else None."""
        return self.train_config(run) if self.zero_stage == 3 else None
