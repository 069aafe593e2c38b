"""The reference of DPO, and the log-probabilities of policy and reference for a batch of pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.adapters.lora import adapter_disabled
from models.checkpoint_folder import CheckpointFolder
from models.heads import TokenLogProbs
from models.load import load_causal_lm
from training.utils.data.batching import AnswerPairBatch
from training.utils.engine.build import build_frozen, read_in_turn
from training.utils.engine.configs import EngineOptions, frozen_config
from training.utils.loss import sequence_log_probs
from training.utils.run.process_group import Run


def load_reference(args, models: dict[str, CheckpointFolder], tokenizer, run: Run) -> nn.Module | None:
    """Load the frozen reference, on the device or split by ZeRO-3; None where the trained model without its adapter is it.

    It is --ref_model_name_or_path, or the model that the run starts from: without a new prefix of --pre_seq_len, with the
    prefix that its folder or --ptuning_checkpoint holds.
    """
    if args.lora_dim and not args.ref_model_name_or_path:
        return None
    # In host memory from the start, in parts, with --offload_reference_model.
    on_host = frozen_config(run, offload=True) if args.offload_reference_model else None
    options = {
        "dtype": run.dtype,
        "attn": run.attention,
        "dropout": 0.0,
        "zero3_config": on_host or EngineOptions.of(args).loading_config(run),
        "tokenizer": tokenizer,
        "quantization_bit": args.quantization_bit,
        "ptuning_checkpoint": None if args.ref_model_name_or_path else args.ptuning_checkpoint,
        "seed": args.seed,
    }
    model = read_in_turn(load_causal_lm, models.get("reference", models["model"]), run, options)
    return build_frozen(TokenLogProbs(model), run, stage=args.zero_stage, offload=args.offload_reference_model)


def answer_log_probs(model: nn.Module, micro: AnswerPairBatch) -> Tensor:
    """Return log p(answer | prompt), float32 [2 x pairs], chosen answers first. model: TokenLogProbs or its engine."""
    mask = micro.answer_mask[:, 1:]
    log_probs = model(micro.input_ids, micro.attention_mask, target_mask=mask, shared=micro.shared)
    return sequence_log_probs(log_probs, mask)


@torch.no_grad()
def reference_log_probs(engine, reference: nn.Module | None, micro: AnswerPairBatch) -> Tensor:
    """Return the same by the reference, or if that is None by the engine's model without its adapter; no dropout either way."""
    if reference is not None:
        return answer_log_probs(reference, micro)
    training = engine.module.training
    engine.eval()
    with adapter_disabled(engine.module.model):
        log_probs = answer_log_probs(engine, micro)
    engine.train(training)
    return log_probs
