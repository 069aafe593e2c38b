"""What a check returns, what it is given, and how it asks a program that may be absent, broken or never answer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.launch.commands import Options
from scripts.launch.platforms import ROOT, Platform

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"
MARK = "SANBU-PROBE "  # begins the line of a probe's output that is its answer


@dataclass(frozen=True)
class Check:
    """One finding: ok, warn, fail or skip; one line why, one line what to do (empty where nothing is to be done)."""

    group: str
    name: str
    state: str
    why: str
    todo: str = ""


@dataclass(frozen=True)
class Output:
    """What a program said. code is None where it did not end in time, or could not be started."""

    code: int | None
    text: str = ""  # standard output
    errors: str = ""  # standard error, or why it has no code

    @property
    def reason(self) -> str:
        """One line for why it failed."""
        lines = [line for line in (self.errors + "\n" + self.text).splitlines() if line.strip()]
        # A traceback says at its end what went wrong, a tool at its beginning.
        chosen = lines[-1] if "Traceback (most recent call last)" in self.errors else lines[0] if lines else ""
        return " ".join(chosen.split())[:200] or f"it ended with code {self.code}"


@dataclass
class Situation:
    """What the checks know. facts: what the probe found, empty if it did not answer."""

    environ: Mapping[str, str]
    seconds: float = 20.0  # for one tool or one host; a probe of torch gets ten times as long
    platform: Platform | None = None  # the one asked for; None: none was
    options: Options | None = None
    recipe: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe_path: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def accelerator(self) -> str:
        """cuda, npu or cpu: what the run is meant for, else what was found here."""
        return self.platform.accelerator if self.platform else self.facts.get("torch_device", "cpu")

    @property
    def vendor(self) -> str:
        """nvidia | dcu | npu | cpu: whose tools count."""
        if self.platform is None:
            return {"cuda": "nvidia"}.get(self.facts.get("platform", "cpu"), self.facts.get("platform", "cpu"))
        if self.platform.accelerator != "cuda":
            return self.platform.accelerator
        return "dcu" if self.platform.visible_devices == "HIP_VISIBLE_DEVICES" else "nvidia"

    @property
    def several(self) -> bool:
        """Whether more than one node takes part."""
        return bool(self.options and self.options.several)

    @property
    def needs_hostfile(self) -> bool:
        """Whether the launcher will read one; torchrun and Slurm do not."""
        return bool(self.options and (self.options.by_ssh or (self.options.several and self.options.no_ssh)))


def run_tool(words: Sequence[str], seconds: float, environ: Mapping[str, str] | None = None) -> Output | None:
    """Run a program for at most so long, with all that it starts; None if it is not installed."""
    path = shutil.which(words[0], path=(os.environ if environ is None else environ).get("PATH"))
    if path is None:
        return None
    try:
        process = subprocess.Popen(
            [path, *words[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Output(None, errors=f"it cannot be started ({error.strerror})")
    try:
        out, err = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        # Its children too: one that holds the pipe would keep us waiting, and would outlive us.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Output(None, errors=f"it gave no answer within {seconds:g} seconds")
    return Output(code, out.decode(errors="replace"), err.decode(errors="replace"))


def answer_of(output: Output) -> dict[str, Any] | None:
    """The answer in a probe's output; None without one. Libraries print beside it."""
    for line in reversed(output.text.splitlines()):
        if line.startswith(MARK):
            return json.loads(line[len(MARK) :])
    return None


def probe_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a probe: this repository's modules, whatever the working directory holds."""
    path = os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH"))))
    return {**environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def probe(words: Sequence[str], seconds: float, environ: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """Run a part of scripts/doctor/probe.py in a child, so that this process never touches a device: answer, or why none."""
    output = run_tool([sys.executable, "-m", "scripts.doctor.probe", *words], seconds, probe_environment(environ))
    answer = answer_of(output)
    return answer, "" if answer is not None else output.reason


def worst(checks: Sequence[Check]) -> int:
    """Exit code: 2 if anything failed, 1 if there is a warning, else 0."""
    states = {check.state for check in checks}
    return 2 if FAIL in states else 1 if WARN in states else 0
