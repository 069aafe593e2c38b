"""A wrong path is told before torch is imported; sets of the hub are looked up where no cache may hold them."""

import subprocess
import sys

import pytest
from huggingface_hub import HfApi
from huggingface_hub import constants as hub

from errors import UserError
from steps import STEPS
from training.utils.data.paths import check_source

TELL = """
import contextlib, io, runpy, sys
for module, flags, words in {cases}:
    sys.argv, told = [module, *flags], io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert end.code == 2
    assert words in told.getvalue(), (module, flags, told.getvalue())
    heavy = {{"torch", "transformers", "deepspeed", "datasets", "pyarrow"}} & sys.modules.keys()
    assert not heavy, (module, flags, heavy)
"""


def test_wrong_paths_are_told_before_heavy_imports(repository, tmp_path):
    empty, good = tmp_path / "empty.jsonl", tmp_path / "good.jsonl"
    empty.write_text("")
    good.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    cases = []
    for step in STEPS:
        roles = ("actor_", "critic_") if step.section == "ppo" else ("",)
        models = [word for role in roles for word in (f"--{role}model_name_or_path", str(tmp_path / "none"))]
        common = [*models, "--output_dir", str(tmp_path / "out"), "--data_path"]
        cases.append((step.module, [*common, str(good)], "none does not exist"))
        cases.append((step.module, [*common, str(tmp_path / "gone.jsonl")], "gone.jsonl: no such file"))
        cases.append((step.module, [*common, str(empty)], "no records in it"))
        cases.append((step.module, [*common, str(good), "--resume", str(tmp_path / "no")], "no such folder"))
    command = [sys.executable, "-c", TELL.format(cases=cases)]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr


def test_a_set_of_the_hub_is_looked_up_unless_a_cache_may_hold_it(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    with pytest.raises(UserError, match=r"the hub cannot be reached.*download_dataset some/set"):
        check_source("some/set")
    check_source("some/set", ask_hub=False)
    for cached in ("hub/datasets--some--set", "prepared/some___other"):
        folder = tmp_path / cached
        folder.mkdir(parents=True)
        check_source("some/set")
        folder.rmdir()
