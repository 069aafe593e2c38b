"""Start the steps as a user does: real DeepSpeed, real processes, on the CPU."""

import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steps import STEPS
from training.utils.run.environment import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
# What a process group in the tests' own process leaves in the environment; its port stays taken.
OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """A user's environment for a CPU run: one thread a process, no hub."""
    names = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
    return inherited | names | {"PYTHONPATH": str(REPOSITORY)} | more


PRELOADED = ["torch", "deepspeed", "transformers", "datasets", "peft", *(step.module for step in STEPS)]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)


def _run(module: str, flags: list[str], names: dict[str, str], output: Path) -> None:
    """Do in a forked process what ``python -m module`` (or ``python file.py``) does in a new one."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    gc.freeze()  # what is imported is never looked through again: 0.4 s of each run
    os.environ.clear()
    os.environ.update(names)
    os.chdir(REPOSITORY)
    sys.argv = [module, *flags]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(module: str, flags: list[str], processes: int = 1, nodes: int = 1, **env: str) -> subprocess.CompletedProcess:
    """Run a step to its end, whatever the end.

    The processes are forked from one that has the packages imported (``PRELOADED``), with the environment that the
    deepspeed launcher gives. Tests of the launchers themselves start new interpreters.
    """
    on_each = processes // nodes
    group = {"WORLD_SIZE": str(processes), "LOCAL_SIZE": str(on_each)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank % on_each)}
            names = environment(**(group | place if processes > 1 else {})) | env
            words = [f"--local_rank={rank % on_each}", *flags] if processes > 1 else flags
            ranks.append(FORKS.Process(target=_run, args=(module, words, names, Path(folder) / str(rank))))
            ranks[-1].start()
        running, deadline = list(ranks), time.monotonic() + 1200
        while running:
            multiprocessing.connection.wait([rank.sentinel for rank in running], timeout=deadline - time.monotonic())
            ended = [rank for rank in running if not rank.is_alive()]
            running = [rank for rank in running if rank.is_alive()]
            if not ended or any(rank.exitcode for rank in ended):  # out of time, or one failed: the others would wait for ever
                for rank in running:
                    rank.terminate()
        out, error = (
            "".join(Path(folder, f"{rank}.{name}").read_text() for rank in range(processes)) for name in ("stdout", "stderr")
        )
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    return subprocess.CompletedProcess([module, *flags], code, out, error)


def succeed(module: str, flags: list[str], processes: int = 1, **env: str) -> str:
    """Run a step that must end well; returns what it printed."""
    done = start(module, flags, processes, **env)
    assert done.returncode == 0, f"{module} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def logged(folder: Path, name: str) -> list[float]:
    """The values of one key of metrics.jsonl in the order of the steps."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record[name] for record in records if name in record]


def write_pairs(file: Path, count: int) -> Path:
    """A JSONL file of ``count`` different preference pairs whose answers differ in length."""
    rows = (
        {"prompt": f"What is {i} plus 1?", "chosen": f"It is {i + 1}." + " Good!" * (i % 4), "rejected": f"No idea, {i}?"}
        for i in range(count)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
