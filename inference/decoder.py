"""One pass of a network for answers: transformers' weights and linear layers, with LoRA and whatever else is in them, without
the modules around, which with few rows cost as much as the arithmetic. Padding is not computed, and of the last layer only what
the next tokens need. LLaMA of 4 layers x 192, one CPU core, a pass over the next token of 1, 4 and 16 rows: 4.9, 6.8 and 9.6 ms
with the modules, 4.2, 5.2 and 7.9 ms here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.packed_rows import PackedRows

KNOWS_GROUPS = torch.__version__ >= (2, 5)  # scaled_dot_product_attention takes fewer heads of keys than of queries


def runs(network: nn.Module) -> bool:
    """Return True for a network that next_logits() computes; hooks of the whole network, as of ZeRO-3, need its own forward."""
    config = getattr(network, "config", None)
    known = getattr(config, "model_type", None) in FAMILIES and type(network).__name__.endswith(("ForCausalLM", "LMHeadModel"))
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
    states = FAMILIES[network.config.model_type](network.base_model, Tokens(readings, network))
    return network.get_output_embeddings()(states).split([len(one.ids) for one in readings])


class Tokens:
    """The tokens of all readings, one after another without padding. ids, positions [tokens]."""

    def __init__(self, readings: Sequence[Reading], network: Any) -> None:
        self.readings, self.final = readings, network.config.num_hidden_layers - 1
        self.masks = [visible(one.seen, one.ids.shape[1], network.dtype) for one in readings]
        self.packs = [packed(one) for one in readings]
        self.alone = len(readings) == 1  # in most passes; then nothing need be cut and put together
        self.ids, self.positions = (
            self.joined([self.flat(getattr(one, name), pack) for one, pack in zip(readings, self.packs, strict=True)])
            for name in ("ids", "positions")
        )
        self.sizes = [one.ids.numel() if pack is None else len(pack.places) for one, pack in zip(readings, self.packs, strict=True)]

    @staticmethod
    def flat(rows: Tensor, pack: PackedRows | None) -> Tensor:
        """[batch, n, ...] -> [tokens, ...]."""
        return rows.flatten(0, 1) if pack is None else pack.pack(rows)[0]

    def attend(self, layer: int, hidden: Tensor, heads: Sequence[Tensor], scale: float | None) -> tuple[Tensor, Tensor]:
        """Put keys and values of a layer into the caches. Return hidden [tokens, width], and what each token attends to; in the
        last layer both of the last token of each row alone.

        heads: query, key and value, [tokens, heads, dim]. scale: of the scores; None: 1 / sqrt(dim).
        """
        kept, attended = [], []
        cut = ((part,) if self.alone else part.split(self.sizes) for part in (hidden, *heads))
        parts = zip(self.readings, self.masks, self.packs, *cut, strict=True)
        for one, mask, pack, states, *own in parts:
            shape, last = one.ids.shape, layer == self.final and one.ids.shape[1] > 1
            if shape[1] == 1:
                query, key, value = (part.unsqueeze(2) for part in own)
            else:
                rows = (part.view(*shape, *part.shape[1:]) if pack is None else pack.unpack(part[None]) for part in own)
                query, key, value = (part.transpose(1, 2) for part in rows)
            keys, values = one.cache.update(key, value, layer)
            if last:
                query, mask, pack = query[:, :, -1:], mask[:, :, -1:], None
                states = states[one.seen[:, -shape[1] :].sum(dim=1).cumsum(dim=0) - 1]
            if shape[1] == 1 and attends_once(query, keys):
                attended.append(attend_once(query, keys, values, mask, scale))
                kept.append(states)
                continue
            groups = {"enable_gqa": True} if query.shape[1] != keys.shape[1] else {}
            if groups and not KNOWS_GROUPS:
                keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (keys, values))
                groups = {}
            out = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, **groups)
            attended.append(out.flatten(1) if out.shape[2] == 1 else self.flat(out.transpose(1, 2).flatten(2), pack))
            kept.append(states)
        return self.joined(kept), self.joined(attended)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the parts of all readings together."""
        return parts[0] if self.alone else torch.cat(parts)


def stands_by_columns(keys: Tensor) -> bool:
    """Return True for keys [batch, heads, columns, dim] that are in memory as [columns, batch, heads, dim]."""
    return keys.stride(2) > keys.stride(0)


def by_columns(network: Any) -> bool:
    """Return True for a network whose keys had better stand by columns: each belongs to one head of queries."""
    heads = network.config.num_attention_heads
    return getattr(network.config, "num_key_value_heads", heads) == heads


def attends_once(query: Tensor, keys: Tensor) -> bool:
    """Return True where attend_once() is quicker than the fused kernel, for one query a row in several rows."""
    several = len(query) > 1 and keys.device.type == "cpu" and keys.dtype == torch.float32
    return several and (keys.shape[1] < query.shape[1] or stands_by_columns(keys))


def attend_once(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Return what one query a row attends to: query [batch, heads, 1, dim], keys and values [batch, heads, columns, dim], of as
    many heads and by columns, or of fewer heads; mask [batch, 1, 1, columns], added to the scores -> [batch, heads * dim].

    The fused kernel calls the matrix library for each row and head. Products element by element read keys that stand by columns in
    the order of memory: 16 rows x 6 heads x 32 over 24 columns 85 us instead of 190. The queries of a head of keys make a matrix.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if keys.shape[1] < query.shape[1]:
        grouped = (query * scale).reshape(len(query), keys.shape[1], -1, query.shape[-1])
        return ((grouped @ keys.transpose(2, 3) + mask).softmax(dim=-1) @ values).flatten(1)
    keys, values, mask = keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3), mask[:, 0].permute(2, 0, 1)
    scores = (keys * query[:, :, 0]).sum(dim=-1)
    shares = torch.add(mask, scores, alpha=scale).softmax(dim=0)
    return (values * shares[..., None]).sum(dim=0).flatten(1)


def packed(reading: Reading) -> PackedRows | None:
    """Return where the real tokens of a reading stand; None where all are."""
    length = reading.ids.shape[1]
    if length == 1:
        return None
    places = reading.seen[:, -length:].flatten().nonzero().squeeze(1)
    return PackedRows(reading.ids.shape, places) if len(places) < reading.ids.numel() else None


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


def rotation(decoder: Any, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the tokens' rotary positions, [tokens, 1, rotated dimensions], for turned()."""
    cos, sin = (part[0, :, None] for part in decoder.rotary_emb(hidden, position_ids=tokens.positions[None]))
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (Su et al. 2021, arXiv 2104.09864) to the first dimensions of states [tokens, heads, dim]."""
    width = cos.shape[-1]
    if width < states.shape[-1]:
        part, rest = states.tensor_split((width,), dim=-1)
        return torch.cat((turned(part, cos, sin), rest), dim=-1)
    return torch.addcmul(states * cos, states.roll(width // 2, dims=-1), sin)


def normed(norm: Any, states: Tensor) -> Tensor:
    """Apply the root mean square norm of a module: w · x / sqrt(mean(x²) + e). Behind packed_weights() in half as many operations,
    as w · sqrt(n) · x / sqrt(|x|² + n · e) over n dimensions.
    """
    if "scaled" in vars(norm):
        weight, least = norm.scaled
        return (states * weight).div_(torch.hypot(torch.linalg.vector_norm(states, dim=-1, keepdim=True), least))
    return F.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


# --- families: (decoder, tokens) -> the states that the output layer reads, [rows, width] ------------------------------------


def llama(decoder: Any, tokens: Tokens) -> Tensor:
    """LLaMA, Mistral, Qwen2 and Qwen3."""
    hidden = decoder.embed_tokens(tokens.ids)
    cos, sin = rotation(decoder, hidden, tokens)
    for number, layer in enumerate(decoder.layers):
        attention, inner = layer.self_attn, normed(layer.input_layernorm, hidden)
        shape = (len(inner), -1, attention.head_dim)
        query, key = attention.q_proj(inner).view(shape), attention.k_proj(inner).view(shape)
        value = attention.v_proj(inner).view(shape)
        if hasattr(attention, "q_norm"):
            query, key = normed(attention.q_norm, query), normed(attention.k_norm, key)
        count = query.shape[1]
        query, key = turned(torch.cat((query, key), dim=1), cos, sin).split((count, key.shape[1]), dim=1)
        hidden, attended = tokens.attend(number, hidden, (query, key, value), attention.scaling)
        hidden = hidden + attention.o_proj(attended)
        inner, mlp = normed(layer.post_attention_layernorm, hidden), layer.mlp
        hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inner)) * mlp.up_proj(inner))
    return normed(decoder.norm, hidden)


def opt(model: Any, tokens: Tokens) -> Tensor:
    """OPT, whose 350M has its norms behind and projections around the layers."""
    decoder = model.decoder
    hidden = decoder.embed_tokens(tokens.ids)
    if decoder.project_in is not None:
        hidden = decoder.project_in(hidden)
    hidden = hidden + decoder.embed_positions(None, position_ids=tokens.positions)
    for number, layer in enumerate(decoder.layers):
        attention, before = layer.self_attn, layer.do_layer_norm_before
        inner = layer.self_attn_layer_norm(hidden) if before else hidden
        names = ("q_proj", "k_proj", "v_proj")
        heads = [getattr(attention, name)(inner).unflatten(-1, (-1, attention.head_dim)) for name in names]
        hidden, attended = tokens.attend(number, hidden, heads, attention.scaling)
        hidden = hidden + attention.out_proj(attended)
        hidden = hidden if before else layer.self_attn_layer_norm(hidden)
        inner = layer.final_layer_norm(hidden) if before else hidden
        hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(inner)))
        hidden = hidden if before else layer.final_layer_norm(hidden)
    if decoder.final_layer_norm is not None:
        hidden = decoder.final_layer_norm(hidden)
    return hidden if decoder.project_out is None else decoder.project_out(hidden)


def gpt2(decoder: Any, tokens: Tokens) -> Tensor:
    """GPT-2."""
    hidden = decoder.wte(tokens.ids) + decoder.wpe(tokens.positions)
    for number, layer in enumerate(decoder.h):
        attention = layer.attn
        heads = attention.c_attn(layer.ln_1(hidden)).unflatten(-1, (3, -1, attention.head_dim)).unbind(1)
        hidden, attended = tokens.attend(number, hidden, heads, getattr(attention, "scaling", None))  # not in transformers 5.0
        hidden = hidden + attention.c_proj(attended)
        hidden = hidden + layer.mlp(layer.ln_2(hidden))
    return decoder.ln_f(hidden)


def gpt_neox(decoder: Any, tokens: Tokens) -> Tensor:
    """GPT-NeoX."""
    hidden = decoder.embed_in(tokens.ids)
    cos, sin = rotation(decoder, hidden, tokens)
    for number, layer in enumerate(decoder.layers):
        attention = layer.attention
        inner = attention.query_key_value(layer.input_layernorm(hidden)).unflatten(-1, (-1, 3 * attention.head_size))
        query, key, value = inner.chunk(3, dim=-1)
        heads = turned(query, cos, sin), turned(key, cos, sin), value
        hidden, attended = tokens.attend(number, hidden, heads, attention.scaling)
        behind = hidden + attention.dense(attended)
        hidden = behind + layer.mlp(layer.post_attention_layernorm(hidden if layer.use_parallel_residual else behind))
    return decoder.final_layer_norm(hidden)


FAMILIES: dict[str, Callable[[Any, Tokens], Tensor]] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), llama)
FAMILIES |= {"opt": opt, "gpt2": gpt2, "gpt_neox": gpt_neox}
