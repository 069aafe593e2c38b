"""The configurations of ChatGLM-6B and of ChatGLM2-6B and ChatGLM3-6B, with the fields of the published config.json."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

# Fields that the code of ChatGLM2 knows and no ChatGLM2-6B or ChatGLM3-6B sets otherwise; other values are other networks.
FIXED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "original_rope": True,
    "rope_ratio": 1,
}
# Of both. pre_seq_len, prefix_projection: P-Tuning v2, see layers.PrefixEncoder. prefix_dropout is ours; the originals have
# 0.1 fixed. quantization_bit: 4 or 8 for checkpoints with integer weights, 0 for floating ones.
COMMON = {
    "layernorm_epsilon": 1e-5,
    "use_cache": True,
    "quantization_bit": 0,
    "pre_seq_len": None,
    "prefix_projection": False,
    "prefix_dropout": 0.1,
}


def auto_map(config: str, network: str) -> dict[str, str]:
    """Return the class that each Auto class opens, as "file.class" of a file beside config.json."""
    model = f"{network}.ChatGLMForConditionalGeneration"
    return {
        "AutoConfig": f"configuration_chatglm.{config}",
        "AutoModel": model,
        "AutoModelForCausalLM": model,
        "AutoModelForSeq2SeqLM": model,
        "AutoModelForSequenceClassification": f"{network}.ChatGLMForSequenceClassification",
    }


class _SharedConfig(PretrainedConfig):
    """Fields from a table of defaults (FIELDS), kept where a base class of a later version sets them aside (KEPT)."""

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own form)
    FIELDS: ClassVar[dict[str, Any]] = {}
    KEPT: ClassVar[dict[str, Any]] = {}
    AUTO_MAP: ClassVar[dict[str, str]] = {}

    def __init__(self, **fields: Any) -> None:
        for name, default in self.FIELDS.items():
            setattr(self, name, fields.pop(name, default))
        self.quantization_bit = self.quantization_bit or 0
        fields["auto_map"] = dict(self.AUTO_MAP)  # the published one names files that a save does not write
        kept = {name: fields.pop(name, default) for name, default in self.KEPT.items()}
        super().__init__(**kept, **fields)
        for name, value in kept.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """As the base class, with the dtype under its former name too, which the original code reads."""
        content = super().to_dict()
        return content | {"torch_dtype": content["dtype"]} if content.get("dtype") else content


class ChatGLMConfig(_SharedConfig):
    """ChatGLM-6B v1.1. The defaults are the published model (the original class has the older release's defaults)."""

    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }
    FIELDS: ClassVar[dict[str, Any]] = COMMON | {
        "vocab_size": 130528,
        "hidden_size": 4096,
        "num_layers": 28,
        "num_attention_heads": 32,
        "inner_hidden_size": 16384,
        "max_sequence_length": 2048,
        "mask_token_id": 130000,
        "gmask_token_id": 130001,
        "position_encoding_2d": True,
    }
    KEPT: ClassVar[dict[str, Any]] = {
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "pad_token_id": 3,
        "tie_word_embeddings": True,
    }
    AUTO_MAP: ClassVar[dict[str, str]] = auto_map("ChatGLMConfig", "modeling_chatglm")

    def __init__(self, **fields: Any) -> None:  # a class without one gets a dataclass's from transformers
        super().__init__(**fields)

    @property
    def num_groups(self) -> int:
        """Return key and value heads of a layer: as many as queries have."""
        return self.num_attention_heads


class ChatGLM2Config(_SharedConfig):
    """ChatGLM2-6B; ChatGLM3-6B is the same network with seq_length 8192. The defaults are the published ChatGLM2-6B.

    Raises ValueError for fields of networks that are not these (the long-context releases, GLM-4-9B), and for heads that
    groups do not divide.
    """

    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "head_dim": "kv_channels",
    }
    FIELDS: ClassVar[dict[str, Any]] = COMMON | {
        "num_layers": 28,
        "padded_vocab_size": 65024,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "kv_channels": 128,
        "num_attention_heads": 32,
        "seq_length": 32768,
        "hidden_dropout": 0.0,
        "classifier_dropout": None,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
    }
    KEPT: ClassVar[dict[str, Any]] = {"eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    AUTO_MAP: ClassVar[dict[str, str]] = auto_map("ChatGLM2Config", "modeling_chatglm2")

    def __init__(self, **fields: Any) -> None:
        for name, only in FIXED.items():
            if fields.setdefault(name, only) != only:
                raise ValueError(
                    f"config.json says {name} {fields[name]!r}: this is no ChatGLM2-6B or ChatGLM3-6B ({name} "
                    f"{only!r}), and long-context or later releases of that code (GLM-4-9B) are not supported in this "
                    "form; use the published chatglm2-6b or chatglm3-6b, or the -hf form of GLM-4."
                )
        if fields["rope_ratio"] == 1:
            del fields["rope_ratio"]
        fields.pop("vocab_size", None)  # the original saves padded_vocab_size under this name too
        super().__init__(**fields)
        if self.multi_query_attention and self.num_attention_heads % self.multi_query_group_num:
            raise ValueError(
                f"config.json says num_attention_heads {self.num_attention_heads} and multi_query_group_num "
                f"{self.multi_query_group_num}: every group serves the same number of heads, so the first must be a multiple."
            )

    @property
    def num_groups(self) -> int:
        """Return key and value heads of a layer."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """As the base class, with the vocabulary under its other name too, which the original code reads."""
        return super().to_dict() | {"vocab_size": self.padded_vocab_size}
