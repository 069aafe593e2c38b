"""What --deepspeed_config brings: read, freed of "auto", and compared with the flags. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from errors import UserError

AUTO = "auto"  # of transformers' files: the trainer fills it in, as the flags do here
# Keys that would contradict what the step itself decides.
OWNED_BY_FLAGS = {
    "optimizer": "--optimizer, --learning_rate",
    "scheduler": "--lr_scheduler_type, --num_warmup_steps",
    "train_batch_size": "--global_batch_size",
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
}
PRECISION = {"fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}  # section -> --dtype


def read_deepspeed_config(path: str | None) -> dict[str, Any]:
    """Return the content of --deepspeed_config without what is "auto", {} for None. Raises UserError for a file that cannot be
    read, that has another form, or that sets a key which a flag owns.
    """
    if not path:
        return {}
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: {error.strerror}; name an existing JSON file.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--deepspeed_config {path} is no text in UTF-8; name a JSON file of DeepSpeed keys.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object of DeepSpeed keys, found {json.dumps(config)[:40]}.")
    config = without_auto(config)
    for key in ("zero_optimization", *PRECISION):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f'{path}: "{key}" must be an object of DeepSpeed keys, found {json.dumps(config[key])[:40]}.')
    for key, flag in OWNED_BY_FLAGS.items():
        if key in config:
            raise UserError(f'{path}: the key "{key}" is set by flags here; remove it and use {flag}.')
    return config


def without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section without the keys that are "auto" and without the sections that have nothing else."""
    kept = {key: without_auto(value) if isinstance(value, dict) else value for key, value in section.items()}
    return {key: value for key, value in kept.items() if value not in (AUTO, {})}


def check_stage(path: str | None, stages: dict[str, int | str]) -> None:
    """UserError if the file asks for another ZeRO stage than the flags, which also rule how weights are loaded and saved.

    stages: what --zero_stage says, by what stands before that name ("", "actor_", "critic_").
    """
    stage = read_deepspeed_config(path).get("zero_optimization", {}).get("stage")
    for prefix, flag in stages.items():
        if stage is not None and stage != flag:
            raise UserError(
                f'{path}: "stage" {stage} contradicts --{prefix}zero_stage {flag}; remove the key and give the stage you want '
                f"by --{prefix}zero_stage."
            )


def check_precision(path: str | None, dtype: str) -> None:
    """UserError if the file switches on another number format than that of the run, or switches that off.

    dtype: fp32, fp16 or bf16.
    """
    config = read_deepspeed_config(path)
    for section, name in PRECISION.items():
        enabled = config.get(section, {}).get("enabled")
        if enabled is not None and bool(enabled) != (name == dtype):
            said = "on" if enabled else "off"
            raise UserError(
                f'{path}: the section "{section}" is switched {said}, and the run computes in {dtype}; remove "enabled" and '
                "choose by --dtype."
            )
