"""Tiny checkpoints, made once for all tests of models, which only read them."""

from functools import cache

import pytest

from tests.tiny import FAMILIES, tiny_checkpoint
from tests.tiny_chatglm import tiny_chatglm


@pytest.fixture(scope="session")
def folder_of(request, tmp_path_factory):
    """family -> its tiny checkpoint; ChatGLM's ("chatglm-6b", ...) are in the published layout."""
    folder = tmp_path_factory.mktemp("families")

    @cache
    def make(family):
        if family.startswith("chatglm"):
            return tiny_chatglm(folder / family, family, request.getfixturevalue("shared_dir"))
        return tiny_checkpoint(folder / family, family)

    return make


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, folder_of):
    """The tiny checkpoint of each family in turn; its folder has the family's name."""
    return folder_of(request.param)


@pytest.fixture(scope="module", params=[*FAMILIES, "chatglm-6b", "chatglm2-6b"])
def any_checkpoint(request, folder_of):
    """As checkpoint, with ChatGLM."""
    return folder_of(request.param)
