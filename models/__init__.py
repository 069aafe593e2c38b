"""Networks, templates, adapters and devices: what travels with a checkpoint, nothing about training.

Importing this package tells transformers about ChatGLM once transformers' Auto classes are imported: importing them
here would cost every command 5 s of CPU, also those that open no checkpoint.
"""

from wrapt import register_post_import_hook

# Each module by itself, with nothing else of transformers imported on the way: they import each other.
register_post_import_hook("models.chatglm.registration:register_config", "transformers.models.auto.configuration_auto")
register_post_import_hook("models.chatglm.registration:register_tokenizer", "transformers.models.auto.tokenization_auto")
