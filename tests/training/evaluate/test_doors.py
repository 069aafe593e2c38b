"""The former names of the evaluations, and the scripts that start them."""

import runpy
import subprocess
import sys

import pytest

from tests.launching import environment


@pytest.mark.parametrize("module", ["step1_sft.prompt_eval", "step1_sft.evaluate", "step2_reward.rw_eval"])
def test_a_former_module_runs_its_successor(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--data_pth", "x"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"training.{module}", run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.endswith("did you mean --data_path?\n") and error.count("error: ") == 1


@pytest.mark.parametrize("script", ["step1_sft/evaluation_scripts/run_prompt.sh", "step2_reward/evaluation_scripts/run_eval.sh"])
def test_a_script_without_its_models_says_its_usage(repository, tmp_path, script):
    command = ["bash", str(repository / "training" / script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr
