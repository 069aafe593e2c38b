"""The model that steps 1 and 2 train: what its flags allow is checked early, then it is loaded into an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from models.adapters.lora import add_lora
from models.checkpoint_folder import check_context_length, check_quantized_base, gets_prefix, open_checkpoint
from training.utils.engine.zero import EngineOptions, build_engine
from training.utils.run.process_group import Run


def check_trained_model(args: Any) -> None:
    """UserError if --model_name_or_path cannot be trained as the flags ask; no weight is read."""
    prefix = args.prefix_options()
    checkpoint = open_checkpoint(args.model_name_or_path)
    check_context_length(checkpoint, args.max_seq_len, "--max_seq_len", **prefix)
    frozen = bool(args.lora_dim) or gets_prefix(checkpoint, args.output_dir, **prefix)
    check_quantized_base(checkpoint, args.quantization_bit, adapters=frozen)


def trained_engine(
    load: Callable[..., nn.Module], head: Callable[[nn.Module], nn.Module], args: Any, run: Run, tokenizer, total_steps: int
):
    """The engine around head(model), with LoRA or a prefix where the flags ask for them.

    load: load_causal_lm or load_scalar_model; head: TokenLogProbs or TokenScores. total_steps counts optimizer steps.
    """
    options = EngineOptions.of(args)
    model = load(
        args.model_name_or_path,
        dtype=run.dtype,
        attn=run.attention,
        dropout=args.dropout,
        gradient_checkpointing=args.gradient_checkpointing,
        zero3_config=options.loading_config(run.dtype, run.world_size),
        tokenizer=tokenizer,
        quantization_bit=args.quantization_bit,
        seed=args.seed,
        **args.prefix_options(),
    )
    if args.lora_dim:
        model = add_lora(
            model,
            dim=args.lora_dim,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            module_name=args.lora_module_name,
        )
    return build_engine(head(model), options, dtype=run.dtype, total_steps=total_steps, world_size=run.world_size)
