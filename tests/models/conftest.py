"""Tiny checkpoints of every family, one after another."""

import pytest

from tests.tiny import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, folder_of):
    """The tiny checkpoint of each family in turn; its folder has the family's name."""
    return folder_of(request.param)


@pytest.fixture(scope="module", params=[*FAMILIES, "chatglm-6b", "chatglm2-6b"])
def any_checkpoint(request, folder_of):
    """As checkpoint, with ChatGLM."""
    return folder_of(request.param)
