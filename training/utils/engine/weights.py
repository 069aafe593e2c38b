"""Weights of an engine: whole ones under ZeRO-3, what the optimizer moves, and those that answers are drawn with."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from models.adapters.prefix import own_encoder
from models.device import free_memory
from models.heads import base_model
from training.utils.engine.extras import extras
from training.utils.run.deepspeed_internals import forget_fetch_order, in_shared_buffer, kept_gathered, plain_masters
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")

# Gathered weights and the cache may take this share of the free memory; the rest is for activations and fragments.
SHARE = 0.9


def trained_weights(engine, model: nn.Module) -> dict[str, Tensor]:
    """Return every trained parameter of a model inside the engine, whole and in float32, by its name in model.named_parameters():
    what the optimizer moves, not its copy rounded to 16 bits. All processes call it.
    """
    import deepspeed

    masters = plain_masters(engine.optimizer)
    weights = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exact = masters.get(id(parameter), parameter)
        if hasattr(parameter, "ds_id") or in_shared_buffer(parameter):
            exact = deepspeed.utils.safe_get_full_fp32_param(parameter)
        weights[name] = exact.detach().to(torch.float32, copy=True)
    return weights


def copy_structure(model: nn.Module) -> nn.Module:
    """Copy the modules with empty parameters and buffers on the meta device; ties are kept, weights are not copied.

    Buffers of quantised layers hold the model; whole_model puts the engine's own in. Call it before deepspeed.initialize:
    its hooks would be copied too.
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


@contextmanager
def whole_model(engine, device: torch.device | None = None, keep: bool = True) -> Iterator[nn.Module | None]:
    """Give the trained module with whole weights: the module itself, or under ZeRO-3 a plain copy gathered once.

    All processes must enter and leave together. keep: this process wants the copy (rollouts: all of them, saving: those
    that write); under ZeRO-3 the others get None. It carries no DeepSpeed hooks, so nothing is gathered per token.
    """
    plain = extras(engine).skeleton
    if plain is None:
        yield getattr(engine, "module", engine)  # a frozen model may be no engine
        return
    import deepspeed

    target = device or engine.device
    copied: dict[int, nn.Parameter] = {}
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
        empty = ((id(one), torch.empty_like(one, device="meta")) for one in plain.parameters())
        fill(plain, {key: nn.Parameter(one, requires_grad=False) for key, one in empty}, {})


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


@contextmanager
def generation_model(engine, args, run: Run, *, rows: int, columns: int) -> Iterator[nn.Module]:
    """Give the module that generates, by --generation_weights. All processes enter and leave together.

    rows, columns: the largest rectangle of key-value cache that will stand beside the weights. Without ZeRO-3 there is
    nothing to choose: the module's own weights are whole.
    """
    if extras(engine).skeleton is None:
        whole = nullcontext(getattr(engine, "module", engine))
    elif choice(engine, args, run, rows, columns) == "layerwise":
        whole = layerwise(engine)
    else:
        whole = whole_model(engine)
    with whole as model:
        yield model


def choice(engine, args, run: Run, rows: int, columns: int) -> str:
    """Return gathered or layerwise, the same on all processes for the whole run; said once for each engine."""
    chosen = extras(engine)
    if chosen.generation_weights is None:
        weights = sum(parameter.ds_numel * parameter.element_size() for parameter in engine.module.parameters())
        cache = rows * columns * cache_bytes(base_model(engine.module.model).config, run.dtype)
        free = free_memory()
        kind, reason = args.generation_weights, "as --generation_weights says"
        if kind == "auto":
            fits = free is None or weights + cache <= SHARE * free
            kind = "gathered" if run.maximum(0.0 if fits else 1.0) == 0.0 else "layerwise"
            reason = "which fits" if kind == "gathered" else "too little on this or another process"
        chosen.generation_weights = kind
        have = "unknown" if free is None else f"{free / 1e9:.2f} GB"
        sizes = f"weights {weights / 1e9:.2f} GB and cache {cache / 1e9:.2f} GB a process, free {have}"
        slow = "; every token fetches every layer, which is slow" if kind == "layerwise" else ""
        name = {"gathered": "gathered", "layerwise": "layer-wise fetched"}[kind]
        logger.info("rollouts: %s: %s weights, %s%s", sizes, name, reason, slow)
    return chosen.generation_weights


def cache_bytes(config, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values that a network keeps for one token of one row."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or getattr(config, "num_groups", None) or heads
    return 2 * config.num_hidden_layers * kept * size * dtype.itemsize


@contextmanager
def layerwise(engine) -> Iterator[nn.Module]:
    """Give the engine's own module, whose hooks fetch each layer's weights when it runs and let go of them behind it; what
    DeepSpeed keeps whole, and a prefix, which not every pass reads, are gathered once.
    """
    import deepspeed

    module = engine.module
    prefix = [own_encoder(module.model), getattr(module.model, "prompt_encoder", None)]
    prefix = {id(parameter) for encoder in prefix if encoder is not None for parameter in encoder.parameters()}
    kept = [one for one in module.parameters() if one.ds_persist or id(one) in prefix]
    forget_fetch_order(engine)
    with deepspeed.zero.GatheredParameters(kept), kept_gathered(kept):
        yield module
