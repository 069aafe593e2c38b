"""scripts/launch.sh started as a launcher starts it: a real step on two processes, and how a launch ends when a step does not."""

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from errors import UserError
from scripts.launch import __main__ as launching
from scripts.launch import checks
from scripts.launch.__main__ import prepare
from scripts.launch.processes import exit_code, explain, run_step
from tests.launching import environment, logged, write_pairs
from tests.tiny import tiny_checkpoint
from training.utils.flags.steps import SFTArguments
from training.utils.run.environment import describe_inputs

RECIPE = """
launch: {{platform: cpu, processes: 2, env: {{OMP_NUM_THREADS: 1}}}}
sft:
  model_name_or_path: {base}
  output_dir: output/sft
  data_path: [{data}]
  dtype: fp32
  max_seq_len: 64
  max_steps: 9
  per_device_train_batch_size: 2
  logging_steps: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with a blank in its name, a module of a name of ours, a recipe, a model and data."""
    folder = tmp_path_factory.mktemp("some where")
    (folder / "models.py").write_text("raise ImportError('the wrong models')\n")
    data, base = write_pairs(folder / "pairs.jsonl", 40), tiny_checkpoint(folder / "base", "llama")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=json.dumps(str(base)), data=json.dumps(str(data))))
    return folder


def by_launcher(repository: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """What a launcher of the project does, from another folder."""
    script = folder / "run.sh"
    lines = [f"source {shlex.quote(str(repository / 'scripts' / 'launch.sh'))}", 'launch step1_sft "$PWD/recipe.yaml" "$@"']
    script.write_text("#!/usr/bin/env bash\n" + "\n".join(lines) + "\n")
    env = environment(PYTHON=sys.executable)
    env.pop("PYTHONPATH")
    return subprocess.run(["bash", "run.sh", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.distributed
def test_a_step_on_two_processes_through_the_launcher(repository, folder):
    done = by_launcher(repository, folder, "out dir", "1", "--max_steps", "2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    output = folder / "out dir"
    end = json.loads((output / "sanbu_done.json").read_text())
    flags = end["flags"]
    assert (flags["zero_stage"], flags["max_steps"], flags["max_seq_len"]) == (1, 2, 64)
    assert {key: end[key] for key in ("data", "models", "code")} == describe_inputs(SFTArguments(**flags))  # what train.py compares
    assert len(logged(output, "train/loss")) == 2
    log = (output / "training.log").read_text()
    assert log.startswith("$ ") and "dist_world_size=2" in log
    assert not any(word in done.stdout + done.stderr for word in ("[INFO]", "[WARNING]", "FutureWarning"))
    assert "step 1 (SFT) took" in done.stdout


def test_help_and_refusals_come_at_once(repository, folder):
    shown = by_launcher(repository, folder, "--help")
    assert shown.returncode == 0 and "--node-rank" in shown.stdout and "STEP RECIPE" in shown.stdout
    done = by_launcher(repository, folder, "wrong", "--learning_rat", "1")  # said once, before anything starts
    sentence = "error: --learning_rat is not a flag of step 1 (SFT); did you mean --learning_rate?\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, sentence, "")
    assert not (folder / "wrong").exists()


def test_the_output_folder_is_the_one_that_the_step_writes_to(monkeypatch, folder):
    """--check_points_path is a former name of --output_dir; its mark, its log and no other folder's are touched."""
    monkeypatch.chdir(folder)
    launch, _ = prepare(["step1_sft", "recipe.yaml", "--check_points_path", "former"], {})
    assert launch.output == Path("former")
    monkeypatch.setattr(launching, "check_machine", lambda options: None)
    other = folder / "output" / "sft" / "sanbu_done.json"
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("{}")
    program = "import pathlib; pathlib.Path('former/sanbu_done.json').write_text('{}')"
    launch = replace(launch, command=[sys.executable, "-c", program])
    assert launching.start(launch) == 0
    assert other.is_file() and (folder / "former" / "training.log").is_file()


# --- programs in place of the step ------------------------------------------------------------------------------------


def ended(monkeypatch, folder: Path, program: str, *words: str) -> int:
    """The exit code of a launch whose command is a program."""
    monkeypatch.chdir(folder)
    launch, _ = prepare(["step1_sft", "recipe.yaml", "ends", *words], {})
    monkeypatch.setattr(launching, "check_machine", lambda options: None)
    return launching.start(replace(launch, command=[sys.executable, "-c", textwrap.dedent(program)]))


def test_a_launcher_that_hides_a_killed_child_is_not_believed(monkeypatch, folder, capfd):
    """DeepSpeed's own ends with 0 when a signal has killed what it started."""
    (folder / "ends").mkdir(exist_ok=True)
    (folder / "ends" / "sanbu_done.json").write_text("{}")   # of an earlier run
    hides = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'])"
    assert ended(monkeypatch, folder, hides) == 1
    assert "did not write sanbu_done.json" in capfd.readouterr().err
    assert ended(monkeypatch, folder, "import os; os.kill(os.getpid(), 9)") == 128 + signal.SIGKILL


def test_a_node_without_the_first_process_leaves_a_mark_of_its_own(monkeypatch, folder, capfd):
    words = ["--launcher", "torchrun", "--num_nodes", "2", "--node_rank", "1", "--master_addr", "10.0.0.1"]
    assert ended(monkeypatch, folder, "pass", *words) == 1
    mark = "import os, pathlib; pathlib.Path(os.environ['SANBU_NODE_DONE']).touch()"
    assert ended(monkeypatch, folder, mark, *words) == 0
    assert (folder / "ends" / "training-node1.log").is_file()


def test_codes_behind_torchrun_are_those_of_the_process_that_failed_first():
    other = ["[1]:", "  exitcode  : -15 (pid: 7)", "Root Cause (first observed failure):", "[0]:", "  exitcode  : 2 (pid: 6)"]
    assert exit_code(1, other) == 2
    assert exit_code(1, [*other[:-1], "  exitcode  : -9 (pid: 6)"]) == 137
    assert (exit_code(1, []), exit_code(-9, other), exit_code(0, other), exit_code(3, other)) == (1, 137, 0, 3)


def test_a_lost_node_is_75_whatever_srun_ends_with():
    """srun answers with the code of the node that was lost, or with the SIGTERM that it sends the others."""
    said = ["error: node 1 (b) is lost: the connection to it ended.", "  exitcode  : -9 (pid: 6)"]
    assert [exit_code(code, said) for code in (0, 1, 137, 143)] == [0, 75, 75, 75]


def test_a_stop_from_outside_is_not_told_as_an_error():
    """scancel --signal=TERM reaches torchrun, not the launcher: it raises, and ends with 1."""
    lines = ["torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15"]
    code = exit_code(1, lines)
    told = explain("step 1", code, lines, 5.0, Path("training.log"))
    assert code == 143 and "--resume continues" in told and "error" not in told and "Exception" not in told


DRIVER = """
    import sys, scripts.launch.__main__ as launching
    from dataclasses import replace
    prepare = launching.prepare
    program = "import signal, sys, time\\ndef stop(*_): time.sleep(0.5); print('saving', flush=True); sys.exit(143)\\n"
    program += "import subprocess\\nchild = subprocess.Popen(['sleep', '600'])\\n"
    program += "signal.signal(signal.SIGTERM, stop)\\nprint('started', child.pid, flush=True)\\n{then}"
    def replaced(argv):
        launch, dry = prepare(argv)
        return replace(launch, command=[sys.executable, '-c', program]), dry
    launching.prepare = replaced
    launching.check_machine = lambda options: None
    sys.exit(launching.main(sys.argv[1:]))
"""


@pytest.fixture
def driven(repository, folder):
    """driven(output, then, before) -> scripts/launch.sh with a program that prints and does `then`; before: such as nohup."""
    running = []

    def drive(output: str, then: str, *before: str) -> subprocess.Popen:
        driver, python = folder / f"{output}.py", folder / f"python-{output}"
        driver.write_text(textwrap.dedent(DRIVER).replace("{then}", then))
        # python -m scripts.launch … -> python driver.py …
        python.write_text(f'#!/bin/sh\nshift 2\nexec {shlex.quote(sys.executable)} "{driver}" "$@"\n')
        python.chmod(0o755)
        words = [*before, "bash", str(repository / "scripts/launch.sh"), "step1_sft", str(folder / "recipe.yaml"), output]
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment(PYTHON=str(python)),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the suite itself may run under nohup
        )
        running.append(process)
        return process

    yield drive
    for process in running:
        process.kill()
        process.wait()


def child_of(process: subprocess.Popen) -> int:
    """Wait until the program has started; return the number of a process that it has started itself."""
    return int(next(line for line in process.stdout if line.startswith("started ")).split()[1])


def is_gone(pid: int, patience: float = 5.0) -> bool:
    """Return whether a process ends within some seconds (a zombie has ended)."""
    import psutil

    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_closed_terminal_lets_the_step_save_first(driven, folder):
    """The system and the shell both send SIGHUP; the second must not cut the saving short."""
    process = driven("hangup", "time.sleep(60)")
    assert child_of(process)
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGHUP)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGHUP and "saving" in out and "--resume continues" in error


def test_under_nohup_a_closed_terminal_is_nothing(driven):
    process = driven("nohup", "time.sleep(1); print('through', flush=True)", "nohup")
    assert child_of(process)
    os.kill(process.pid, signal.SIGHUP)
    out, _ = process.communicate(timeout=120)
    assert "through" in out and process.returncode == 1   # it left no sanbu_done.json


def test_output_that_nobody_reads_any_more_does_not_end_the_step(driven, folder):
    """`… | head -1`: the step goes on to its own end, its output to the log."""
    then = "time.sleep(0.3)\\nprint('unread', flush=True); time.sleep(0.3)\\n"
    then += "import pathlib; pathlib.Path('pipe/sanbu_done.json').write_text('{}'); print('through', flush=True)"
    process = driven("pipe", then)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(30) == 0 and error == ""
    assert "through" in (folder / "pipe" / "training.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_step_through_the_script(driven, number):
    """The script, not a shell around it, is what Slurm and Kubernetes send their signal to: this process, not its group."""
    process = driven(f"signal{number}", "time.sleep(60)")
    child = child_of(process)  # its line arrives although the step is still running
    os.kill(process.pid, number)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "saving" in out and "--resume continues" in error
    assert is_gone(child)


def test_a_straggler_does_not_hold_the_run_up(tmp_path):
    """A grandchild that keeps the pipe open after the launcher has ended is killed after a few seconds."""
    program = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    started = time.monotonic()
    code, lines = run_step([sys.executable, "-c", program], dict(os.environ), tmp_path / "log")
    assert code == 0 and time.monotonic() - started < 20
    assert is_gone(int(lines[-1]))


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (socket.gaierror(-2, "Name or service not known"), "--master_addr node-x: Name or service not known from .*, node 1; give"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "--master_addr node-x: No route to host from"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),   # it has not started yet
        (TimeoutError("timed out"), None),
    ],
)
def test_a_first_node_to_which_no_way_leads_is_told_before_anything_starts(monkeypatch, folder, trouble, sentence):
    monkeypatch.chdir(folder)
    words = ["--launcher", "torchrun", "--num_nodes", "2", "--node_rank", "1", "--master_addr", "node-x"]
    launch, _ = prepare(["step1_sft", "recipe.yaml", "far", *words], {})

    def connect(address, timeout):
        assert address == ("node-x", 29500) and timeout < 10
        raise trouble

    monkeypatch.setattr(socket, "create_connection", connect)
    if sentence is None:
        checks.check_first_node(launch.options, patience=0)
    else:
        with pytest.raises(UserError, match=sentence):
            checks.check_first_node(launch.options, patience=0)
