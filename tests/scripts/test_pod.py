"""The commands of pods: steps in order behind any launcher, waits that end, signals that arrive, downloads that exist."""

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from scripts.kubernetes import __main__ as k8s
from scripts.kubernetes import pod
from training.utils.flags.parse import parse
from training.utils.flags.steps import SFTArguments
from training.utils.run.environment import DONE, describe_inputs

RECIPE = {
    "sft": {"model_name_or_path": "facebook/opt-125m", "output_dir": "out/sft"},
    "reward": {"model_name_or_path": "out/sft", "output_dir": "out/reward"},
    "ppo": {"actor_model_name_or_path": "out/sft", "critic_model_name_or_path": "out/reward", "output_dir": "out/ppo"},
}
# In the place of torchrun or deepspeed: notes what it was given, then does what FAKE says.
LAUNCHER = """
import json, os, pathlib, signal, sys, time
with open("log.jsonl", "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
section = {"step1_sft": "sft", "step2_reward": "reward", "step3_ppo": "ppo"}[sys.argv[2].split(".")[1]]
what = os.environ.get("FAKE", "")
if what.startswith("fail") and what.endswith(section):
    sys.exit(7)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "sleep":
    signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("asked").touch(), sys.exit(143)))
    pathlib.Path("started").touch()
    time.sleep(60)
folder = pathlib.Path("out", section)
folder.mkdir(parents=True, exist_ok=True)
if what != "no marker":
    (folder / "sanbu_done.json").write_text("{}")
"""


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A volume with a recipe and a launcher, as the working folder."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FAKE", raising=False)
    return tmp_path


def run(*steps: str, more: tuple[str, ...] = ()) -> int:
    """scripts.kubernetes.pod run with our launcher; $NODE is filled in as $OMPI_COMM_WORLD_RANK is in an MPIJob."""
    words = ["run", "--recipe", "recipe.yaml", "--patience", "0.2", *more, "--step", *steps]
    return pod.main([*words, "--", sys.executable, "launcher.py", "--node=$NODE"])


def log(work: Path) -> list[list[str]]:
    """What the launcher was called with."""
    path = work / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_three_steps_run_in_order_and_only_once(work, monkeypatch, capsys):
    monkeypatch.setenv("NODE", "3")
    assert run("1", "2", "3", more=("--flags=--max_steps 4 --output_dir 'a b'",)) == 0
    modules = [call[1] for call in log(work)]
    assert modules == ["training.step1_sft.main", "training.step2_reward.main", "training.step3_ppo.main"]
    usual = ["--config", "recipe.yaml", "--resume", "--enable_tensorboard"]
    assert all(call[0] == "--node=3" and call[2:] == [*usual, "--max_steps", "4", "--output_dir", "a b"] for call in log(work))
    (work / "out/reward" / DONE).unlink()
    assert run("1", "2", "3") == 0  # a pod that starts again
    again = log(work)[3:]  # and PPO, which was trained on the old reward model: from the start, checkpoints of it are old too
    assert [(call[1], "--resume" in call) for call in again] == [(modules[1], True), (modules[2], False)]
    assert capsys.readouterr().out.count("is done") == 1
    assert run("1", "2", "3") == 0 and len(log(work)) == 5


def test_a_step_done_with_other_flags_or_data_is_not_taken_for_done(work, capsys):
    (work / "pairs.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (work / "recipe.yaml").write_text(yaml.safe_dump({"sft": {**RECIPE["sft"], "data_path": ["pairs.jsonl"]}}))
    assert run("1") == 0
    args = parse(SFTArguments, ["--config", "recipe.yaml", "--resume", "--enable_tensorboard"])
    done = json.dumps({"flags": asdict(args), **describe_inputs(args)}, default=str)  # as a real run writes it
    (work / "out/sft" / DONE).write_text(done)
    assert run("1") == 0 and "is done" in capsys.readouterr().out
    assert run("1", more=("--flags=--learning_rate 3e-4 --logging_steps 7",)) == 2
    said = capsys.readouterr().err
    assert "step 1 (sft) in out/sft was done otherwise: --learning_rate is 0.0003 now and was" in said and said.count("\n") == 1
    assert "Delete the folder to train again; --keep goes on" in said and "--logging_steps" not in said
    (work / "pairs.jsonl").write_text('{"prompt": "a", "response": "c"}\n')
    assert run("1") == 2 and "pairs.jsonl has another content now" in capsys.readouterr().err
    assert run("1", more=("--keep",)) == 0 and len(log(work)) == 1


@pytest.mark.parametrize("what, code, calls", [("fail in reward", 7, 2), ("no marker", 1, 1), ("kill", 137, 1)])
def test_a_step_that_fails_ends_the_pod(work, monkeypatch, capsys, what, code, calls):
    monkeypatch.setenv("FAKE", what)
    assert run("1", "2", "3") == code and len(log(work)) == calls
    assert "step " in capsys.readouterr().err


def test_a_step_does_not_start_before_what_it_reads(work, capsys):
    assert run("3") == 2 and not log(work)
    assert "out/sft and out/reward: no sanbu_done.json" in capsys.readouterr().err
    for name in ("sft", "reward"):
        (work / "out" / name).mkdir(parents=True)
        (work / "out" / name / DONE).write_text("{}")
    assert run("3") == 0 and len(log(work)) == 1


def test_a_wait_ends_when_the_marker_comes_or_the_time_is_over(work):
    (work / "out").mkdir()
    writer = threading.Timer(0.3, (work / "out" / DONE).touch)
    writer.start()
    pod.wait_for(["out"], seconds=60, pause=0.1)
    assert pod.main(["wait", "--folder", "out"]) == 0
    assert pod.main(["wait", "--folder", "out", "elsewhere", "--minutes", "0.001"]) == 2


# Starts the launcher above as its rank 0, as torchrun and deepspeed do, and ends it badly at a signal of its own.
PARENT = """
import os, signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "launcher.py", *sys.argv[1:]], env=os.environ | {"LOCAL_RANK": "0"})
signal.signal(signal.SIGTERM, lambda *_: (rank.kill(), sys.exit(1)))
sys.exit(1 if rank.wait() else 0)
"""


def test_a_pod_that_must_end_tells_its_step(work):
    """Process 1 of a container has to pass SIGTERM on, to the ranks themselves: they save a checkpoint then."""
    (work / "parent.py").write_text(PARENT)
    words = ["run", "--recipe", "recipe.yaml", "--step", "1", "2", "--", sys.executable, "parent.py", "-m"]
    env = {"FAKE": "sleep", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(k8s.ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "scripts.pod", *words], cwd=work, env=env)
    try:
        deadline = time.monotonic() + 60
        while not (work / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143 and (work / "asked").exists() and len(log(work)) == 1
    finally:
        process.kill()


def test_downloads_that_are_there_are_left_alone(work, capsys):
    (work / "datasets/Dahoas/rm-static").mkdir(parents=True)
    assert pod.main(["download", "--dataset", "Dahoas/rm-static"]) == 0
    assert "is there already" in capsys.readouterr().out
    assert pod.main(["download", "--model", "nobody/nothing"]) == 2  # no network in tests
    assert "--model nobody/nothing could not be fetched" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe, words, said",
    [
        ({"sft": {}}, ["--step", "1"], "no output_dir"),
        ({"sft": {"output_dir": "x"}}, ["--step", "2"], "no section reward"),
        ({"model": "x"}, ["--step", "1"], "no section of a step"),
        (RECIPE, ["--step", "1", "--workdir", "nowhere"], "--workdir nowhere"),
        (RECIPE, ["--step", "1"], "no-such-launcher: No such file"),
    ],
)
def test_wrong_input_is_told_in_one_sentence(work, capsys, recipe, words, said):
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert pod.main(["run", "--recipe", "recipe.yaml", "--step", "1"]) == 2  # no launcher
    capsys.readouterr()
    assert pod.main(["run", "--recipe", "recipe.yaml", *words, "--", "no-such-launcher"]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_the_vendors_environment_surrounds_the_command(tmp_path):
    """DTK's file is sourced once, reads unset variables, and arguments with blanks arrive whole."""
    (tmp_path / "dtk").mkdir()
    (tmp_path / "dtk/env.sh").write_text('export ROCM_PATH="$UNSET/opt/dtk" COUNT="x$COUNT"\n')
    script = k8s.ROOT / "scripts/vendor_env.sh"
    show = 'echo "$ROCM_PATH $COUNT $1"; bash -c \'echo "$COUNT"\''
    env = {"DTK_HOME": str(tmp_path / "dtk"), "BASH_ENV": str(script), "PATH": "/usr/bin:/bin"}
    shown = subprocess.check_output(["bash", str(script), "bash", "-c", show, "-", "a b"], env=env, text=True)
    assert shown.splitlines() == ["/opt/dtk x a b", "x"]
    assert subprocess.run(["bash", str(script), "bash", "-c", "exit 5"], env=env).returncode == 5
