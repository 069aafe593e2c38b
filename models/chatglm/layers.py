"""What the networks of both ChatGLM families share: the pass through the blocks, language model and classifier around it,
attention over a bias, the prefix of P-Tuning v2, and a loss that holds no float32 copy of the logits.

modeling_chatglm.py and modeling_chatglm2.py add what a family does in its own way: blocks, positions, and who sees whom.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

# next_token_loss holds this many float32 logits at a time: 128 MiB.
CHUNK_LOGITS = 2**25
PREFIX_FILE = "prefix_only.bin"

# --- networks ---------------------------------------------------------------------------------------------------------


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Loading, saving, starting values."""

    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["prefix_encoder"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"inv_freq$"]  # noqa: RUF012  (never computed with, see RotaryEmbedding)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it, which makes all weights that it loads trainable: those beside a prefix are not.

        A folder with nothing but a prefix is opened with the weights of the model that its config names. An output matrix
        that is the embedding's is so also where the checkpoint holds both; transformers 5.0 does not tie them then.
        """
        folder, base = pretrained_model_name_or_path, None
        prefix = Path(folder or "") / PREFIX_FILE
        if folder is not None and prefix.is_file():
            config = kwargs.setdefault("config", cls.config_class.from_pretrained(folder))
            base = getattr(config, "base_model_name_or_path", None)
        loaded = super().from_pretrained(base or folder, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if base:
            model.load_state_dict(torch.load(prefix, map_location="cpu", weights_only=True), strict=False)
        if hasattr(model, "lm_head") and model.lm_head.weight is not model.transformer.word_embeddings.weight:
            model.lm_head.weight = model.transformer.word_embeddings.weight
            model.all_tied_weights_keys.update(cls._tied_weights_keys)
        freeze_all_but_prefix(model)
        return loaded

    def post_init(self) -> None:
        """As transformers has it; what stands beside a prefix is frozen."""
        super().post_init()
        freeze_all_but_prefix(self)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "inv_freq"):
            initialization.copy_(module.inv_freq, module.frequencies())
        elif isinstance(module, PrefixEncoder):  # as wide as the original's, for which published rates are made
            initialization.normal_(module.embedding.weight, mean=0.0, std=1.0)


class Trunk(ChatGLMPreTrainedModel):
    """Embedding, blocks, final norm. With config.pre_seq_len all but the prefix encoder is frozen.

    A family has: positions(), following_positions(), rotation(), visible(), and the names that its modules have in
    checkpoints.
    """

    EMBEDDING: ClassVar[str]
    LAYERS: ClassVar[str]
    NORM: ClassVar[str]
    final_state_is_normed = True  # whether the last of hidden_states is last_hidden_state, or what the last block gave

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the layers."""
        return self.get_submodule(self.LAYERS)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the word embeddings."""
        return self.get_submodule(self.EMBEDDING)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        replace_submodule(self, self.EMBEDDING, value)

    def finish(self, prefix_input: int) -> None:
        """End the constructor: the prefix, starting values. prefix_input: width of a projected prefix."""
        config = self.config
        if config.pre_seq_len:
            self.prefix_encoder = PrefixEncoder(
                config.pre_seq_len,
                prefix_width(config),
                config.hidden_size,
                prefix_input if config.prefix_projection else None,
                config.prefix_dropout,
            )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [batch, time] -> last_hidden_state [batch, time, width], after the final norm.

        attention_mask: [batch, cached + time], 1 = real token. position_ids: see positions() of the family. The prefix
        of P-Tuning counts in neither. hidden_states: embeddings, then what each block gives (final_state_is_normed).
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.training and self.blocks[0].gradient_checkpointing:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        stored = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = (config.pre_seq_len or 0) if hasattr(self, "prefix_encoder") else 0
        cached = stored - length if stored else 0
        position_ids = self.positions(input_ids, attention_mask, position_ids, cached, bool(stored))
        hidden = self.get_input_embeddings()(input_ids)
        bias = self.bias(input_ids, attention_mask, cached, length, hidden.dtype)
        rotation = self.rotation(position_ids, hidden.dtype)
        prefixes = [None] * len(self.blocks)
        if length and not stored:
            prefixes = self.prefix_encoder(len(input_ids), len(self.blocks), config.num_groups, hidden.dtype)
        states, attentions = [hidden], []
        for block, prefix in zip(self.blocks, prefixes, strict=True):
            hidden, probs = block(hidden, rotation, bias, past_key_values=past_key_values, prefix=prefix)
            states.append(hidden)
            attentions.append(probs)
        hidden = self.get_submodule(self.NORM)(hidden)
        if self.final_state_is_normed:
            states[-1] = hidden
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def bias(
        self, input_ids: Tensor, attention_mask: Tensor | None, cached: int, prefix: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Return what is added to scores, [batch, 1, time, prefix + cached + time]; None where plain causality says it.

        attention_mask may be just that, [batch, 1, time, cached + time], as with transformers' networks.
        """
        if attention_mask is not None and attention_mask.is_floating_point():
            return F.pad(attention_mask, (prefix, 0))
        visible = self.visible(input_ids, attention_mask, cached, prefix)
        if visible is None:
            return None
        return visibility_bias(F.pad(visible.expand(len(input_ids), -1, -1, -1), (prefix, 0), value=True), dtype)


class LanguageModel(ChatGLMPreTrainedModel, GenerationMixin):
    """A trunk (self.transformer) and an output matrix, named OUTPUT in checkpoints."""

    TRUNK: ClassVar[type[Trunk]]
    OUTPUT: ClassVar[str]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer = self.TRUNK(config)
        self.set_output_embeddings(nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output matrix."""
        return self.get_submodule(self.OUTPUT)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output matrix."""
        replace_submodule(self, self.OUTPUT, value)

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
        """As Trunk.forward -> logits [batch, time, vocab], or of the last logits_to_keep positions (0 = all).

        labels [batch, time], -100 = none: the loss of each against the logits before it, a float32 mean.
        """
        output = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(output.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, labels),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        prompt_position_ids: Tensor | None = None,
        logits_to_keep: int = 1,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the tokens that are not cached yet with their positions; prompt_position_ids: see following_positions()."""
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        cached = max(0, cached - (self.config.pre_seq_len or 0))
        return {
            "input_ids": input_ids[:, cached:],
            "attention_mask": attention_mask,
            "position_ids": self.transformer.following_positions(input_ids, attention_mask, cached, prompt_position_ids),
            "past_key_values": past_key_values,
            "logits_to_keep": logits_to_keep,
            "use_cache": use_cache,
        }


class Classifier(ChatGLMPreTrainedModel):
    """A trunk (self.transformer) and a head (named HEAD) at the last real token. The head is always trained."""

    TRUNK: ClassVar[type[Trunk]]
    HEAD: ClassVar[str]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = self.TRUNK(config)
        has_bias = self.HEAD == "classifier_head"
        setattr(self, self.HEAD, nn.Linear(config.hidden_size, config.num_labels, bias=has_bias))
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """As Trunk.forward -> logits [batch, num_labels]; labels [batch] give transformers' loss for config.problem_type."""
        output = self.transformer(input_ids, attention_mask, position_ids, **kwargs)
        states = output.last_hidden_state
        state = states[:, -1]
        if attention_mask is not None and attention_mask.dim() == 2:
            last = attention_mask.cumsum(dim=1).argmax(dim=1)  # the first place with the highest count
            state = states[torch.arange(len(states), device=states.device), last]
        logits = getattr(self, self.HEAD)(self.dropout(state))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits.float(), config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def replace_submodule(module: nn.Module, name: str, value: nn.Module) -> None:
    """Put another module in the place of a submodule, which may be several names deep."""
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, value)


# --- attention --------------------------------------------------------------------------------------------------------


class RotaryEmbedding(nn.Module):
    """Frequencies 10000^(-2i/dim); rounded: to float16 first, as the original ChatGLM-6B rounds them.

    The buffer is there for its name in checkpoints. What is computed with is made afresh in float32: a buffer follows
    the casts of its module.
    """

    def __init__(self, dim: int, rounded: bool = False) -> None:
        super().__init__()
        self.dim, self.rounded = dim, rounded
        self.register_buffer("inv_freq", self.frequencies())

    def frequencies(self) -> Tensor:
        """Return [dim / 2] float32."""
        exact = 1.0 / 10000 ** (torch.arange(0, self.dim, 2, device="cpu").float() / self.dim)
        return exact.half().float() if self.rounded else exact

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [batch, channels, time] -> cos and sin of the angles, [batch, channels, time, dim / 2]."""
        angles = positions[..., None].float() * self.frequencies().to(positions.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """Attention of a layer. A family has split(), hidden states to query, key and value, and rotate()."""

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        bias: Tensor | None,
        cache: Cache | None,
        prefix: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [batch, time, width]; rotation as RotaryEmbedding gives it; bias None on more than one token: causal."""
        query, key, value = self.split(hidden)
        query, key = self.rotate(query, *rotation), self.rotate(key, *rotation)
        if prefix is not None:
            key, value = torch.cat([prefix[0], key], dim=2), torch.cat([prefix[1], value], dim=2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        context, probs = attend(
            query,
            key,
            value,
            bias,
            implementation=self.config._attn_implementation,
            causal=hidden.shape[1] > 1,
            dropout=getattr(self.config, "attention_dropout", 0.0) if self.training else 0.0,
            guard=self.layer + 1.0,
        )
        return self.dense(context), probs


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
    """Return softmax(q k / sqrt(dim) + bias) v.

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


# --- prefix -----------------------------------------------------------------------------------------------------------


def prefix_width(config: Any) -> int:
    """Return how many numbers a position of a prefix holds: keys and values of all layers and groups."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_layers * config.num_groups * head_dim


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
        """Return key and value of each layer, [batch, groups, length, dim] in the given dtype; computed in the encoder's own."""
        places = torch.arange(self.length, device=self.embedding.weight.device)
        vectors = self.embedding(places)
        if self.projection:
            vectors = self.trans(vectors)
        vectors = self.dropout(vectors.to(dtype).view(self.length, 2 * layers, groups, -1).expand(batch, -1, -1, -1, -1))
        parts = vectors.permute(2, 0, 3, 1, 4)  # [2 * layers, batch, groups, length, dim]
        return [(parts[2 * layer], parts[2 * layer + 1]) for layer in range(layers)]


def freeze_all_but_prefix(model: nn.Module) -> None:
    """Train only the prefix where the configuration asks for one, and the scalar head of a network that has one."""
    if model.config.pre_seq_len:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("prefix_encoder." in name or name.startswith(("score.", "classifier_head.")))


# --- losses -----------------------------------------------------------------------------------------------------------


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy, in float32, of labels[:, 1:] under logits[:, :-1]; labels of -100 do not count.

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
