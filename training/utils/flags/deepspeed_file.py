"""What --deepspeed_config brings: read, freed of "auto", and compared with the flags. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError, nearest, refuse

AUTO = "auto"  # of transformers' files: the trainer fills it in, as the flags do here
PRECISION = {"fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}  # section -> --dtype
# Settings of the flags, by their place in the file; {role} is "", or actor_ and critic_ in step 3. A list holds the one value
# that the steps have. Such keys are compared and not passed on: a step makes its optimizer and its schedule itself.
OWNED = {
    "optimizer.type": "optimizer",
    "optimizer.params.lr": "{role}learning_rate",
    "optimizer.params.betas": "adam_beta1 adam_beta2",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "{role}weight_decay",
    "optimizer.params.adam_w_mode": [True],
    "optimizer.params.bias_correction": [True],
    "optimizer.params.amsgrad": [False],
    "scheduler.type": "lr_scheduler_type",
    "scheduler.params.warmup_max_lr": "{role}learning_rate",
    "scheduler.params.warmup_min_lr": [0],
    "scheduler.params.warmup_num_steps": "num_warmup_steps",
    "scheduler.params.warmup_type": ["linear"],
    "scheduler.params.total_num_steps": "max_steps",
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "{micro}",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
FREE = ("optimizer.params.torch_adam", "optimizer.params.fused", "optimizer.legacy_fusion")  # how AdamW is computed
TYPES = {  # in the file -> in the flags; DeepSpeed's Adam decays weights as AdamW does
    "adam": ("auto", "adamw", "fused_adam", "cpu_adam"),
    "adamw": ("auto", "adamw", "fused_adam", "cpu_adam"),
    "warmuplr": ("constant_with_warmup",),
    "warmupdecaylr": ("linear",),
    "warmupcosinelr": ("cosine",),
}
# All that DeepSpeed 0.14 to 0.19 reads; it ignores another key without a word, or ends in a traceback.
KEYS = (
    "activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type "
    "compile compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last "
    "datastates_ckpt disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel flops_profiler "
    "fp16 fp32_allreduce gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor "
    "graph_harvesting hybrid_engine log_level managed_gradient_accumulation memory_breakdown nebula optimizer pipeline "
    "prescale_gradients progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type "
    "sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size "
    "train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb "
    "weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization"
)
ZERO_KEYS = (
    "allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients cpu_offload "
    "cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks "
    "gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights "
    "log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear mics_shard_size "
    "mics_hierarchical_params_gather model_persistence_threshold module_granularity_threshold offload_optimizer "
    "offload_param overlap_comm override_module_apply param_persistence_threshold parameter_alignment "
    "pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients "
    "save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save "
    "stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters stage3_max_reuse_distance "
    "stage3_model_persistence_threshold stage3_module_granularity_threshold stage3_param_persistence_threshold "
    "stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params "
    "use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients "
    "zero_quantized_nontrainable_weights zero_quantized_weights zeropp_loco_param"
)


def read_deepspeed_config(path: str | None) -> dict[str, Any]:
    """Return what --deepspeed_config sets for DeepSpeed, {} for None: neither "auto" nor keys of the flags. Raises UserError
    for a file that cannot be read.
    """
    owned = {place.split(".")[0] for place in OWNED}
    return {key: value for key, value in read_file(path).items() if key not in owned}


def read_file(path: str | None) -> dict[str, Any]:
    """Return the content of --deepspeed_config without what is "auto", {} for None. Raises UserError for a file that cannot be
    read, that has another form, or that holds keys or numbers which do not exist.
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
    for key in ("zero_optimization", "optimizer", "scheduler", *PRECISION):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f'{path}: "{key}" must be an object of DeepSpeed keys, found {json.dumps(config[key])[:40]}.')
    for where, value in places(config):
        refuse(isinstance(value, float) and not math.isfinite(value), f'{path}: "{where}" is {value}; give a finite number.')
    for known, section, inside in ((KEYS, config, ""), (ZERO_KEYS, config.get("zero_optimization", {}), "zero_optimization.")):
        for key in section.keys() - set(known.split()):
            near = nearest(key, known.split())
            hint = f'did you mean "{near}"?' if near else "remove it."
            raise UserError(f'{path}: "{inside}{key}" is no key of DeepSpeed; {hint}')
    return config


def without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section without the keys that are "auto" and without the sections that have nothing else."""
    kept = {key: without_auto(value) if isinstance(value, dict) else value for key, value in section.items()}
    return {key: value for key, value in kept.items() if value not in (AUTO, {})}


def places(section: dict[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a file with the names that lead to it, as in optimizer.params.lr."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from places(value, f"{inside}{key}.")
        else:
            yield f"{inside}{key}", value


def check_owned(args: Any, prefixes: list[str]) -> None:
    """Raise UserError where the file sets what the flags decide, to another value than theirs.

    prefixes: what stands before the names of each model's flags ("", or "actor_" and "critic_").
    """
    path, config = args.deepspeed_config, read_file(args.deepspeed_config)
    for where, value in places({key: config[key] for key in config if any(place.split(".")[0] == key for place in OWNED)}):
        refuse(where not in (*OWNED, *FREE), f'{path}: "{where}" has no flag here; remove it.')
        flag = OWNED.get(where, [value])
        if isinstance(flag, list):
            refuse(value not in flag, f'{path}: "{where}" is {value}, and the steps have {flag[0]} alone; remove it.')
            continue
        micro = "per_device_training_batch_size" if args.section == "ppo" else "per_device_train_batch_size"
        for role in prefixes:
            names = flag.format(role=role, micro=micro).split()
            asked = [getattr(args, name) for name in names]
            said = " ".join(f"--{name} {number}" for name, number in zip(names, asked, strict=True))
            refuse(
                not equal(where, value, asked),
                f'{path}: "{where}" is {value}, and the flags say {said}; remove the key, or give the flag the value you want.',
            )


def equal(where: str, value: Any, asked: list[Any]) -> bool:
    """Return whether a value of the file means the same as the flags."""
    if where.endswith(".type"):
        return asked[0] in TYPES.get(str(value).lower(), ())
    return (value if isinstance(value, list) else [value]) == asked


def check_offload(args: Any) -> None:
    """Raise UserError if the file moves optimizer states to the host and the flags do not, or the other way round.

    The flags choose the optimizer: one for the card would be given states on the host.
    """
    zero = read_file(args.deepspeed_config).get("zero_optimization", {})
    section = zero.get("offload_optimizer")
    device = section.get("device", "none") if isinstance(section, dict) else section
    device = "cpu" if zero.get("cpu_offload") is True else device
    asked = args.offload or args.offload_optimizer
    refuse(
        device is not None and (device != "none") != asked,
        f'{args.deepspeed_config}: "zero_optimization" offloads the optimizer to {device}, and the flags '
        f"{'move it to the host' if asked else 'keep it on the card'}; {'remove the key' if asked else 'add --offload_optimizer'}"
        f"{'' if asked else ', or remove the key'}.",
    )


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
