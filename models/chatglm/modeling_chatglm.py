"""The network of ChatGLM-6B v1.1 (Du et al. 2022, arXiv 2103.10360; Zeng et al. 2023, arXiv 2210.02414).

A row is context, [gMASK] (or [MASK]), <sop>, answer. The context is read in both directions, the answer from left to
right, and a token has two positions: the place of the mask token, where the answer belongs, and its place in the answer.

Where the original differs, on purpose:
- an attention mask of two dimensions (1 = real token) hides padding; the original ignores it;
- a row without <sop> counts as context as a whole, as the original tokenizer has it; the original network raises;
- rotary angles are float32 in every dtype; the original rounds them to float16 or bfloat16 (0.4 off at position 2000);
- the loss is float32.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_chatglm import ChatGLMConfig
from .layers import Attention, Classifier, LanguageModel, RotaryEmbedding, Trunk, causal_visibility
from .quantized_linear import replace_with_quantized

# The residual is multiplied by sqrt(2 * 28) in every ChatGLM-6B, whatever its number of layers: the original's blocks
# never learn how many there are.
RESIDUAL = math.sqrt(2 * 28)


class SelfAttention(Attention):
    """Fused q, k, v per head; half of each head is rotated by the first position, half by the second."""

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rotary_emb = RotaryEmbedding(self.head_dim // (2 if config.position_encoding_2d else 1), rounded=True)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def split(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """[batch, time, width] -> query, key, value [batch, heads, time, dim]."""
        batch, time, _ = hidden.shape
        fused = self.query_key_value(hidden).view(batch, time, self.heads, 3 * self.head_dim).transpose(1, 2)
        return fused.split(self.head_dim, dim=-1)

    @staticmethod
    def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the pairs (i, i + size/2) in each part of a head by the angles of its own channel."""
        turned = []
        for channel, part in enumerate(states.chunk(cos.shape[1], dim=-1)):
            first, second = part.chunk(2, dim=-1)
            c, s = cos[:, channel : channel + 1], sin[:, channel : channel + 1]
            turned += [first * c - second * s, second * c + first * s]
        return torch.cat(turned, dim=-1)


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), Linear."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden), approximate="tanh"))


class Block(GradientCheckpointingLayer):
    """x = norm(h); h = a x + attention(x); y = norm(h); h = a y + mlp(y): the residual carries what the norm gives."""

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        bias: Tensor | None = None,
        past_key_values: Cache | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [batch, time, width] -> the same, and attention probabilities where they were computed."""
        normed = self.input_layernorm(hidden)
        attended, probs = self.attention(normed, rotation, bias, past_key_values, prefix)
        normed = self.post_attention_layernorm(RESIDUAL * normed + attended)
        return RESIDUAL * normed + self.mlp(normed), probs


class ChatGLMModel(Trunk):
    """Embedding, blocks, final norm."""

    config_class = ChatGLMConfig
    EMBEDDING, LAYERS, NORM = "word_embeddings", "layers", "final_layernorm"

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        if config.quantization_bit:
            replace_with_quantized(self.layers, config.quantization_bit)
        self.finish(prefix_input=config.hidden_size)

    def context_lengths(self, input_ids: Tensor) -> Tensor:
        """[batch, time] -> [batch]: tokens before the first <sop>, padding on the left included; all without a <sop>."""
        starts = input_ids == self.config.bos_token_id
        return torch.where(starts.any(dim=1), starts.int().argmax(dim=1), input_ids.shape[1])

    def position_ids_for(self, input_ids: Tensor, attention_mask: Tensor | None = None, room: int = 0) -> Tensor:
        """[batch, time] -> [batch, 2, time + room] positions of a text from its beginning; room: tokens still to come.

        First channel: the place in the context, from <sop> on the place of the mask token ([gMASK] if the row has one,
        else [MASK], the first of them). Second: 0 in the context, then 1, 2, 3, ... from <sop> on. Places are counted from
        the first real token of attention_mask [batch, time]; without it padding counts, which shifts all places alike and
        matters to a prefix only. Raises ValueError for a row without a mask token: it was cut off.
        """
        time, config = input_ids.shape[1], self.config
        places = torch.arange(time + room, device=input_ids.device)
        whole, short = input_ids == config.gmask_token_id, input_ids == config.mask_token_id
        marks = torch.where(whole.any(dim=1, keepdim=True), whole, short)
        found = marks.any(dim=1)
        if not bool(found.all()):
            row = int((~found).nonzero()[0])
            raise ValueError(
                f"row {row} of the batch has neither [gMASK] ({config.gmask_token_id}) nor [MASK] "
                f"({config.mask_token_id}); a prompt must end in [gMASK] <sop>, cut it at its beginning instead"
            )
        context = self.context_lengths(input_ids)[:, None]
        mask_places = marks.int().argmax(dim=1, keepdim=True)
        if not config.position_encoding_2d:
            gmask = whole.any(dim=1, keepdim=True)
            return torch.where((places < context) | gmask, places, mask_places)
        first = torch.where(places < context, places, mask_places)
        if attention_mask is not None:
            padding = (attention_mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
            first = (first - padding).clamp(min=0)
        return torch.stack([first, (places - context + 1).clamp(min=0)], dim=1)

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cached: int, behind_cache: bool
    ) -> Tensor:
        """Return [batch, 2, time], those given or position_ids_for(). Raises ValueError behind a cache without any."""
        if position_ids is not None:
            return position_ids.view(len(input_ids), -1, input_ids.shape[1])
        if behind_cache:
            raise ValueError("tokens behind a cache need position_ids [batch, 2, time]; see position_ids_for(room=…)")
        flat = attention_mask is not None and attention_mask.dim() == 2
        return self.position_ids_for(input_ids, attention_mask if flat else None)

    def following_positions(
        self, input_ids: Tensor, attention_mask: Tensor | None, cached: int, prompt_position_ids: Tensor | None
    ) -> Tensor:
        """Return [batch, 2, time - cached]; prompt_position_ids [batch, 2, prompt]: those of the tokens first given."""
        if prompt_position_ids is None:
            return self.position_ids_for(input_ids, attention_mask)[..., cached:]
        further = input_ids.shape[1] - prompt_position_ids.shape[-1]
        steps = torch.arange(1, further + 1, device=input_ids.device)
        last = prompt_position_ids[..., -1:]
        return torch.cat([prompt_position_ids, last + torch.stack([0 * steps, steps])], dim=-1)[..., cached:]

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the angles, the same in all layers."""
        return self.layers[0].attention.rotary_emb(position_ids, dtype)

    def visible(self, input_ids: Tensor, attention_mask: Tensor | None, cached: int, prefix: int) -> Tensor | None:
        """Return who sees whom, bool [batch or 1, 1, time, cached + time]; None where everything is visible.

        attention_mask may also be what the original tokenizer makes, bool [batch, 1, time, cached + time], True = hidden.
        Else the context is visible to all of a row, what is cached too, and the rest is causal.
        """
        time = input_ids.shape[1]
        if attention_mask is not None and attention_mask.dim() == 4:
            return ~attention_mask.bool()
        if time == 1 and attention_mask is None:
            return None
        visible = causal_visibility(time, cached + time, input_ids.device)[None, None]
        if not cached:
            places = torch.arange(time, device=input_ids.device)
            visible = visible | (places < self.context_lengths(input_ids)[:, None])[:, None, None]
        return visible if attention_mask is None else visible & attention_mask.bool()[:, None, None]


class ChatGLMForConditionalGeneration(LanguageModel):
    """The language model; the output matrix is the embedding's."""

    config_class = ChatGLMConfig
    TRUNK, OUTPUT = ChatGLMModel, "lm_head"
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; attention_mask and position_ids may also be those of the original tokenizer.

        generate itself knows masks of two dimensions and positions of one channel only.
        """
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:  # the last token sees all that is real
            kwargs["attention_mask"] = (~mask[:, 0, -1].bool()).long()
        if kwargs.get("position_ids") is not None:
            kwargs["prompt_position_ids"] = kwargs.pop("position_ids")
        return super().generate(*args, **kwargs)


class ChatGLMForSequenceClassification(Classifier):
    """A score at the last real token; there is no such class in the original."""

    config_class = ChatGLMConfig
    TRUNK, HEAD = ChatGLMModel, "score"
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]  # noqa: RUF012
