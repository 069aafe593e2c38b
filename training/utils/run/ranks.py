"""Which process of a run is this one: the variables that torch reads, or those of srun and mpirun in their place.

Without them every process would take itself for a run of one, and all of them would write into one folder. Imports no torch.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import zlib
from collections.abc import MutableMapping

from errors import UserError, refuse


def adopt_ranks(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torch reads, where srun or mpirun started this process and no launcher has set them.

    Raise UserError for variables that contradict each other, and where nobody says how the processes meet.
    """
    if "RANK" not in environ and "OMPI_COMM_WORLD_RANK" in environ:
        adopt_mpi(environ)
    elif "RANK" not in environ and "SLURM_PROCID" in environ and number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        adopt_slurm(environ)
    check_ranks(environ)


def adopt_mpi(environ: MutableMapping[str, str]) -> None:
    """Take ranks from OpenMPI. MASTER_ADDR and MASTER_PORT come from scripts.launch; on one host this module knows them."""
    for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE"):
        environ[name] = environ[f"OMPI_COMM_WORLD_{name}"]
    environ["WORLD_SIZE"] = environ["OMPI_COMM_WORLD_SIZE"]
    alone = environ["LOCAL_SIZE"] == environ["WORLD_SIZE"]
    refuse(
        not alone and "MASTER_ADDR" not in environ,
        "mpirun started processes on several hosts, and MASTER_ADDR does not say where they meet; start the step by "
        "python -m scripts.launch STEP RECIPE --launcher openmpi --hostfile FILE, or add -x MASTER_ADDR=ADDRESS_OF_THE_FIRST_HOST.",
    )
    environ.setdefault("MASTER_ADDR", "127.0.0.1")
    environ.setdefault("MASTER_PORT", job_port(environ.get("PMIX_NAMESPACE", "")))


def adopt_slurm(environ: MutableMapping[str, str]) -> None:
    """Take ranks from srun's step. Raise UserError where its nodes cannot be named."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"])  # 2(x3),1: two on each of three nodes
    sizes = [size for size, nodes in counts for _ in range(int(nodes or 1))]
    environ |= {"RANK": environ["SLURM_PROCID"], "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"]}
    environ |= {"LOCAL_RANK": environ["SLURM_LOCALID"], "LOCAL_SIZE": sizes[int(environ["SLURM_NODEID"])]}
    environ.setdefault("MASTER_PORT", job_port(f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"))
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = "127.0.0.1" if len(sizes) == 1 else first_slurm_node(environ["SLURM_STEP_NODELIST"])


def first_slurm_node(nodes: str) -> str:
    """Return the first host of a list such as node[3-5], by scontrol. Raise UserError where that fails."""
    if not re.search(r"[\[,]", nodes):
        return nodes
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"scontrol cannot name the hosts of {nodes} ({error}); set MASTER_ADDR to the first of them.") from error
    return listed.stdout.split()[0]


def job_port(job: str) -> str:
    """Return a port that all processes of a job work out alike: two jobs on one node seldom share it, as they would 29500.

    From 20000 up, below the ports that Linux gives to outgoing connections (32768).
    """
    return str(20000 + zlib.crc32(job.encode()) % 10000)


def check_ranks(environ: MutableMapping[str, str]) -> None:
    """Raise UserError for ranks and an address that cannot be: torch has a traceback for them, or waits for half an hour."""
    world = number(environ, "WORLD_SIZE", 1, least=1)
    for name in ("RANK", "LOCAL_RANK"):
        rank = number(environ, name, 0)
        refuse(rank >= world, f"{name}={rank} in the environment with WORLD_SIZE={world}: ranks count from 0; unset both.")
    if world == 1:
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        refuse(
            not environ.get(name),
            f"WORLD_SIZE={world} in the environment without {name}: start the step by deepspeed, torchrun or "
            "scripts.launch, which set all of them, or unset it for one process.",
        )
    port = number(environ, "MASTER_PORT", 0, least=1)
    refuse(port > 65535, f"MASTER_PORT={port} in the environment is no port; give a number from 1 to 65535.")


def number(environ: MutableMapping[str, str], name: str, default: int, least: int = 0) -> int:
    """Return a whole number of the environment. Raise UserError for anything else."""
    text = environ.get(name) or str(default)
    refuse(
        not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least,
        f"{name}={text} in the environment: expected a whole number from {least} up; a launcher sets it: correct or unset it.",
    )
    return int(text)


def check_alone(environ: MutableMapping[str, str] = os.environ) -> None:
    """Raise UserError for one process in a shell of a Slurm allocation of several tasks: the others would stay idle."""
    tasks = number(environ, "SLURM_NTASKS", 1)
    refuse(
        tasks > 1 and "RANK" not in environ and "SLURM_STEP_NUM_TASKS" not in environ,
        f"this is one process on {socket.gethostname()}, in a Slurm allocation of {tasks} tasks: put srun before the command to "
        "start them all, or unset SLURM_NTASKS for a run of one process.",
    )
