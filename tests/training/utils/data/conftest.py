"""The way the tests of this folder load data."""

from pathlib import Path

import pytest

from models.tokenizer import load_tokenizer
from tests.models.chatglm_folders import GENERATIONS, tokenizer_folder
from tests.tiny import tiny_tokenizer
from training.utils.data.records import load_records


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def load(cache):
    """load_records; returns plain lists."""

    def loader(path, **arguments) -> dict[str, list[dict]]:
        return {split: rows.to_list() for split, rows in load_records(str(path), **arguments).items()}

    return loader


@pytest.fixture(scope="session")
def tokenizers():
    """Small tokenizers; nobody changes them."""
    return {family: tiny_tokenizer(family) for family in ("llama", "qwen2", "gpt2", "bloom", "glm4")}


@pytest.fixture
def llama(tokenizers):
    return tokenizers["llama"]


@pytest.fixture(params=["llama", "qwen2"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def chatglm_folders(shared_dir, tmp_path_factory):
    """Tokenizers of ChatGLM's generations, with their configurations."""
    home = tmp_path_factory.mktemp("tokenizers")
    return {version: tokenizer_folder(home / version, shared_dir, version) for version in GENERATIONS}


@pytest.fixture(scope="session")
def chatglm_tokenizers(chatglm_folders):
    return {version: load_tokenizer(folder) for version, folder in chatglm_folders.items()}
