"""One pass of LLaMA-shaped networks for answers: transformers' weights and linear layers, with LoRA and whatever else is in
them, and the same arithmetic to the last bit in float32, without the modules around. With few rows those cost as much as the
arithmetic: LLaMA of 4 layers x 192, one CPU core, a pass over the next token of 1, 4 and 16 rows: 4.9, 6.8 and 9.6 ms with the
modules, 4.2, 5.2 and 7.9 ms here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def runs(network: nn.Module) -> bool:
    """Return True for a network that next_logits() computes; whoever hooks the whole network, as ZeRO-3, wants its own forward."""
    config = getattr(network, "config", None)
    known = getattr(config, "model_type", None) in MODEL_TYPES and type(network).__name__.endswith("ForCausalLM")
    return known and config._attn_implementation == "sdpa" and not (network._forward_pre_hooks or network._forward_hooks)


def next_logits(network: Any, ids: Tensor, positions: Tensor, seen: Tensor, cache: Any) -> Tensor:
    """Return the logits [batch, vocab] of the token behind ids [batch, n], and put the keys and values of ids into the cache.

    positions [batch, n]. seen [batch, columns with these] is 1 on the columns of the cache that are the row's own.
    """
    decoder = network.model
    hidden = decoder.embed_tokens(ids)
    cos, sin = (part[:, :, None] for part in decoder.rotary_emb(hidden, position_ids=positions))
    mask = visible(seen, ids.shape[1])
    for layer in decoder.layers:
        hidden = hidden + attend(layer.self_attn, normed(layer.input_layernorm, hidden), cos, sin, mask, cache)
        inner, mlp = normed(layer.post_attention_layernorm, hidden), layer.mlp
        hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inner)) * mlp.up_proj(inner))
    return network.lm_head(normed(decoder.norm, hidden[:, -1]))


def visible(seen: Tensor, length: int) -> Tensor:
    """Return which columns each of the last ``length`` tokens sees: [batch, columns] -> [batch, 1, length, columns] bool."""
    columns = seen.shape[1]
    mask = seen.bool()[:, None, None]
    if length == 1:
        return mask
    place = torch.arange(columns, device=seen.device)
    asking = place[columns - length :, None]
    return (mask & (place <= asking)) | (place == asking)  # padding sees itself: a row that sees nothing would give NaN


def attend(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Return the output of an attention layer, whose keys and values go into the cache."""
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    query, key = attention.q_proj(hidden).view(shape), attention.k_proj(hidden).view(shape)
    if hasattr(attention, "q_norm"):
        query, key = normed(attention.q_norm, query), normed(attention.k_norm, key)
    query, key = turned(query, cos, sin).transpose(1, 2), turned(key, cos, sin).transpose(1, 2)
    keys, values = cache.update(key, attention.v_proj(hidden).view(shape).transpose(1, 2), attention.layer_idx)
    grouped = query.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(query, keys, values, mask, scale=attention.scaling, enable_gqa=grouped)
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (Su et al. 2021, arXiv 2104.09864) to states [batch, n, heads, dim]; cos, sin [batch, n, 1, dim]."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def normed(norm: Any, states: Tensor) -> Tensor:
    """Apply the root mean square norm of a module."""
    return F.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)
