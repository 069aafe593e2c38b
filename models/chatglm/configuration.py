"""The configuration of ChatGLM-6B, with the fields of the published config.json."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
}


class ChatGLMConfig(PretrainedConfig):
    """ChatGLM-6B v1.1. The defaults are the published model (the original class has the older release's defaults).

    pre_seq_len, prefix_projection: P-Tuning v2, see models/layers.PrefixEncoder. prefix_dropout is ours; the original
    has 0.1 fixed. quantization_bit: 4 or 8 for checkpoints with integer weights, 0 for floating ones.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own form)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(
        self,
        vocab_size: int = 130528,
        hidden_size: int = 4096,
        num_layers: int = 28,
        num_attention_heads: int = 32,
        inner_hidden_size: int = 16384,
        max_sequence_length: int = 2048,
        layernorm_epsilon: float = 1e-5,
        use_cache: bool = True,
        bos_token_id: int = 130004,
        eos_token_id: int = 130005,
        pad_token_id: int = 3,
        mask_token_id: int = 130000,
        gmask_token_id: int = 130001,
        position_encoding_2d: bool = True,
        quantization_bit: int = 0,
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        prefix_dropout: float = 0.1,
        tie_word_embeddings: bool = True,
        auto_map: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.inner_hidden_size = inner_hidden_size
        self.max_sequence_length = max_sequence_length
        self.layernorm_epsilon = layernorm_epsilon
        self.use_cache = use_cache
        self.mask_token_id = mask_token_id
        self.gmask_token_id = gmask_token_id
        self.position_encoding_2d = position_encoding_2d
        self.quantization_bit = quantization_bit or 0
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = prefix_projection
        self.prefix_dropout = prefix_dropout
        self.auto_map = auto_map or AUTO_MAP
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        # A base class of a later version sets these aside; a config must keep them, the network reads some.
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings

    def to_dict(self) -> dict[str, Any]:
        """As the base class, with the dtype under its former name too, which the original code reads."""
        content = super().to_dict()
        return content | {"torch_dtype": content["dtype"]} if content.get("dtype") else content
