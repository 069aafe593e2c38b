"""What the run will need of this machine: memory, disk, shared memory, limits, and processes that can talk to each other."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Output, Situation, answer_of, probe, probe_environment
from training.utils.memory.container import container_limit
from training.utils.run.environment import free_port

GIB = 2**30
SHM_LITTLE = 1 * GIB  # Docker gives 64 MB; 8 data workers and NCCL's rings want more
OPEN_FILES = 4096
SUM_OF_TWO = 3 * 255 * 256 / 2  # what scripts/doctor/probe.py adds up


# --- memory -----------------------------------------------------------------------------------------------------------


def host_memory() -> float | None:
    """Bytes of memory of this machine; None where nobody can tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return None


def machine_fields(situation: Situation) -> dict[str, Any] | None:
    """The machine that the memory plan is made for: what is here where it is the recipe's kind, else what the platform says."""
    platform, options, facts = situation.platform, situation.options, situation.facts
    if platform is None or options is None:
        return None
    per_node = options.processes or (min(options.hosts.values()) if options.hosts else platform.devices)
    card, host = platform.device_memory_gib * GIB, platform.host_memory_gib * GIB
    if facts.get("torch_device") == platform.accelerator:
        sizes = [one["total"] for one in facts.get("cards", []) if one.get("total")]
        card = min(sizes) if sizes else card
        host = min(filter(None, (host_memory(), container_limit())), default=host)
    return {
        "devices": per_node * options.nodes, "per_node": per_node, "device_memory": card if platform.accelerator != "cpu" else 0.0,
        "host_memory": host, "accelerator": platform.accelerator != "cpu", "platform": platform.name,
    }  # fmt: skip


def plan_recipe(situation: Situation) -> tuple[dict[str, dict], str]:
    """What each section of the recipe takes, by the memory plan in a child; and why there is none."""
    fields = machine_fields(situation)
    if situation.recipe_path is None or fields is None:
        return {}, "no recipe is given (--recipe)"
    answer, why = probe(
        ["memory", situation.recipe_path, json.dumps(fields)], situation.seconds * 10, situation.environ
    )
    return (answer or {}), why


def check_memory(situation: Situation, plans: dict[str, dict], why_none: str) -> list[Check]:
    """Does each section of the recipe fit."""
    if not plans:
        state = FAIL if situation.recipe_path and why_none else SKIP
        todo = "python -m scripts.plan says more" if state == FAIL else ""
        return [Check("memory", "recipe", state, why_none or "the recipe has no step", todo)]
    fields = machine_fields(situation) or {}
    checks = []
    for section, plan in plans.items():
        if "error" in plan:
            todo = (
                "make or download the model first, or correct the recipe"
                if "known" in plan["error"]
                else "correct the recipe"
            )
            checks.append(Check("memory", section, WARN, f"cannot be computed: {plan['error']}", todo))
            continue
        card = (
            f"{plan['card'] / GIB:.1f} of {fields['device_memory'] / GIB:.1f} GiB a card, "
            if fields["accelerator"]
            else ""
        )
        why = f"computed: {card}{plan['host'] / GIB:.1f} of {fields['host_memory'] / GIB:.1f} GiB on the host"
        state = {"fits": OK, "tight": WARN, "no": FAIL}[plan["verdict"]]
        todo = plan["refusal"] or ("halve the micro-batch if it runs out of memory" if state == WARN else "")
        checks.append(Check("memory", section, state, why, todo))
    return checks


# --- disk, shared memory, limits --------------------------------------------------------------------------------------


def disk_bytes(plan: dict[str, Any]) -> float:
    """Bytes that a section writes: the checkpoints it keeps, one more while that is written, and the model itself.

    A checkpoint holds the weights and, of what is trained, Adam's two moments and under 16 bits the float32 masters:
    14 bytes a weight that is trained in 16 bits.
    """
    element = 4 if plan["dtype"] == "fp32" else 2
    state = 8 if plan["dtype"] == "fp32" else 12
    checkpoint = sum(element * count + state * plan["trained"][role] for role, count in plan["weights"].items())
    return checkpoint * ((plan["keep"] or 2) + 1) + sum(element * count for count in plan["weights"].values())


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_disk(situation: Situation, plans: dict[str, dict]) -> list[Check]:
    """Free space where the recipe writes, against its checkpoints. DPO stands in place of reward and ppo, so the larger counts."""
    where: dict[int, tuple[Path, dict[str, float]]] = {}
    for section, plan in plans.items():
        if "error" not in plan:
            folder = existing(Path(str(situation.recipe.get(section, {}).get("output_dir", "."))))
            where.setdefault(folder.stat().st_dev, (folder, {}))[1][section] = disk_bytes(plan)
    checks = []
    for folder, sizes in where.values():
        needed = sizes.get("sft", 0) + max(sizes.get("dpo", 0), sizes.get("reward", 0) + sizes.get("ppo", 0))
        free = shutil.disk_usage(folder).free
        why = (
            f"{folder}: {free / 1e9:.0f} GB free, checkpoints and models of all steps take up to {needed / 1e9:.0f} GB"
        )
        state = OK if free > needed else WARN if free > max(sizes.values()) else FAIL
        todo = (
            ""
            if state == OK
            else "--output_dir on a larger disk, a lower --save_total_limit, or remove a step's checkpoints first"
        )
        checks.append(Check("disk", "checkpoints", state, why, todo))
    if not checks:
        free = shutil.disk_usage(Path.cwd()).free
        checks.append(
            Check("disk", "checkpoints", SKIP, f"{free / 1e9:.0f} GB free here; what is needed is told with --recipe")
        )
    return checks


def check_shm(path: Path = Path("/dev/shm")) -> Check:
    """Shared memory, which containers have little of."""
    if not path.is_dir():
        return Check("disk", "/dev/shm", SKIP, f"{path} is not here")
    usage = shutil.disk_usage(path)
    why = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free"
    if usage.free < SHM_LITTLE:
        todo = "docker run --shm-size 16g or --ipc host; Kubernetes: an emptyDir with medium Memory; else NCCL_SHM_DISABLE=1"
        return Check("disk", "/dev/shm", WARN, f"{why}: data workers and NCCL may end with a bus error", todo)
    return Check("disk", "/dev/shm", OK, why)


def check_limits(situation: Situation, plans: dict[str, dict]) -> list[Check]:
    """ulimit -n and -l."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    enough = soft == unlimited or soft >= OPEN_FILES
    why = f"{'unlimited' if soft == unlimited else soft} open files (ulimit -n)"
    todo = "" if enough else f"ulimit -n {OPEN_FILES if hard == unlimited else min(hard, 65536)} before the start"
    checks = [Check("limits", "open files", OK if enough else WARN, why, todo)]
    if situation.accelerator == "cpu":
        return [*checks, Check("limits", "locked memory", SKIP, "nothing is pinned on a CPU")]
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    needed = any(plan.get("offload") for plan in plans.values()) or situation.several
    if soft == unlimited or not needed:
        size = "unlimited" if soft == unlimited else f"{soft // 1024} KiB, enough without offload and RDMA"
        return [*checks, Check("limits", "locked memory", OK, f"{size} (ulimit -l)")]
    why = f"{soft // 1024} KiB (ulimit -l): RDMA and some drivers cannot pin their buffers"
    return [
        *checks,
        Check(
            "limits", "locked memory", WARN, why, "ulimit -l unlimited; in a container --ulimit memlock=-1 or IPC_LOCK"
        ),
    ]


# --- two processes ----------------------------------------------------------------------------------------------------


def run_ranks(backend: str, count: int, seconds: float, environ: Mapping[str, str]) -> list[Output]:
    """``count`` processes of the probe that form a group on this machine, each ended after so many seconds."""
    port, deadline = str(free_port()), time.monotonic() + seconds
    shared = {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    command = [sys.executable, "-m", "scripts.doctor.probe", "all_reduce", backend, str(seconds)]
    started = [
        subprocess.Popen(
            command, env={**probe_environment(environ), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    outputs = []
    try:
        for process in started:
            try:
                out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                outputs.append(Output(process.returncode, out, err))
            except subprocess.TimeoutExpired:
                outputs.append(Output(None, errors=f"it gave no answer within {seconds:g} seconds"))
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return outputs


def check_all_reduce(situation: Situation) -> Check:
    """A sum over two processes on the backend of the platform; with a single card over one, since NCCL wants a card for each."""
    facts = situation.facts
    if "backend" not in facts:
        return Check("communication", "all-reduce", SKIP, "torch gave no answer")
    backend, cards = facts["backend"], len(facts.get("cards", []))
    count = 2 if backend == "gloo" or cards > 1 else 1
    outputs = run_ranks(backend, count, situation.seconds * 6, situation.environ)
    return judge_all_reduce(backend, count, outputs)


def judge_all_reduce(backend: str, count: int, outputs: list[Output]) -> Check:
    """What the processes said, compared with the sum that is known."""
    todo = {
        "gloo": "set GLOO_SOCKET_IFNAME to an interface that exists (lo on one machine)",
        "nccl": "NCCL_DEBUG=INFO says why; try NCCL_P2P_DISABLE=1, NCCL_SHM_DISABLE=1, and NCCL_SOCKET_IFNAME",
        "hccl": "check HCCL_IF_IP or HCCL_SOCKET_IFNAME, and that the ports 60000 to 60031 and 16666 are free",
    }.get(backend, "")
    expected = SUM_OF_TWO if count == 2 else SUM_OF_TWO / 3
    for rank, output in enumerate(outputs):
        answer = answer_of(output)
        if answer is None:
            return Check(
                "communication", "all-reduce", FAIL, f"{backend}, process {rank} of {count}: {output.reason}", todo
            )
        if answer["sum"] != expected:
            why = f"{backend}: process {rank} of {count} has the sum {answer['sum']:g}, not {expected:g}"
            return Check("communication", "all-reduce", FAIL, why, todo)
    alone = " (one card, so one process)" if count == 1 else ""
    return Check(
        "communication",
        "all-reduce",
        OK,
        f"{backend}, {count} process{'es' if count > 1 else ''}: the sum is right{alone}",
    )
