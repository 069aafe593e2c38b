"""Findings, the situation that they are judged in, and the programs that are asked for facts."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

from errors import UserError
from scripts.launch.commands import Environment
from scripts.launch.options import Options
from scripts.launch.platforms import ROOT, MachineKind
from training.utils.flags.recipe import Recipe

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"
MARK = "SANBU-PROBE "  # begins the line of a probe's output that is its answer


@dataclass(frozen=True)
class Check:
    """One finding: ok, warn, fail or skip; a line of reason, a line of advice (empty where nothing is to be done)."""

    group: str
    name: str
    state: str
    why: str
    todo: str = ""


@dataclass
class Situation:
    """The facts that the checks share. facts: the answer of the probe, or its error. seconds: for a host; a probe gets more.

    environ: the shell's variables; environment: what the launcher makes of them, None where it refuses.
    """

    environ: Mapping[str, str]
    seconds: float = 20.0
    platform: MachineKind | None = None  # the one asked for
    options: Options | None = None
    environment: Environment | None = None
    recipe: Recipe | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def accelerator(self) -> str:
        """Return cuda, npu or cpu: that of the platform asked for, else the one that torch finds."""
        return self.platform.accelerator if self.platform else self.facts.get("torch_device", "cpu")

    @property
    def vendor(self) -> str:
        """Return cuda (NVIDIA), dcu, npu or cpu."""
        if self.platform is None:
            return self.facts.get("platform", "cpu")
        return "dcu" if self.platform.visible_devices == "HIP_VISIBLE_DEVICES" else self.platform.accelerator

    @property
    def several(self) -> bool:
        """Return True for a run on more than one node."""
        return bool(self.options and self.options.several)


def refused(group: str, name: str, error: UserError) -> Check:
    """Return a failure with the sentence of a launcher's check, whose last clause says what to do."""
    why, clause, todo = str(error).rpartition("; ")
    return Check(group, name, FAIL, why if clause else todo, todo if clause else "correct the recipe, flag or variable")


def ask(words: Sequence[str], seconds: float, environ: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """Run a program that prints a probe's answer, for at most so long. Return the answer, or None and a reason."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, env=environ, text=True, errors="replace", start_new_session=True, **pipes)
    try:
        text, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its children: one that holds the pipe would keep us waiting
        process.communicate()
        return None, f"no answer within {seconds:g} seconds"
    answers = [json.loads(line.removeprefix(MARK)) for line in text.splitlines() if line.startswith(MARK)]
    if answers:
        error = next((answer["error"] for answer in answers if "error" in answer), "")
        return (None, error) if error else (answers[-1], "")
    lines = [line.strip() for line in f"{errors}\n{text}".splitlines() if line.strip()]
    # A traceback ends with its reason, a tool such as ssh begins with it.
    last = -1 if "Traceback (most recent call last)" in errors else 0
    return None, lines[last][:200] if lines else f"exit code {process.returncode}"


def started(function: Callable[..., Any], *words: Any, **options: Any) -> Future:
    """Call a function in a thread that does not keep the process alive. Return its future."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*words, **options))
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future


def probe(part: str, *words: str, situation: Situation, launcher: Sequence[str] = ()) -> tuple[Any, str]:
    """Run a part of scripts/doctor/probe.py in a child, with the launcher's variables on the device that is here.

    This process never touches a device. Return as ``ask`` does.
    """
    environ = dict(situation.environ)
    if situation.environment:
        environ |= situation.environment.variables
    if "torch_device" in situation.facts:
        environ["DS_ACCELERATOR"] = situation.facts["torch_device"]
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH"))))
    environ["PYTHONSAFEPATH"] = "1"
    command = [sys.executable, *launcher, "-m", "scripts.doctor.probe", part, *words]
    return ask(command, situation.seconds * 10, environ)
