"""The network of ChatGLM2-6B and ChatGLM3-6B: a causal decoder with grouped queries, RMSNorm, SwiGLU, and rotary positions
on half of each head.

Where the original differs, on purpose:
- rotary angles are float32 in every dtype, as ChatGLM3 has them; ChatGLM2's are off by 1.0 at position 2047 in float16;
- the classifier reads the last real token, so that padding on the right is right too; the original reads the last place;
- the loss is float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_chatglm import ChatGLM2Config
from .layers import Attention, Classifier, LanguageModel, RotaryEmbedding, Trunk, causal_visibility, prefix_width
from .quantized_linear import replace_with_quantized


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


class SelfAttention(Attention):
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

    def split(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """[batch, time, width] -> query [batch, heads, time, dim], key and value [batch, groups, time, dim]."""
        batch, time, _ = hidden.shape
        fused = self.query_key_value(hidden).split(self.sizes, dim=-1)
        return tuple(states.view(batch, time, -1, self.config.kv_channels).transpose(1, 2) for states in fused)

    @staticmethod
    def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the pairs (2i, 2i + 1) of the first half of states [batch, heads, time, dim]; the second half stays."""
        turning, resting = states[..., : 2 * cos.shape[-1]], states[..., 2 * cos.shape[-1] :]
        even, odd = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        return torch.cat([turned.flatten(-2), resting], dim=-1)


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


class ChatGLMModel(Trunk):
    """Embedding, blocks, final norm; a language model's output matrix is in here too, as in the original."""

    config_class = ChatGLM2Config
    EMBEDDING, LAYERS, NORM = "embedding.word_embeddings", "encoder.layers", "encoder.final_layernorm"
    final_state_is_normed = False

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        # dicts for the names that checkpoints have
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.padded_vocab_size, config.hidden_size)})
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels // 2)
        layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        if config.quantization_bit:
            replace_with_quantized(layers, config.quantization_bit)
        norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.encoder = nn.ModuleDict({"layers": layers, "final_layernorm": norm})
        self.finish(prefix_input=prefix_width(config))

    @staticmethod
    def counted(input_ids: Tensor, attention_mask: Tensor | None, cached: int) -> Tensor:
        """[batch, time] positions of tokens behind cached ones, padding not counted."""
        batch, time = input_ids.shape
        if attention_mask is None:
            return torch.arange(cached, cached + time, device=input_ids.device).expand(batch, -1)
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -time:]

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cached: int, behind_cache: bool
    ) -> Tensor:
        """Return [batch, time], those given or the real tokens counted.

        The original counts padding too, which shifts all alike and matters to a prefix only.
        """
        return self.counted(input_ids, attention_mask, cached) if position_ids is None else position_ids

    def following_positions(
        self, input_ids: Tensor, attention_mask: Tensor | None, cached: int, prompt_position_ids: Tensor | None
    ) -> Tensor:
        """Return [batch, time - cached], from the mask: only it grows with the text."""
        return self.counted(input_ids[:, cached:], attention_mask, cached)

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the angles."""
        return self.rotary_pos_emb(position_ids[:, None], dtype)

    def visible(self, input_ids: Tensor, attention_mask: Tensor | None, cached: int, prefix: int) -> Tensor | None:
        """Return who sees whom, bool [batch or 1, 1, time, cached + time]; None where plain causality says it all."""
        time = input_ids.shape[1]
        if attention_mask is None and (time == 1 or not cached + prefix):
            return None
        visible = causal_visibility(time, cached + time, input_ids.device)[None, None]
        if attention_mask is None:
            return visible
        visible = visible & attention_mask.bool()[:, None, None]
        if not cached + prefix:  # the original lets padding see everything, and nobody sees padding
            visible = visible | ~attention_mask.bool()[:, None, :, None]
        return visible


class ChatGLMForConditionalGeneration(LanguageModel):
    """The language model."""

    config_class = ChatGLM2Config
    TRUNK, OUTPUT = ChatGLMModel, "transformer.output_layer"


class ChatGLMForSequenceClassification(Classifier):
    """A score at the last real token."""

    config_class = ChatGLM2Config
    TRUNK, HEAD = ChatGLMModel, "classifier_head"
    _keys_to_ignore_on_load_unexpected = [r"output_layer\.weight"]  # noqa: RUF012
