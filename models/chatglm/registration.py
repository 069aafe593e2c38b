"""Tell transformers' Auto classes about ChatGLM. `import models` does it; no remote code is asked for."""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PretrainedConfig

from errors import UserError

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
BESIDE = ("tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json")


class AnyChatGLMConfig(PretrainedConfig):
    """Both families call themselves "chatglm": the fields of a config.json say which one it is."""

    model_type = "chatglm"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return a ChatGLMConfig or a ChatGLM2Config. Raises UserError for the fields of neither."""
        try:
            return chatglm_config_class(config_dict).from_dict(config_dict, **kwargs)
        except ValueError as error:
            raise UserError(str(error)) from error


def chatglm_config_class(config: dict[str, Any]) -> type[PretrainedConfig]:
    """Return the class that reads a config.json of type "chatglm". Raises UserError for a release that is not known here."""
    from models.chatglm.configuration_chatglm import ChatGLM2Config, ChatGLMConfig

    register_networks()  # they take as long to import as all the rest, and no Auto class asks for one before
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

        from models.chatglm import tokenization_chatglm, tokenization_chatglm2
        from models.chatglm.tokenizer_base import TokenizerFilesError

        path = str(pretrained_model_name_or_path)
        where = {name: options[name] for name in HUB if name in options}
        where["_raise_exceptions_for_missing_entries"] = False
        for own_class in (tokenization_chatglm.ChatGLMTokenizer, tokenization_chatglm2.ChatGLMTokenizer):
            file = cached_file(path, own_class.vocab_files_names["vocab_file"], **where)
            if file is None:
                continue
            for name in BESIDE:  # from the hub into the same folder; the generation's class reads it from there
                cached_file(path, name, **where)
            kept = {name: value for name, value in options.items() if name not in HUB}
            own_class.register_for_auto_class()  # as for the networks
            try:
                return own_class.from_pretrained(str(Path(file).parent), *inputs, **kept)
            except TokenizerFilesError as error:
                raise UserError(str(error)) from error
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
    """Register the networks, once. AutoModel gives the language model, as the published auto_map has it.

    register_for_auto_class: a save copies the file of the class, and the files beside it that it imports, into the folder.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    from models.chatglm import modeling_chatglm, modeling_chatglm2
    from models.chatglm.configuration_chatglm import ChatGLM2Config, ChatGLMConfig

    for config, own in ((ChatGLMConfig, modeling_chatglm), (ChatGLM2Config, modeling_chatglm2)):
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
            auto_class.register(config, own.ChatGLMForConditionalGeneration)
        AutoModelForSequenceClassification.register(config, own.ChatGLMForSequenceClassification)
        config.register_for_auto_class()
        own.ChatGLMForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
        own.ChatGLMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
