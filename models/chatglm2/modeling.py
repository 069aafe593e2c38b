"""The network of ChatGLM2-6B and ChatGLM3-6B: a causal decoder with grouped queries, RMSNorm, SwiGLU, and rotary positions
on half of each head.

Where the original differs, on purpose:
- rotary angles are float32 in every dtype, as ChatGLM3 has them; ChatGLM2's are off by 1.0 at position 2047 in float16;
- the classifier reads the last real token, so that padding on the right is right too; the original reads the last place;
- the loss is float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from models.adapters.quantization import replace_with_quantized
from models.chatglm.layers import (
    ChatGLMPreTrainedModel,
    PrefixEncoder,
    attend,
    causal_visibility,
    classifier_output,
    freeze_all_but_prefix,
    language_model_output,
    last_real_token,
    visibility_bias,
)
from models.chatglm2.configuration import ChatGLM2Config


class RotaryEmbedding(nn.Module):
    """Frequencies 10000^(-2i/dim). The buffer is there for its name in checkpoints; what is computed with is made afresh
    in float32, for a buffer follows the casts of its module.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("inv_freq", self.frequencies())

    def frequencies(self) -> Tensor:
        """[dim / 2] float32."""
        return 1.0 / 10000 ** (torch.arange(0, self.dim, 2, device="cpu").float() / self.dim)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [batch, time] -> cos and sin [batch, 1, time, dim / 2]."""
        angles = positions[:, None, :, None].float() * self.frequencies().to(positions.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of the first half of states [batch, heads, time, dim]; the second half stays."""
    turning, resting = states[..., : 2 * cos.shape[-1]], states[..., 2 * cos.shape[-1] :]
    even, odd = turning[..., 0::2], turning[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([turned.flatten(-2), resting], dim=-1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) in float32, times a weight in the weight's dtype."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> the same, in the input's dtype."""
        exact = hidden.float()
        normed = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return (self.weight * normed).to(hidden.dtype)


class SelfAttention(nn.Module):
    """All queries, then the groups' keys, then their values, from one matrix."""

    def __init__(self, config: ChatGLM2Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        queries, groups = (heads * config.kv_channels for heads in (config.num_attention_heads, config.num_groups))
        self.sizes = (queries, groups, groups)
        self.query_key_value = nn.Linear(
            config.hidden_size, sum(self.sizes), bias=config.add_bias_linear or config.add_qkv_bias
        )
        self.dense = nn.Linear(queries, config.hidden_size, bias=config.add_bias_linear)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        bias: Tensor | None,
        cache: Cache | None,
        prefix: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [batch, time, width]; bias None on more than one token: causal."""
        batch, time, _ = hidden.shape
        query, key, value = (
            part.view(batch, time, -1, self.config.kv_channels).transpose(1, 2)
            for part in self.query_key_value(hidden).split(self.sizes, dim=-1)
        )
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        if prefix is not None:
            key, value = torch.cat([prefix[0], key], dim=2), torch.cat([prefix[1], value], dim=2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        context, probs = attend(
            query, key, value, bias,
            implementation=self.config._attn_implementation, causal=time > 1,
            dropout=self.config.attention_dropout if self.training else 0.0, guard=self.layer + 1.0,
        )  # fmt: skip
        return self.dense(context), probs


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): the first half of one matrix gates the second."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        gate, up = self.dense_h_to_4h(hidden).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Block(GradientCheckpointingLayer):
    """h = h + attention(norm(h)); h = h + mlp(norm(h))."""

    def __init__(self, config: ChatGLM2Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)
        self.hidden_dropout = config.hidden_dropout

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        bias: Tensor | None = None,
        past_key_values: Cache | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [batch, time, width] -> the same, and attention probabilities where they were computed."""
        attended, probs = self.self_attention(self.input_layernorm(hidden), rotation, bias, past_key_values, prefix)
        hidden = hidden + F.dropout(attended, self.hidden_dropout, self.training)
        changed = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + F.dropout(changed, self.hidden_dropout, self.training), probs


class Embedding(nn.Module):
    """Holds the word embeddings under the name that checkpoints have."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """Holds the blocks and the final norm under the names that checkpoints have."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, blocks, final norm, and in a language model the output matrix, which the original keeps in here.

    With config.pre_seq_len all but the prefix encoder is frozen.
    """

    config_class = ChatGLM2Config

    def __init__(self, config: ChatGLM2Config, with_output_layer: bool = True) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels // 2)
        self.encoder = Encoder(config)
        if with_output_layer:
            self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        if config.quantization_bit:
            replace_with_quantized(self.encoder.layers, config.quantization_bit)
        if config.pre_seq_len:
            width = 2 * config.num_layers * config.num_groups * config.kv_channels
            self.prefix_encoder = PrefixEncoder(
                config.pre_seq_len,
                width,
                config.hidden_size,
                width if config.prefix_projection else None,
                config.prefix_dropout,
            )
        self.post_init()
        freeze_all_but_prefix(self)

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings."""
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.embedding.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [batch, time] -> last_hidden_state [batch, time, width], after the final norm.

        attention_mask: [batch, cached + time], 1 = real token. position_ids [batch, time]; without them the real tokens
        are counted (the original counts padding too, which shifts all alike and matters to a prefix only). The prefix of
        P-Tuning counts in neither. hidden_states: embeddings and the output of every block, before the final norm.
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.training and self.encoder.layers[0].gradient_checkpointing:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        batch = len(input_ids)
        stored = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = (config.pre_seq_len or 0) if hasattr(self, "prefix_encoder") else 0
        cached = stored - length if stored else 0
        if position_ids is None:
            position_ids = self.counted(input_ids, attention_mask, cached)
        hidden = self.embedding.word_embeddings(input_ids)
        bias = self.bias(input_ids, attention_mask, cached, length, hidden.dtype)
        rotation = self.rotary_pos_emb(position_ids, hidden.dtype)
        layers = self.encoder.layers
        prefixes = [None] * len(layers)
        if length and not stored:
            prefixes = self.prefix_encoder(batch, len(layers), config.num_groups, hidden.dtype)
        states, attentions = [hidden], []
        for block, prefix in zip(layers, prefixes, strict=True):
            hidden, probs = block(hidden, rotation, bias, past_key_values=past_key_values, prefix=prefix)
            states.append(hidden)
            attentions.append(probs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.encoder.final_layernorm(hidden),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    @staticmethod
    def counted(input_ids: Tensor, attention_mask: Tensor | None, cached: int) -> Tensor:
        """[batch, time] positions of tokens behind cached ones, padding not counted."""
        batch, time = input_ids.shape
        if attention_mask is None:
            return torch.arange(cached, cached + time, device=input_ids.device).expand(batch, -1)
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -time:]

    def bias(
        self, input_ids: Tensor, attention_mask: Tensor | None, cached: int, prefix: int, dtype: torch.dtype
    ) -> Tensor | None:
        """What is added to scores, [batch, 1, time, prefix + cached + time]; None where plain causality says it all."""
        batch, time = input_ids.shape
        if attention_mask is None and (time == 1 or not cached + prefix):
            return None
        visible = causal_visibility(time, cached + time, input_ids.device)[None, None]
        if attention_mask is not None:
            if attention_mask.shape != (batch, cached + time):
                raise ValueError(
                    f"attention_mask is {list(attention_mask.shape)}, expected [{batch}, {cached + time}]: {cached} "
                    f"tokens are cached and {time} are given"
                )
            visible = visible & attention_mask.bool()[:, None, None]
            if not cached + prefix:  # the original lets padding see everything, and nobody sees padding
                visible = visible | ~attention_mask.bool()[:, None, :, None]
        return visibility_bias(F.pad(visible.expand(batch, -1, -1, -1), (prefix, 0), value=True), dtype)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """The language model."""

    config_class = ChatGLM2Config

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()
        freeze_all_but_prefix(self)

    def get_output_embeddings(self) -> nn.Linear:
        """The output matrix."""
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output matrix."""
        self.transformer.output_layer = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As ChatGLMModel.forward -> logits [batch, time, vocab], or of the last logits_to_keep places (0 = all).

        labels [batch, time], -100 = none: the loss of each against the logits before it, a float32 mean.
        """
        kwargs.pop("return_dict", None)
        output = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )
        return language_model_output(output, self.transformer.output_layer, labels, logits_to_keep)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 1,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that are not cached yet. Their positions come from the mask: only it has grown with the text."""
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        cached = max(0, cached - (self.config.pre_seq_len or 0))
        fed = input_ids[:, cached:]
        return {
            "input_ids": fed,
            "attention_mask": attention_mask,
            "position_ids": self.transformer.counted(fed, attention_mask, cached),
            "past_key_values": past_key_values,
            "logits_to_keep": logits_to_keep,
            "use_cache": use_cache,
        }


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel):
    """A score at the last real token. The head is always trained."""

    config_class = ChatGLM2Config
    _keys_to_ignore_on_load_unexpected = [r"output_layer\.weight"]  # noqa: RUF012

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config, with_output_layer=False)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.post_init()
        freeze_all_but_prefix(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """As ChatGLMModel.forward -> logits [batch, num_labels]; labels [batch], see classification_loss."""
        kwargs.pop("return_dict", None)
        output = self.transformer(input_ids, attention_mask, position_ids, **kwargs)
        logits = self.classifier_head(self.dropout(last_real_token(output.last_hidden_state, attention_mask)))
        return classifier_output(output, logits, labels, self.config.problem_type)
