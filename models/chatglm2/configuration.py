"""The configuration of ChatGLM2-6B and ChatGLM3-6B, with the fields of the published config.json."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from errors import UserError

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
# Fields that the original code knows and no ChatGLM2-6B or ChatGLM3-6B sets otherwise; other values are other networks.
FIXED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "original_rope": True,
    "rope_ratio": 1,
}


class ChatGLM2Config(PretrainedConfig):
    """ChatGLM2-6B; ChatGLM3-6B is the same network with seq_length 8192. The defaults are the published ChatGLM2-6B.

    pre_seq_len, prefix_projection, prefix_dropout, quantization_bit: as in ChatGLMConfig. Raises UserError for fields
    of networks that are not these (the long-context releases, GLM-4-9B), and for heads that groups do not divide.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own form)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "head_dim": "kv_channels",
    }

    def __init__(
        self,
        num_layers: int = 28,
        padded_vocab_size: int = 65024,
        hidden_size: int = 4096,
        ffn_hidden_size: int = 13696,
        kv_channels: int = 128,
        num_attention_heads: int = 32,
        seq_length: int = 32768,
        hidden_dropout: float = 0.0,
        classifier_dropout: float | None = None,
        attention_dropout: float = 0.0,
        layernorm_epsilon: float = 1e-5,
        add_bias_linear: bool = False,
        add_qkv_bias: bool = True,
        bias_dropout_fusion: bool = True,
        multi_query_attention: bool = True,
        multi_query_group_num: int = 2,
        apply_query_key_layer_scaling: bool = True,
        attention_softmax_in_fp32: bool = True,
        use_cache: bool = True,
        eos_token_id: int | list[int] = 2,
        pad_token_id: int = 0,
        quantization_bit: int = 0,
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        prefix_dropout: float = 0.1,
        tie_word_embeddings: bool = False,
        auto_map: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, only in FIXED.items():
            if kwargs.setdefault(name, only) != only:
                raise UserError(
                    f"config.json says {name} {kwargs[name]!r}: this is no ChatGLM2-6B or ChatGLM3-6B ({name} "
                    f"{only!r}), and long-context or later releases of that code (GLM-4-9B) are not supported in this "
                    "form; use the published chatglm2-6b or chatglm3-6b, or the -hf form of GLM-4."
                )
        kwargs.pop("vocab_size", None)  # the original saves padded_vocab_size under this name too
        if multi_query_attention and num_attention_heads % multi_query_group_num:
            raise UserError(
                f"config.json says num_attention_heads {num_attention_heads} and multi_query_group_num "
                f"{multi_query_group_num}: every group serves the same number of heads, so the first must be a multiple."
            )
        if kwargs["rope_ratio"] == 1:
            del kwargs["rope_ratio"]
        self.num_layers = num_layers
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.kv_channels = kv_channels
        self.num_attention_heads = num_attention_heads
        self.seq_length = seq_length
        self.hidden_dropout = hidden_dropout
        self.classifier_dropout = classifier_dropout
        self.attention_dropout = attention_dropout
        self.layernorm_epsilon = layernorm_epsilon
        self.add_bias_linear = add_bias_linear
        self.add_qkv_bias = add_qkv_bias
        self.bias_dropout_fusion = bias_dropout_fusion
        self.multi_query_attention = multi_query_attention
        self.multi_query_group_num = multi_query_group_num
        self.apply_query_key_layer_scaling = apply_query_key_layer_scaling
        self.attention_softmax_in_fp32 = attention_softmax_in_fp32
        self.use_cache = use_cache
        self.quantization_bit = quantization_bit or 0
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = prefix_projection
        self.prefix_dropout = prefix_dropout
        self.auto_map = auto_map or AUTO_MAP
        super().__init__(
            eos_token_id=eos_token_id, pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs
        )
        # A base class of a later version sets these aside; a config must keep them.
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def num_groups(self) -> int:
        """Key and value heads of a layer."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """As the base class, with dtype and vocabulary under their former names too, which the original code reads."""
        content = super().to_dict() | {"vocab_size": self.padded_vocab_size}
        return content | {"torch_dtype": content["dtype"]} if content.get("dtype") else content
