"""A process that has transformers alone talks to a saved model as chat.py does."""

import torch

from models.load import load_causal_lm
from models.save import save_model
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.models.test_templates import FORGETFUL_CHAT
from tests.plain import assert_plain_transformers_does_as_we_do


def test_plain_transformers_answers_as_chat_does(folder_of, tmp_path):
    folders = []
    for family, chat in (("opt", None), ("llama", FORGETFUL_CHAT), ("qwen2", None)):
        base = folder_of(family)
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = chat or tokenizer.chat_template
        folders.append(tmp_path / family)
        save_model(load_causal_lm(base, dtype=torch.float32), tokenizer, load_template(None, tokenizer), folders[-1])
    assert any(assert_plain_transformers_does_as_we_do(folders, tmp_path))
