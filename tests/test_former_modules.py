"""Former commands, which run their successors; the scripts that start the evaluations."""

import runpy
import subprocess
import sys

import pytest

from former_modules import SUCCESSORS
from tests.launching import environment

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", SUCCESSORS)
def test_a_former_command_runs_its_successor(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(name, run_name="__main__", alter_sys=False)
    assert not stop.value.code and capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("script", ["step1_sft/evaluation_scripts/run_prompt.sh", "step2_reward/evaluation_scripts/run_eval.sh"])
def test_a_script_without_its_models_says_its_usage(repository, tmp_path, script):
    command = ["bash", str(repository / "training" / script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr
