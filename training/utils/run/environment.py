"""What a run meets outside itself: ports, folders, the container, the environment that launchers leave. Imports no torch."""

from __future__ import annotations

import math
import os
import socket
import uuid
from collections.abc import MutableMapping
from pathlib import Path

from errors import UserError

DONE = "sanbu_done.json"  # written into the output folder by a step that came to its end


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_writable(folder: Path) -> None:
    """Raise UserError unless files can be written under the folder, which is made if it is absent."""
    probe = folder / f".writable-{uuid.uuid4().hex}"   # process numbers are the same in many containers
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output_dir {folder} cannot be written ({error.strerror}); name a folder where you may create files."
        ) from error


def container_limit(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Bytes that the container may take, cgroup version 2 or 1; None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = root / name
        if path.is_file() and (text := path.read_text().strip()).isdigit() and int(text) < 2**60:
            return float(text)
    return None


def container_free(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the container may still take; infinite without a limit. Cached files count as free, as for the whole host."""
    limit = container_limit(root)
    if limit is None:
        return math.inf
    for taken, figures, version in (
        ("memory.current", "memory.stat", ""), ("memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):  # fmt: skip
        try:
            used = float((root / taken).read_text())
            stat = dict(line.split() for line in (root / figures).read_text().splitlines())
        except (OSError, ValueError):   # the other version's, or a kernel that does not say
            continue
        cached = sum(float(stat.get(f"{version}{kind}_file", 0)) for kind in ("active", "inactive"))
        return max(limit - used + cached, 0.0)
    return limit


def adopt_mpi_ranks(environ: MutableMapping[str, str] = os.environ) -> None:
    """Under OpenMPI's mpirun, which numbers its processes by variables of its own, set those that torch reads.

    Without it every process would take itself for a run of one. MASTER_ADDR and MASTER_PORT come from scripts/launch/__main__.py.
    """
    if "RANK" in environ or "OMPI_COMM_WORLD_RANK" not in environ:
        return
    for ours, theirs in (("RANK", "RANK"), ("LOCAL_RANK", "LOCAL_RANK"), ("WORLD_SIZE", "SIZE"), ("LOCAL_SIZE", "LOCAL_SIZE")):
        environ[ours] = environ[f"OMPI_COMM_WORLD_{theirs}"]
