"""Start the steps as a user does: real DeepSpeed, real processes, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from training.utils.run.environment import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
# What a process group in the tests' own process leaves in the environment; its port stays taken.
OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """A user's environment for a CPU run: one thread a process, no hub."""
    names = {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
    return inherited | names | more


def command(module: str, flags: list[str], processes: int = 1) -> list[str]:
    """``python -m module …`` for one process, ``deepspeed --num_gpus N --module …`` for more."""
    if processes == 1:
        return [sys.executable, "-m", module, *flags]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)]
    return [*launcher, "--master_port", str(free_port()), "--module", module, *flags]


def start(module: str, flags: list[str], processes: int = 1, **env: str) -> subprocess.CompletedProcess:
    """Run a step to its end, whatever the end."""
    return subprocess.run(
        command(module, flags, processes), cwd=REPOSITORY, env=environment(**env), capture_output=True, text=True, timeout=500
    )


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
