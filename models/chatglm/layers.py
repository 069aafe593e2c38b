"""What the networks of both ChatGLM families are made of besides their own arithmetic: loading and starting values,
attention over a bias, the prefix of P-Tuning v2, and a loss that holds no float32 copy of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

# Logits turned into float32 at a time in a loss: 2^25 are 128 MiB.
CHUNK_LOGITS = 2**25


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Loading, saving, starting values, in either family."""

    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["prefix_encoder"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"inv_freq$"]  # noqa: RUF012  (never computed with, see RotaryEmbedding)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it, which makes all weights that it loads trainable: those beside a prefix are not.

        An output matrix that is the embedding's is so also where the checkpoint holds both; transformers 5.0 does not tie
        them then.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if hasattr(model, "lm_head") and model.lm_head.weight is not model.transformer.word_embeddings.weight:
            model.lm_head.weight = model.transformer.word_embeddings.weight
            model.all_tied_weights_keys.update(cls._tied_weights_keys)
        freeze_all_but_prefix(model)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "inv_freq"):
            initialization.copy_(module.inv_freq, module.frequencies())
        elif isinstance(module, PrefixEncoder):  # as wide as the original's, for which published rates are made
            initialization.normal_(module.embedding.weight, mean=0.0, std=1.0)


def visibility_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, 1, query, key] bool -> what is added to attention scores: 0 where visible, else the lowest finite number.

    Finite, because a row that sees nothing (padding) must get some average and not NaN, whose gradients spread.
    """
    lowest = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, lowest)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    implementation: str,
    causal: bool = False,
    dropout: float = 0.0,
    guard: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k / sqrt(dim) + bias) v.

    query [batch, heads, q, dim]; key, value [batch, groups, k, dim], a group serves heads / groups neighbouring heads;
    bias [batch, 1, q, k] in the query's dtype, or None, and then causal says whether query i sees keys up to i only.
    Returns [batch, q, heads * dim], and with the eager implementation the probabilities [batch, heads, q, k] (else None).

    guard: eager divides the query by it before the product and multiplies the float32 scores by it afterwards, which
    keeps a float16 product within range (the layer's number in the original networks); sdpa sums in float32 anyway.
    """
    batch, heads, queries, dim = query.shape
    groups = key.shape[1]
    probs = None
    if implementation == "sdpa" and queries == 1 and groups < heads:
        # The heads of a group become its queries: the cache is read once and not copied heads / groups times.
        query = query.view(batch, groups, heads // groups, dim)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return context.reshape(batch, 1, heads * dim), None
    if groups < heads:
        key, value = (part.repeat_interleave(heads // groups, dim=1) for part in (key, value))
    if implementation == "sdpa":
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=causal and bias is None
        )
    else:
        scores = (query / (dim**0.5 * guard)) @ key.transpose(-1, -2)
        scores = scores.float() * guard
        if bias is not None:
            scores = scores + bias.float()
        elif causal:
            scores = scores.masked_fill(~causal_visibility(queries, key.shape[2], query.device), float("-inf"))
        probs = F.dropout(scores.softmax(dim=-1).to(query.dtype), p=dropout)
        context = probs @ value
    return context.transpose(1, 2).reshape(batch, queries, heads * dim), probs


def causal_visibility(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: the queries are the last places of the keys, and each sees what is not behind it."""
    places = torch.arange(keys, device=device)
    return places <= places[keys - queries :, None]


class PrefixEncoder(nn.Module):
    """P-Tuning v2 (Liu et al. 2021, arXiv 2110.07602): learned keys and values that stand before every text.

    embedding [length, width], width = layers * 2 * groups * dim; with projection an embedding of another width goes
    through Linear, Tanh, Linear. Names and shapes are those of the original networks.
    """

    def __init__(self, length: int, width: int, hidden_size: int, projection_input: int | None, dropout: float) -> None:
        super().__init__()
        self.length = length
        self.embedding = nn.Embedding(length, projection_input or width)
        if projection_input is not None:
            self.trans = nn.Sequential(nn.Linear(projection_input, hidden_size), nn.Tanh(), nn.Linear(hidden_size, width))
        self.projection = projection_input is not None
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: int, layers: int, groups: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Key and value of each layer, [batch, groups, length, dim] in the given dtype; computed in the encoder's own."""
        places = torch.arange(self.length, device=self.embedding.weight.device)
        vectors = self.embedding(places)
        if self.projection:
            vectors = self.trans(vectors)
        vectors = self.dropout(vectors.to(dtype).view(self.length, 2 * layers, groups, -1).expand(batch, -1, -1, -1, -1))
        parts = vectors.permute(2, 0, 3, 1, 4)  # [2 * layers, batch, groups, length, dim]
        return [(parts[2 * layer], parts[2 * layer + 1]) for layer in range(layers)]


def freeze_all_but_prefix(model: nn.Module) -> None:
    """Where the configuration asks for a prefix, only that is trained, and the scalar head of a network that has one."""
    if model.config.pre_seq_len:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("prefix_encoder." in name or name.startswith(("score.", "classifier_head.")))


def language_model_output(
    output: BaseModelOutputWithPast, head: nn.Linear, labels: Tensor | None, logits_to_keep: int | Tensor
) -> CausalLMOutputWithPast:
    """What a language model returns: logits of the kept places (an int n: the last n, 0 = all), and the loss of labels."""
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = head(output.last_hidden_state[:, kept])
    return CausalLMOutputWithPast(
        loss=None if labels is None else next_token_loss(logits, labels),
        logits=logits,
        past_key_values=output.past_key_values,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )


def classifier_output(
    output: BaseModelOutputWithPast, logits: Tensor, labels: Tensor | None, problem_type: str | None
) -> SequenceClassifierOutputWithPast:
    """What a classifier returns: its logits [batch, num_labels], and the loss of labels [batch]."""
    return SequenceClassifierOutputWithPast(
        loss=None if labels is None else classification_loss(logits, labels, problem_type),
        logits=logits,
        past_key_values=output.past_key_values,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, in float32, of labels[:, 1:] under logits[:, :-1]; labels of -100 do not count.

    logits [batch, time, vocab] in any dtype, labels [batch, time]. Logits become float32 a chunk at a time, in the
    backward pass again. Without any label the loss is 0.
    """
    # The last place gets no target instead of being cut off: cut logits would be copied once more.
    targets = F.pad(labels.to(logits.device)[:, 1:], (0, 1), value=-100).flatten()
    flat = logits.flatten(0, 1)
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    sums = [
        checkpoint(_cross_entropy_sum, part, goal, use_reentrant=False, preserve_rng_state=False)
        for part, goal in zip(flat.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(sums).sum() / (targets != -100).sum().clamp(min=1)


def _cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Loss of pooled scores [batch, num_labels] in float32: squared error for one label or "regression", else
    cross-entropy, or binary cross-entropy for "multi_label_classification".
    """
    logits = logits.float()
    if problem_type == "regression" or (problem_type is None and logits.shape[-1] == 1):
        return F.mse_loss(logits.squeeze(-1), labels.float().view_as(logits.squeeze(-1)))
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels.view(-1))


def last_real_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[batch, time, width] -> [batch, width]: the state at the last place whose mask is 1, at the last place without one."""
    if attention_mask is None or attention_mask.dim() != 2:
        return hidden[:, -1]
    places = torch.arange(hidden.shape[1], device=hidden.device)
    last = places.masked_fill(~attention_mask.bool(), -1).amax(dim=1).clamp(min=0)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
