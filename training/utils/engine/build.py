"""Build a model that trains, or one that is only evaluated, from a checkpoint and its flags."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from models.adapters.lora import add_lora
from models.adapters.new_rows import NAME
from models.checkpoint_folder import (
    CheckpointFolder,
    check_context_length,
    check_new_tokens,
    check_quantized_base,
    first_new_row,
    gets_prefix,
    open_checkpoint,
)
from models.device import has_accelerator
from models.heads import TokenLogProbs, TokenScores
from models.load import load_causal_lm, load_scalar_model
from models.weight_files import first_line
from training.utils.engine.configs import EngineOptions, frozen_config
from training.utils.engine.extras import extras
from training.utils.engine.half_precision import watch_saturation
from training.utils.engine.schedule import rate_share
from training.utils.engine.weights import copy_structure
from training.utils.run.deepspeed_internals import keep_all_micro_batches, plain_masters
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")


def check_trained_model(args: Any, checkpoint: CheckpointFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the checkpoint of --model_name_or_path cannot be trained as the flags ask; no weight is read."""
    prefix = args.prefix_options()
    check_context_length(checkpoint, args.max_seq_len, "--max_seq_len", **prefix)
    prefixed = gets_prefix(checkpoint, args.output_dir, **prefix)
    check_quantized_base(checkpoint, args.quantization_bit, adapters=bool(args.lora_dim) or prefixed)
    if prefixed:
        check_new_tokens(checkpoint, tokenizer)


def trained_engine(checkpoint: CheckpointFolder, args, run: Run, tokenizer, steps: int, *, scalar: bool = False):
    """Return the engine around the model of a checkpoint, with LoRA or a prefix where the flags ask for them.

    It gives log-probabilities of tokens or, scalar, a score at every token. steps: optimizer steps of the whole run.
    """
    load, head = (load_scalar_model, TokenScores) if scalar else (load_causal_lm, TokenLogProbs)
    options = EngineOptions.of(args)
    model = load(
        checkpoint,
        dtype=run.dtype,
        attn=run.attention,
        dropout=args.dropout,
        gradient_checkpointing=args.gradient_checkpointing,
        zero3_config=options.loading_config(run),
        tokenizer=tokenizer,
        quantization_bit=args.quantization_bit,
        seed=args.seed,
        **args.prefix_options(),
    )
    if args.lora_dim:
        where = {"dropout": args.lora_dropout, "module_name": args.lora_module_name}
        model = add_lora(model, args.lora_dim, args.lora_alpha, **where, first_new_row=first_new_row(checkpoint, tokenizer))
    return build_engine(head(model), options, run, steps)


def read_in_turn(load: Callable[..., nn.Module], path: str | Path | CheckpointFolder, run: Run, settings: dict[str, Any]):
    """Return load(path, **settings), on the run's device where that is a card.

    Files of the wanted dtype are mapped: the processes of a node share their pages. In another dtype each process makes a
    copy, which a card takes over; they do so one after the other. On a CPU the copy is the model, and split weights
    (zero3_config) are read by all processes together.
    """
    copies = run.device.type != "cpu" and not settings["zero3_config"]
    if copies:
        checkpoint, dtype = open_checkpoint(path), str(settings["dtype"]).removeprefix("torch.")
        copies = bool(settings["quantization_bit"] or checkpoint.adapters) or checkpoint.stored_dtype != dtype
    with run.in_turn(copies):
        model = load(path, **settings)
        return model.to(run.device) if copies else model


def build_engine(model: nn.Module, options: EngineOptions, run: Run, steps: int):
    """Wrap a model for training: optimizer, learning-rate schedule, ZeRO. steps: optimizer steps of the whole run.

    DeepSpeed computes with every parameter in run.dtype. What was float32 under a 16-bit dtype (a prefix) is float32 in the
    optimizer, where it moves: trained_weights.
    """
    import deepspeed

    exact = to_dtype([parameter for parameter in model.parameters() if parameter.requires_grad], run.dtype)
    optimizer = build_optimizer(parameter_groups(model, options), options)
    plan = {"warmup": warmup_steps(options.num_warmup_steps, steps), "total": max(steps, 1)}
    scheduler = LambdaLR(optimizer, lambda step: rate_share(options.lr_scheduler_type, step, **plan))
    skeleton = copy_structure(model) if options.zero_stage == 3 else None
    config = options.train_config(run)
    engine = initialize(model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    extras(engine).skeleton, extras(engine).saturation = skeleton, watch_saturation(engine)
    extras(engine).schedule_steps = steps
    keep_all_micro_batches(engine.optimizer)
    masters = plain_masters(engine.optimizer)
    for parameter, value in exact:
        if id(parameter) in masters:
            masters[id(parameter)].data.copy_(value)
        else:
            deepspeed.utils.safe_set_full_fp32_param(parameter, value.to(engine.device))
    return engine


def initialize(model: nn.Module, **settings: Any):
    """Return DeepSpeed's engine. Buffers keep their dtype: 0.14 rounds them with the weights, and rotary frequencies of 16 bits
    turn far positions wrongly.
    """
    import deepspeed

    buffers = [(module, *item) for module in model.modules() for item in module._buffers.items() if item[1] is not None]
    engine, *_ = deepspeed.initialize(model=model, **settings)
    for module, name, buffer in buffers:
        module._buffers[name] = module._buffers[name].to(buffer.dtype).copy_(buffer)
    return engine


def build_frozen(model: nn.Module, run: Run, *, stage: int, offload: bool):
    """Return a model that is only evaluated: on the device as it is, or split by an engine under stage 3 or on the host."""
    model.eval().requires_grad_(False)
    to_dtype(model.parameters(), run.dtype)  # a prefix too: its twin in the engine that trains is rounded
    if stage != 3 and not offload:  # stage 3 is the only one whose weights may live on the host
        return model.to(run.device)
    skeleton = copy_structure(model)
    engine = initialize(model, config=frozen_config(run, offload))
    extras(engine).skeleton = skeleton
    engine.module.eval()
    return engine


def build_optimizer(groups: list[dict[str, Any]], options: EngineOptions) -> torch.optim.Optimizer:
    """Return AdamW in the best implementation that this machine has; a fallback is logged once with its reason."""
    settings = {"betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon}
    on_host = (options.offload or options.offload_optimizer) and options.zero_stage >= 1 and has_accelerator()
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


def parameter_groups(model: nn.Module, options: EngineOptions) -> list[dict[str, Any]]:
    """Put trainable parameters into up to four groups: LoRA (new rows too) or not, with weight decay (matrices) or without
    (biases, norms).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            groups.setdefault(("lora_" in name or name.endswith(NAME), dimensions >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": options.lora_learning_rate if lora else options.learning_rate,
            "weight_decay": options.weight_decay if decay else 0.0,
        }
        for (lora, decay), parameters in groups.items()
    ]


def warmup_steps(wanted: int, total_steps: int) -> int:
    """Return the steps of warm-up: at most half of the run. A run of one step has none: warm-up begins at rate 0."""
    return min(wanted, total_steps // 2)


def to_dtype(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> list[tuple[nn.Parameter, Tensor]]:
    """Round parameters to dtype in place; return those that changed, with their exact values.

    DeepSpeed does the same, but for the parameters that ZeRO-3 splits late, after its check of dtypes.
    """
    changed = []
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.dtype != dtype and not hasattr(parameter, "ds_id"):
            changed.append((parameter, parameter.detach().clone()))
            parameter.data = parameter.data.to(dtype)
    return changed
