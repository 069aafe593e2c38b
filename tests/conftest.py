"""Fixtures that every test may use."""

import logging
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_cache = tempfile.TemporaryDirectory(prefix="sanbu-tests-")   # tokenised data of the tests; removed at exit
os.environ.setdefault("SANBU_CACHE", _cache.name)


def leave_group(*group, leave=dist.destroy_process_group) -> None:
    """Leave the process group; DeepSpeed forgets its copies, which would be dead in the next module that builds engines."""
    leave(*group)
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


dist.destroy_process_group = leave_group
REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items) -> None:
    """Start the long files first: the last to run should be short, or one worker waits for the other."""
    long = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def log_level():
    """Give every test the log level of a fresh process: runs within this one set it to their rank's."""
    logging.getLogger("sanbu").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def folder_of(request, tmp_path_factory):
    """(family, seed) -> its tiny checkpoint, made once and only read; ChatGLM's ("chatglm-6b", …) in the published layout."""
    from tests.tiny import tiny_checkpoint  # transformers takes seconds
    from tests.tiny_chatglm import tiny_chatglm

    folder = tmp_path_factory.mktemp("families")

    @cache
    def make(family: str, seed: int = 0) -> Path:
        if family.startswith("chatglm"):
            return tiny_chatglm(folder / family, family, request.getfixturevalue("shared_dir"), seed=seed)
        return tiny_checkpoint(folder / str(seed) / family, family, seed=seed)

    return make


@pytest.fixture(scope="session")
def llama(folder_of) -> Path:
    """A tiny LLaMA, which tests only read."""
    return folder_of("llama")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the project."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Reference data that lies beside the project in CI; a plain clone does not have it."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("the reference data folder ../shared is not beside this clone")
    return folder


@pytest.fixture(scope="session")
def shared_cases(shared_dir) -> Path:
    """Small data files in the forms of published ones."""
    folder = shared_dir / "cases" / "read"
    if not folder.is_dir():
        pytest.skip("../shared holds no cases")
    return folder


@pytest.fixture
def forked(monkeypatch):
    """Run the steps that train.py starts in forked processes, without DeepSpeed's launcher."""
    from scripts.launch import processes
    from tests.launching import start

    def run_step(command, env, log):
        module, *flags = command[command.index("--module") + 1 :]
        done = start(module, flags)
        return done.returncode, (done.stdout + done.stderr).splitlines()

    monkeypatch.setattr(processes, "run_step", run_step)
