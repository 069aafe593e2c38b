"""Tells transformers' Auto classes about ChatGLM. `import models` does it; no remote code is asked for."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)

from errors import UserError
from models.chatglm import modeling as chatglm
from models.chatglm.auto_tokenizer import ChatGLMTokenizer
from models.chatglm.configuration import ChatGLMConfig
from models.chatglm2 import modeling as chatglm2
from models.chatglm2.configuration import ChatGLM2Config


class AnyChatGLMConfig(PretrainedConfig):
    """Both families call themselves "chatglm": the fields of a config.json say which one it is."""

    model_type = "chatglm"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A ChatGLMConfig or a ChatGLM2Config. Raises UserError for the fields of neither."""
        return chatglm_config_class(config_dict).from_dict(config_dict, **kwargs)


def chatglm_config_class(config: dict[str, Any]) -> type[PretrainedConfig]:
    """Which class reads a config.json of type "chatglm". UserError for a release that is not known here."""
    if "inner_hidden_size" in config:
        if config.get("vocab_size") == 150528:
            raise UserError(
                "config.json says vocab_size 150528: a ChatGLM-6B from before 2023-04-06, with image tokens in its "
                "vocabulary; use the release v1.1 (vocab_size 130528)."
            )
        return ChatGLMConfig
    if "padded_vocab_size" in config and "ffn_hidden_size" in config:
        return ChatGLM2Config
    raise UserError(
        'config.json has model_type "chatglm" and neither inner_hidden_size (ChatGLM-6B) nor padded_vocab_size and '
        "ffn_hidden_size (ChatGLM2-6B, ChatGLM3-6B): a release that is not known here; use one of these three."
    )


def register() -> None:
    """Register configurations, networks and tokenizers. AutoModel gives the language model, as the published auto_map has it."""
    AutoConfig.register("chatglm", AnyChatGLMConfig)
    for config, network in ((ChatGLMConfig, chatglm), (ChatGLM2Config, chatglm2)):
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
            auto_class.register(config, network.ChatGLMForConditionalGeneration)
        AutoModelForSequenceClassification.register(config, network.ChatGLMForSequenceClassification)
    # Not for the two classes: for a config that it knows, AutoTokenizer runs the folder's code under trust_remote_code=True.
    AutoTokenizer.register(AnyChatGLMConfig, ChatGLMTokenizer)
