"""One pass of LLaMA-shaped networks for answers: transformers' weights and linear layers, with LoRA and whatever else is in
them, and the same arithmetic to the last bit in float32, without the modules around. With few rows those cost as much as the
arithmetic: LLaMA of 4 layers x 192, one CPU core, a pass over the next token of 1, 4 and 16 rows: 4.9, 6.8 and 9.6 ms with the
modules, 4.2, 5.2 and 7.9 ms here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def runs(network: nn.Module) -> bool:
    """Return True for a network that next_logits() computes; hooks of the whole network, as of ZeRO-3, need its own forward."""
    config = getattr(network, "config", None)
    known = getattr(config, "model_type", None) in MODEL_TYPES and type(network).__name__.endswith("ForCausalLM")
    return known and config._attn_implementation == "sdpa" and not (network._forward_pre_hooks or network._forward_hooks)


class Reading(NamedTuple):
    """Tokens of some rows that the network reads next.

    ids, positions [batch, n]. seen [batch, columns with these] is 1 on the columns of the cache that are the row's own.
    """

    ids: Tensor
    positions: Tensor
    seen: Tensor
    cache: Any


def next_logits(network: Any, readings: Sequence[Reading]) -> Sequence[Tensor]:
    """Return the logits [batch, vocab] of the token behind the ids of each reading, and put keys and values into its cache.

    The readings share all but the attention: prompts are read in the pass over the next tokens of other answers.
    """
    decoder, sizes = network.model, [one.ids.numel() for one in readings]
    hidden = torch.cat([decoder.embed_tokens(one.ids).flatten(0, 1) for one in readings])
    positions = torch.cat([one.positions.flatten() for one in readings])[None]
    cos, sin = (part[0, :, None] for part in decoder.rotary_emb(hidden, position_ids=positions))
    masks = [visible(one.seen, one.ids.shape[1], hidden.dtype) for one in readings]
    for layer in decoder.layers:
        heads = turned_heads(layer.self_attn, normed(layer.input_layernorm, hidden), cos, sin)
        parts = zip(readings, masks, *(states.split(sizes) for states in heads), strict=True)
        hidden = hidden + layer.self_attn.o_proj(torch.cat([attend(layer.self_attn, *part) for part in parts]))
        inner, mlp = normed(layer.post_attention_layernorm, hidden), layer.mlp
        hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inner)) * mlp.up_proj(inner))
    last = [part[one.ids.shape[1] - 1 :: one.ids.shape[1]] for one, part in zip(readings, hidden.split(sizes), strict=True)]
    return network.lm_head(normed(decoder.norm, torch.cat(last))).split([len(one.ids) for one in readings])


def visible(seen: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of the last ``length`` tokens, 0 on columns that they see and -inf on others:
    [batch, columns] -> [batch, 1, length, columns]. Attention would make the same of a boolean mask in every layer.
    """
    mask, columns = seen.bool()[:, None, None], seen.shape[1]
    if length > 1:
        place = torch.arange(columns, device=seen.device)
        asking = place[columns - length :, None]
        mask = (mask & (place <= asking)) | (place == asking)  # padding sees itself: a row that sees nothing would give NaN
    return torch.zeros(mask.shape, dtype=dtype, device=seen.device).masked_fill_(~mask, float("-inf"))


def turned_heads(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, [tokens, heads, dim], of hidden [tokens, width]; the first two with their positions."""
    shape = (len(hidden), -1, attention.head_dim)
    query, key = attention.q_proj(hidden).view(shape), attention.k_proj(hidden).view(shape)
    if hasattr(attention, "q_norm"):
        query, key = normed(attention.q_norm, query), normed(attention.k_norm, key)
    return turned(query, cos, sin), turned(key, cos, sin), attention.v_proj(hidden).view(shape)


def attend(attention: Any, reading: Reading, mask: Tensor, *heads: Tensor) -> Tensor:
    """Return what each token of a reading attends to, [tokens, width], and put its keys and values into the cache."""
    query, key, value = (states.view(*reading.ids.shape, *states.shape[1:]).transpose(1, 2) for states in heads)
    keys, values = reading.cache.update(key, value, attention.layer_idx)
    grouped = query.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(query, keys, values, mask, scale=attention.scaling, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(reading.ids.numel(), -1)


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (Su et al. 2021, arXiv 2104.09864) to states [tokens, heads, dim]; cos, sin [tokens, 1, dim]."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def normed(norm: Any, states: Tensor) -> Tensor:
    """Apply the root mean square norm of a module."""
    return F.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)
