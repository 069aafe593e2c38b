"""Run a command to its end: its output to terminal and log, signals passed on, and a few words when it fails."""

import contextlib
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TextIO

import psutil

from errors import without_secrets
from training.utils.run.environment import DONE
from training.utils.run.metrics import format_seconds

HINTS = (
    (
        r"out of memory|OutOfMemoryError|Cannot allocate memory|can't allocate memory|bad_alloc",
        "the memory was not enough: lower --per_device_train_batch_size (step 3: --per_device_generation_batch_size "
        "and --per_device_training_batch_size) and raise --gradient_accumulation_steps; --gradient_checkpointing; a "
        "higher --actor-zero-stage or --reward-zero-stage; --offload; --lora_dim 128; lower --max_seq_len; more cards",
    ),
    (
        r"return code = -9|exitcode: -9",
        "a process was killed from outside (signal 9), mostly because the memory of the host was full: fewer processes "
        "(--num-gpus), no --offload, smaller batches",
    ),
    (r"No space left on device", "the disk is full: free space, or name another --output-dir"),
    (
        r"Address already in use|EADDRINUSE",
        "another program listens on the port of the run: start the command again, on several nodes "
        "with another --master_port",
    ),
    (
        r"timed out after \d+ms while trying to connect|waiting for clients",
        "not all nodes have come: start the command on each, with the same --master_addr and --master_port, and let the "
        "firewalls pass them",
    ),
    (r"No module named", "a package is missing: pip install -r requirements.txt"),
    (
        r"Permission denied \(publickey|not reachable via ssh|launcher '\w+' not installed",
        "several nodes need pdsh, and ssh without a password from this host to every host of the hostfile",
    ),
)

# What launchers and libraries say in every run: DeepSpeed's logger, torchrun's, warnings to programmers with their line of code.
CHATTER = re.compile(
    rb"\[\d{4}-\d\d-\d\d [\d:,]+\] \[(INFO|WARNING)\] \[\w+\.py:"
    rb"|[IW]\d{4} [\d:.]+ .*torch/distributed/run\.py:"
    rb"|(?P<warning>.+:\d+: (Future|Deprecation|PendingDeprecation)Warning: )"
)
MAY_BECOME_CHATTER = re.compile(rb"\[\d{0,4}(-|$)|[IW]\d{0,4}( |$)|/|<frozen")


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or a terminal that was closed; the argument is the signal's number."""


def stoppable(run: Callable[..., int]) -> Callable[..., int]:
    """Return run with the sentence about --resume and the exit code 128 + signal in the place of Interrupted."""

    @wraps(run)
    def ending(*args: Any) -> int:
        try:
            return run(*args)
        except Interrupted as stop:
            say("\nstopped; the same command with --resume continues from the newest checkpoint.", stream=sys.stderr)
            return 128 + stop.args[0]

    return ending


def run_to_end(title: str, command: list[str], env: dict[str, str], log: Path, done: Path) -> tuple[int, float]:
    """Run a step that leaves a file ``done``; return its exit code and its seconds. Say why it failed if it did.

    DeepSpeed's launcher ends with 0 when it is its own child that a signal has killed; the file tells then.
    """
    done.unlink(missing_ok=True)  # until it ends well, it is not done
    started = time.monotonic()
    code, lines = run_step(command, env, log)
    seconds = time.monotonic() - started
    code = exit_code(code, lines)
    if code == 0 and done.is_file():
        return 0, seconds
    say(explain(title, code, lines, seconds, log), stream=sys.stderr)
    return code or 1, seconds


def run_step(command: list[str], env: dict[str, str], log: Path, patience: float = 60.0) -> tuple[int, list[str]]:
    """Run a command in a process group of its own; what it prints goes to the log and, but for CHATTER, to the terminal.

    Returns its exit code and the last lines it printed. On Ctrl-C, SIGTERM or SIGHUP the group is asked to end (a step
    then saves a checkpoint), killed after ``patience`` seconds, and Interrupted is raised. Nothing else is touched.
    """
    say("", end="")  # what stands in the buffer comes before what the command prints
    with log.open("ab") as file:
        file.write(f"$ {without_secrets(shlex.join(command))}\n".encode())
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        name = f"sanbu-{os.getpid()}"  # srun calls its step so, and ask_to_end finds it
        if Path(command[0]).name == "srun":
            command = [command[0], f"--job-name={name}", *command[1:]]
        process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
        tail, shown = bytearray(), without_chatter()

        def show(chunk: bytes) -> None:
            file.write(chunk)
            file.flush()
            say(shown(chunk))
            tail.extend(chunk)
            del tail[:-65536]

        with signals_raise():
            try:
                drain(process, show, deadline=None)
            except Interrupted:
                ask_to_end(process, name)
                with contextlib.suppress(Interrupted):  # a second Ctrl-C does not wait
                    drain(process, show, deadline=time.monotonic() + patience)
                raise
            finally:
                signal_group(process, signal.SIGKILL)  # not reaped yet, so the number is still this group's
                process.wait()
                process.stdout.close()
    return process.returncode, tail.decode(errors="replace").splitlines()


def without_chatter() -> Callable[[bytes], bytes]:
    """Return a function that takes output as it comes, an empty piece at its end, and returns what a terminal shows of it."""
    held, warned = b"", False

    def shown(chunk: bytes) -> bytes:
        nonlocal held, warned
        *lines, held = (held + chunk).split(b"\n")
        kept = []
        for line in lines:
            chatter = CHATTER.match(line)
            if not (chatter or (warned and line.startswith(b"  "))):
                kept.append(line + b"\n")
            warned = bool(chatter and chatter["warning"])
        if not chunk or not (warned or MAY_BECOME_CHATTER.match(held)):  # a progress bar has no end of line
            kept.append(held)
            held = b""
        return b"".join(kept)

    return shown


def say(words: str | bytes, end: str = "\n", stream: TextIO | None = None) -> None:
    """Print at once. When nobody is left to read it (``| head``, a terminal that was closed), go on without a word: a run
    is worth more than its output, which is in its log.
    """
    stream = stream or sys.stdout
    try:
        if isinstance(words, bytes):
            stream.buffer.write(words)
        else:
            stream.write(words + end)
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):  # a stream without a descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def drain(process: subprocess.Popen, show: Callable[[bytes], None], deadline: float | None) -> None:
    """Pass on what the group prints until nobody is left who could; stragglers get five seconds after the launcher."""
    streams = [process.stdout]
    while deadline is None or time.monotonic() < deadline:
        ready, _, _ = select.select(streams, [], [], 0.1)
        if ready:
            chunk = os.read(process.stdout.fileno(), 65536)
            show(chunk)
            streams = streams if chunk else []
        # Without reaping it: until then its number cannot pass to another group.
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if not streams:  # output may be closed while the launcher still tidies up
                return
            deadline = deadline or time.monotonic() + 5.0


def ask_to_end(process: subprocess.Popen, name: str) -> None:
    """Send SIGTERM to the process group of a child, but where it is or has started srun or mpirun: these kill before a step saves.

    srun (Slurm 22.05) answers SIGTERM with SIGKILL for its tasks: they are signalled through Slurm, in the step of this name.
    mpirun (OpenMPI 4.1) has one second between SIGTERM and SIGKILL; SIGUSR1 it passes on, and a step takes that alike.
    """
    if Path(process.args[0]).name == "srun":
        job = os.environ["SLURM_JOB_ID"]
        steps = slurm("squeue", "--steps", "--noheader", f"--job={job}", "--format=%i %j")
        found = [step for step, _, called in (line.partition(" ") for line in steps.splitlines()) if called.strip() == name]
        if found:
            slurm("scancel", "--signal=TERM", *found)
            return
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name() == "mpirun":
                child.send_signal(signal.SIGUSR1)
                return
    signal_group(process, signal.SIGTERM)


def slurm(*command: str) -> str:
    """Return what a command of Slurm prints; "" where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def signal_group(process: subprocess.Popen, number: int) -> None:
    """Send a signal to the process group of a child that has not been reaped."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM when only zombies are left
        os.killpg(process.pid, number)


@contextlib.contextmanager
def signals_raise():
    """Let SIGINT, SIGTERM and, unless nohup has it ignored, SIGHUP raise Interrupted inside."""

    def stop(number: int, _frame: Any) -> None:
        if number == signal.SIGHUP:  # the system and the shell both send it: the second is no order to hurry
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise Interrupted(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    numbers += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(code: int, lines: list[str]) -> int:
    """Return what a shell would say: 128 + signal for a killed child; under torchrun, which ends with 1 whatever its children
    ended with, the code of the process that failed first, as its report names it, or of the signal that torchrun got.

    A step that said that a node is lost ended with 75; srun answers with what the lost one had, or the torchrun that it then ended.
    """
    if code and any(re.search(r"error: node \d+ \(.*\) is lost: ", line) for line in lines):
        return 75
    if code < 0:
        return 128 - code
    stopped = re.findall(r"SignalException: Process \d+ got signal: (\d+)", "\n".join(lines))
    if code == 1 and stopped:
        return 128 + int(stopped[-1])
    reported = re.findall(r"^\s*exitcode\s*:\s*(-?\d+)", "\n".join(lines), re.MULTILINE)
    if code == 1 and reported:
        first = int(reported[-1])  # the root cause stands last
        return 128 - first if first < 0 else first
    return code


def explain(title: str, code: int, lines: list[str], seconds: float, log: Path) -> str:
    """Return the sentences about a step that failed: where, its own last error, hints, the log; or that a signal has stopped it."""
    if code in (128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM):  # torchrun raises then
        return f"{title} was stopped by a signal after {format_seconds(seconds)}; the same command with --resume continues."
    own = [line for line in lines if not re.match(r"(srun|slurmstepd\S*): error: ", line)]  # they say that it ended, not why
    errors = [match[1] for line in own if (match := re.search(r"(?:^|: )error: (.+)", line))]
    raised = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    report = [f"error: {title} ended with exit code {code} after {format_seconds(seconds)}."]
    report += [f"  it said: {line}" for line in (errors or raised)[-1:]]
    if not errors:
        text = "\n".join(lines)
        report += [f"  hint: {hint}." for pattern, hint in HINTS if re.search(pattern, text, re.IGNORECASE)]
    if code == 0:
        report.append(f"  it did not write {DONE}, so it did not come to its end.")
    return "\n".join([*report, f"  all it printed: {log}"])
