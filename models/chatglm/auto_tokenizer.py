"""One name for the tokenizers of three generations.

The published folders say ``"tokenizer_class": "ChatGLMTokenizer"`` in all three, and AutoTokenizer takes the registered
class of exactly that name. This is the one to register; it opens a folder with the generation's own class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from errors import UserError
from models.chatglm import tokenization as first
from models.chatglm.tokenizer_base import CONFIG
from models.chatglm2 import tokenization as later

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
BESIDE = (CONFIG, "config.json", "special_tokens_map.json", "added_tokens.json")


class ChatGLMTokenizer:
    """Opens the tokenizer of ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B; has no instances of its own."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *inputs: Any, **options: Any
    ) -> first.ChatGLMTokenizer | later.ChatGLMTokenizer:
        """The tokenizer in a folder or of a hub id: ice_text.model is ChatGLM-6B's, tokenizer.model that of 2 and 3.

        options as for every tokenizer of transformers. Raises UserError if there is neither file, or a damaged one.
        """
        path = str(pretrained_model_name_or_path)
        where = {name: options[name] for name in HUB if name in options}
        where["_raise_exceptions_for_missing_entries"] = False
        for tokenizer in (first.ChatGLMTokenizer, later.ChatGLMTokenizer):
            file = cached_file(path, tokenizer.vocab_files_names["vocab_file"], **where)
            if file is None:
                continue
            for name in BESIDE:  # from the hub into the same folder; the generation's class reads it from there
                cached_file(path, name, **where)
            kept = {name: value for name, value in options.items() if name not in HUB}
            return tokenizer.from_pretrained(str(Path(file).parent), *inputs, **kept)
        raise UserError(
            f"model {path} has no vocabulary (ice_text.model for ChatGLM-6B, tokenizer.model for ChatGLM2-6B and "
            "ChatGLM3-6B); copy the whole checkpoint."
        )
