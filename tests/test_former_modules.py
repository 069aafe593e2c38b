"""Former commands: each runs its successor or says what to use instead; the scripts that start the evaluations."""

import runpy
import subprocess
import sys

import pytest

from former_modules import GONE, SUCCESSORS
from tests.launching import environment

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", [*SUCCESSORS, *GONE])
def test_a_former_command_runs_its_successor_or_names_another(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(name, run_name="__main__", alter_sys=False)
    shown = capsys.readouterr()
    if name in GONE:
        assert stop.value.code == 2 and shown.err.startswith(f"error: {name} is gone: ") and shown.err.count("\n") == 1
    else:
        assert not stop.value.code and shown.out.startswith("usage: ")


@pytest.mark.parametrize("script", ["step1_sft/evaluation_scripts/run_prompt.sh", "step2_reward/evaluation_scripts/run_eval.sh"])
def test_a_script_without_its_models_says_its_usage(repository, tmp_path, script):
    command = ["bash", str(repository / "training" / script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr
