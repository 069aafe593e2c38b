"""Tiny checkpoints, made once for all tests of models, which only read them."""

from functools import cache

import pytest

from tests.tiny import FAMILIES, tiny_checkpoint
from tests.tiny_chatglm import tiny_chatglm


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """family -> its tiny checkpoint."""
    folder = tmp_path_factory.mktemp("families")
    return cache(lambda family: tiny_checkpoint(folder / family, family))


@pytest.fixture(scope="session")
def chatglm_of(tmp_path_factory, shared_dir):
    """family -> a tiny checkpoint of ChatGLM in the published layout, with its tokenizer."""
    folder = tmp_path_factory.mktemp("chatglm")
    return cache(lambda family: tiny_chatglm(folder / family, family, shared_dir))


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, folder_of):
    """The tiny checkpoint of each family in turn; its folder has the family's name."""
    return folder_of(request.param)
