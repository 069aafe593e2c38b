"""Tell transformers' Auto classes about ChatGLM. `import models` does it; no remote code is asked for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from errors import UserError
from models.chatglm.configuration import AnyChatGLMConfig, ChatGLM2Config, ChatGLMConfig

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
BESIDE = ("tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json")


class ChatGLMTokenizer:
    """Opens the tokenizer of ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B; has no instances of its own.

    The published folders say ``"tokenizer_class": "ChatGLMTokenizer"`` in all three, and AutoTokenizer takes the
    registered class of exactly that name.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **options: Any) -> Any:
        """Return the tokenizer in a folder or of a hub id: ice_text.model is ChatGLM-6B's, tokenizer.model that of 2 and 3.

        options as for every tokenizer of transformers. Raises UserError if there is neither file, or a damaged one.
        """
        from transformers.utils import cached_file

        from models.chatglm import tokenizer, tokenizer2

        path = str(pretrained_model_name_or_path)
        where = {name: options[name] for name in HUB if name in options}
        where["_raise_exceptions_for_missing_entries"] = False
        for own_class in (tokenizer.ChatGLMTokenizer, tokenizer2.ChatGLMTokenizer):
            file = cached_file(path, own_class.vocab_files_names["vocab_file"], **where)
            if file is None:
                continue
            for name in BESIDE:  # from the hub into the same folder; the generation's class reads it from there
                cached_file(path, name, **where)
            kept = {name: value for name, value in options.items() if name not in HUB}
            return own_class.from_pretrained(str(Path(file).parent), *inputs, **kept)
        raise UserError(
            f"model {path} has no vocabulary (ice_text.model for ChatGLM-6B, tokenizer.model for ChatGLM2-6B and "
            "ChatGLM3-6B); copy the whole checkpoint."
        )


def register_config(auto: ModuleType) -> None:
    """Register the configurations in transformers' module of AutoConfig. Networks follow with the first configuration."""
    auto.AutoConfig.register("chatglm", AnyChatGLMConfig)


def register_tokenizer(auto: ModuleType) -> None:
    """Register the tokenizers in transformers' module of AutoTokenizer."""
    # Not for the two classes: for a config that it knows, AutoTokenizer runs the folder's code under trust_remote_code=True.
    auto.AutoTokenizer.register(AnyChatGLMConfig, ChatGLMTokenizer)


@cache
def register_networks() -> None:
    """Register the networks, once. AutoModel gives the language model, as the published auto_map has it."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    from models.chatglm import network, network2

    for config, own in ((ChatGLMConfig, network), (ChatGLM2Config, network2)):
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
            auto_class.register(config, own.ChatGLMForConditionalGeneration)
        AutoModelForSequenceClassification.register(config, own.ChatGLMForSequenceClassification)
