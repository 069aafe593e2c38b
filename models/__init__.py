"""Networks, templates, adapters and devices: what travels with a checkpoint, nothing about training.

Importing this package tells transformers about ChatGLM once transformers' Auto classes are imported: importing them
here would cost every command 5 s of CPU, also those that open no checkpoint.
"""

from types import ModuleType

from wrapt import register_post_import_hook


def _config(auto: ModuleType) -> None:
    from models.chatglm.registration import register_config

    register_config(auto)


def _tokenizer(auto: ModuleType) -> None:
    from models.chatglm.registration import register_tokenizer

    register_tokenizer(auto)


# Each module by itself, with nothing else of transformers imported on the way: they import each other.
register_post_import_hook(_config, "transformers.models.auto.configuration_auto")
register_post_import_hook(_tokenizer, "transformers.models.auto.tokenization_auto")
