"""The weights that answers are drawn with: whole, gathered once a rollout, or left split and fetched layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from models.adapters.prefix import own_encoder
from models.device import empty_cache, free_memory
from models.heads import base_model
from training.utils.engine.zero import whole_model
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")

# What gathered weights and the cache may take of the free memory; the rest is for activations and fragments.
SHARE = 0.9


@contextmanager
def generation_model(engine, args, run: Run, *, rows: int, columns: int) -> Iterator[nn.Module]:
    """The module that generates, by --generation_weights. All processes enter and leave together.

    rows, columns: the largest rectangle of key-value cache that will stand beside the weights. Without ZeRO-3 there is
    nothing to choose: the module's own weights are whole.
    """
    if getattr(engine, "plain_skeleton", None) is None:
        whole = nullcontext(getattr(engine, "module", engine))
    elif choice(engine, args, run, rows, columns) == "layerwise":
        whole = layerwise(engine)
    else:
        whole = whole_model(engine)
    with whole as model:
        yield model
    if args.release_inference_cache:
        empty_cache()


def choice(engine, args, run: Run, rows: int, columns: int) -> str:
    """gathered or layerwise, the same on all processes for the whole run; said once for each engine."""
    if getattr(engine, "generation_weights", None) is None:
        network = base_model(engine.module.model)
        weights = sum(parameter.ds_numel * parameter.element_size() for parameter in engine.module.parameters())
        cache = rows * columns * cache_bytes(network.config, run.dtype)
        free = free_memory()
        kind, reason = args.generation_weights, "as --generation_weights says"
        if kind == "auto":
            room = free is None or weights + cache <= SHARE * free
            kind = "gathered" if run.maximum(0.0 if room else 1.0) == 0.0 else "layerwise"
            reason = "which fits" if kind == "gathered" else "too little on this or another process"
        engine.generation_weights = kind
        slow = "; every token fetches every layer, which is slow" if kind == "layerwise" else ""
        logger.info(
            "rollouts: weights %.2f GB and cache %.2f GB a process, free %s: %s weights, %s%s",
            weights / 1e9, cache / 1e9, "unknown" if free is None else f"{free / 1e9:.2f} GB",
            {"gathered": "gathered", "layerwise": "layer-wise fetched"}[kind], reason, slow,
        )  # fmt: skip
    return engine.generation_weights


def cache_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a network keeps for one token of one row."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or getattr(config, "num_groups", None) or heads
    return 2 * config.num_hidden_layers * kept * size * dtype.itemsize


@contextmanager
def layerwise(engine) -> Iterator[nn.Module]:
    """The engine's own module, whose hooks fetch each layer's weights when it runs and let go of them behind it; what
    DeepSpeed keeps whole, and a prefix, which not every pass reads, are gathered once.
    """
    import deepspeed

    module = engine.module
    prefix = [own_encoder(module.model), getattr(module.model, "prompt_encoder", None)]
    prefix = {id(parameter) for encoder in prefix if encoder is not None for parameter in encoder.parameters()}
    kept = [one for one in module.parameters() if one.ds_persist or id(one) in prefix]
    # Recorded orders of modules, from which DeepSpeed fetches ahead, are those of training passes, and the passes of
    # processes differ here (one reads a prompt, another a token): without a record, fetches depend on the layer alone.
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    try:
        coordinator = offload.get_param_coordinator()
    except TypeError:  # DeepSpeed before 0.15 has one for training and one for evaluation
        coordinator = offload.get_param_coordinator(training=False)
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    with deepspeed.zero.GatheredParameters(kept):
        try:
            for parameter in kept:
                parameter.ds_active_sub_modules.add("generation")  # hooks let go of weights that nobody uses
            yield module
        finally:
            for parameter in kept:
                parameter.ds_active_sub_modules.discard("generation")
