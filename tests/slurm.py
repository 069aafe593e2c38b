"""A real Slurm on this machine: munged, slurmctld and two slurmd on loopback, started for a test and stopped after it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launching import REPOSITORY, environment
from training.utils.run.environment import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
ADMIN = "/usr/sbin:/usr/bin:/bin"  # where Debian puts them
MISSING = "Slurm is not installed (Debian: slurm-wlm munge), or the tests do not run as root"
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
SlurmdParameters=config_overrides
KillWait=30
NodeName=na NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=4 State=UNKNOWN
NodeName=nb NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=na,nb Default=YES MaxTime=INFINITE State=UP
"""


def is_installed() -> bool:
    """Whether the daemons are there and may be started."""
    return os.geteuid() == 0 and all(shutil.which(name, path=ADMIN) for name in DAEMONS)


@dataclass
class Cluster:
    """Two nodes, na and nb, of one Slurm. folder: where commands run."""

    folder: Path
    env: dict[str, str]

    def run(self, *words: str, seconds: float = 300) -> subprocess.CompletedProcess:
        """Run a command to its end, whatever the end."""
        return subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=seconds)

    def submit(self, *words: str, asked: Sequence[str] = ()) -> str:
        """Hand scripts/slurm.sbatch to sbatch, asked for more; returns the number of the job. It prints to sanbu-NUMBER.log."""
        small = ["--parsable", "--cpus-per-task=1", "--gres=none", *asked]
        done = self.run("sbatch", *small, str(REPOSITORY / "scripts/slurm.sbatch"), *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start_again(self, job: str, *changes: str) -> None:
        """Start a job that goes back to the queue now, and not in two minutes.

        Not at once: of a new start within the second of the old one's end slurmd says "Job credential revoked".
        """
        self.until(job, "PENDING")
        time.sleep(2)
        assert self.run("scontrol", "update", f"JobId={job}", "StartTime=now", *changes).returncode == 0

    def log(self, job: str) -> str:
        """Return what a job has printed so far."""
        file = self.folder / f"sanbu-{job}.log"
        return file.read_text(errors="replace") if file.is_file() else ""

    def state(self, job: str) -> tuple[str, str]:
        """Return the state of a job, such as RUNNING, and its exit code, such as 143:0."""
        words = dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", job).stdout.split())
        return words["JobState"], words["ExitCode"]

    def until(self, job: str, *states: str, text: str = "", seconds: float = 300) -> str:
        """Wait until a job is in one of the states, and has printed a text; returns its exit code."""
        ends = time.monotonic() + seconds
        while True:
            state, code = self.state(job)
            if state in states and text in self.log(job):
                return code
            assert time.monotonic() < ends, f"job {job} is {state} after {seconds:.0f} s\n{self.log(job)[-6000:]}"
            time.sleep(0.5)


@contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """Start Slurm; nothing of it is left at the end."""
    port, *ports = (free_port() for _ in range(3))
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname().split(".")[0], port=port, folder=folder, ports=ports))
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    for name in ("na", "nb"):
        (folder / f"spool-{name}").mkdir()
    env = environment(SLURM_CONF=str(conf), SANBU_CACHE=str(folder / "cache"), SANBU_ROOT=str(REPOSITORY), MASTER_ADDR="127.0.0.1")
    env["PATH"] = f"{env['PATH']}:{ADMIN}"
    munge = {"socket": folder / "munge", "key-file": folder / "key", "log-file": folder / "munge.log"}
    munge |= {"pid-file": folder / "munge.pid", "seed-file": folder / "seed"}
    daemons = [["munged", "--foreground", "--force", *(f"--{name}={value}" for name, value in munge.items())]]
    daemons += [["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "na"], ["slurmd", "-D", "-N", "nb"]]
    running: list[subprocess.Popen] = []
    try:
        with (folder / "daemons.log").open("wb") as log:
            for words in daemons:
                running.append(subprocess.Popen(words, env=env, stdout=log, stderr=log))
                time.sleep(0.5)
        cluster = Cluster(folder, env)
        ends = time.monotonic() + 60
        while cluster.run("sinfo", "--noheader", "--format=%T").stdout.split() != ["idle"]:
            assert time.monotonic() < ends, (folder / "daemons.log").read_text() + (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield cluster
    finally:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            subprocess.run(["scancel", "--user=root"], env=env, timeout=30)
        for daemon in reversed(running):
            daemon.terminate()
        for daemon in running:
            daemon.wait(60)
