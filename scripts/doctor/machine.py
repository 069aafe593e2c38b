"""This machine and the run: platform, dtypes, memory, disk, and processes that can talk to each other."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from errors import UserError
from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Situation, probe
from steps import SECTIONS
from training.utils.flags.recipe import Recipe
from training.utils.memory.arithmetic import GIB, Machine
from training.utils.memory.container import container_limit
from training.utils.run.environment import free_port

if TYPE_CHECKING:  # it imports torch, which may be broken here
    from training.utils.memory.fit import SectionPlan

Plans = Mapping[str, "SectionPlan | UserError"]  # by section
SHM_LITTLE = 1 * GIB  # Docker gives 64 MB; 8 data workers and NCCL's rings want more
BUSY = 0.1  # of a card's memory, taken by others


def check_platform(situation: Situation) -> list[Check]:
    """Compare the platform that torch finds with the one that is asked for, and look for cards that others use."""
    facts, wanted = situation.facts, situation.platform
    if "platform" not in facts:
        todo = "pip install -r requirements.txt, or the vendor's torch, into this Python"
        return [Check("platform", "detected", FAIL, f"torch cannot be asked: {facts.get('error', 'no answer')}", todo)]
    kinds = [f"{kind.upper()} {version}" for kind, version in facts["build"].items() if version]
    cards = facts.get("cards", [])
    why = f"{facts['platform']}: torch is a {(kinds or ['CPU'])[0]} build and sees {len(cards)} cards"
    todo = "check driver and torch build (the vendor's wheel), or choose another recipe or --platform"
    if facts.get("refused"):
        return [Check("platform", "detected", FAIL, facts["refused"], f"{why}; {todo}")]
    if wanted and wanted.accelerator != facts["torch_device"]:
        return [Check("platform", "detected", FAIL, f"{why}, but {wanted.name} needs {wanted.accelerator}", todo)]
    if situation.vendor != facts["platform"]:
        todo = "choose the recipe for this machine: dtypes and variables differ"
        return [Check("platform", "detected", WARN, f"{why}, but {wanted.name} is {wanted.title}", todo)]
    checks = [Check("platform", "detected", OK, why)]
    processes = (situation.options and situation.options.processes) or 0
    if error := facts.get("cards_error"):
        checks.append(Check("platform", "cards", FAIL, f"they do not answer: {error}", "check the driver"))
    elif situation.accelerator != "cpu" and not situation.several and processes > len(cards):
        todo = f"--num_gpus {len(cards)}, or show more of them"
        checks.append(Check("platform", "cards", FAIL, f"the run wants {processes}, torch sees {len(cards)}", todo))
    for index, card in enumerate(cards):
        size = f", {card['free'] / GIB:.1f} of {card['total'] / GIB:.1f} GiB free" if card["total"] else ""
        busy = bool(card["total"]) and card["free"] < (1 - BUSY) * card["total"]
        todo = "another process uses it: end that one, or choose other cards" if busy else ""
        why = f"{card['name']} ({card['chip']}){size}"
        checks.append(Check("platform", f"card {index}", WARN if busy else OK, why, todo))
    return checks


def check_dtype(situation: Situation) -> list[Check]:
    """Compare what the chip can train in, by table and by trial, with the recipe."""
    found, error = situation.facts.get("dtypes"), situation.facts.get("dtypes_error")
    if found is None:
        state = FAIL if error else SKIP
        return [Check("dtype", "probe", state, error or "torch gave no answer", "see the platform above")]
    able = [name for name in found["table"] if name == "fp32" or found["works"][name]]
    broken = [name for name in found["table"] if name not in able]
    why = f"{found['chip']} trains in {', '.join(able)}; --attn_implementation auto is {found['attention']}"
    if broken:
        why += f"; {', '.join(broken)} is in the table, but a product in it came out wrong"
    checks = [Check("dtype", "probe", WARN if broken else OK, why, "update driver and torch" if broken else "")]
    sections = situation.recipe.sections if situation.recipe else {}
    asked = {name: values.get("dtype", "auto") for name, values in sections.items() if name != "launch"}
    wrong = ", ".join(f"{name}: {dtype}" for name, dtype in asked.items() if dtype not in (*able, "auto"))
    if wrong:
        checks.append(Check("dtype", "recipe", FAIL, f"{wrong} on {found['chip']}", f"--dtype {able[0]}, or auto"))
    if found["first_ascend"]:
        why = f"{found['chip']} is of the FIRST Ascend 910 generation: it has no infinity, DeepSpeed sees no overflow"
        todo = "in fp16 watch loss_scale: the overflow flag decides; if every step is skipped, see docs/en/launching.md"
        checks.append(Check("dtype", "overflow", WARN, why, todo))
    return checks


def run_machine(situation: Situation) -> Machine:
    """Return the machine of the memory plan: this one if it is of the recipe's kind, else that of platforms.yaml."""
    from scripts.plan.section import platform_machine

    platform, options, facts = situation.platform, situation.options, situation.facts
    per_node = options.processes or min(options.hosts.values(), default=platform.devices)
    machine = platform_machine(platform, nodes=options.nodes, per_node=per_node)
    if facts.get("torch_device") != platform.accelerator:
        return machine
    card = min((one["total"] for one in facts.get("cards", []) if one["total"]), default=machine.device_memory)
    host = min(psutil.virtual_memory().total, container_limit() or math.inf)
    return replace(machine, device_memory=card, host_memory=host)


def plans_of(situation: Situation) -> Plans:
    """Return the memory plans of the recipe's sections; none without a recipe, or where torch does not answer."""
    if not (situation.recipe and situation.options and "platform" in situation.facts):
        return {}
    from scripts.plan.section import plan_sections  # imports torch

    return plan_sections(situation.recipe, situation.platform, run_machine(situation))


def check_models(recipe: Recipe) -> list[Check]:
    """Say of each section of a recipe whose model, or flags, are wrong why it cannot be planned. Imports no torch."""
    from scripts.plan.section import check_section

    checks = []
    for section in (name for name in SECTIONS if name in recipe.sections):
        try:
            check_section(recipe, section)
        except UserError as error:
            checks.append(unplanned(section, error))
    return checks


def unplanned(section: str, error: UserError) -> Check:
    """Return the finding about a section that cannot be planned."""
    todo = "make or download the model first, or correct the recipe"
    return Check("memory", section, WARN, f"cannot be computed: {error}", todo)


def check_memory(plans: Plans) -> list[Check]:
    """Say of each section of the recipe whether it fits."""
    checks = []
    for section, found in plans.items():
        if isinstance(found, UserError):
            checks.append(unplanned(section, found))
            continue
        plan, machine = found.plan, found.machine
        why = f"{plan.on_host / GIB:.1f} of {machine.host_memory / GIB:.1f} GiB on the host"
        if machine.accelerator:
            why = f"{plan.on_card / GIB:.1f} of {machine.device_memory / GIB:.1f} GiB a card, {why}"
        state = {"fits": OK, "tight": WARN, "no": FAIL}[plan.verdict]
        todo = found.refusal or ("halve the micro-batch if it runs out of memory" if state == WARN else "")
        checks.append(Check("memory", section, state, f"computed: {why}", todo))
    return checks or [Check("memory", "recipe", SKIP, "no recipe is given (--recipe)")]


def disk_bytes(found: SectionPlan, keep: int) -> float:
    """Return the bytes that a section writes: the checkpoints it keeps, one more while that is written, and the model.

    A checkpoint holds of what is trained the float32 weights and Adam's two moments, 12 bytes a weight.
    """
    memory = found.memory
    counts = [memory.network(role).weights for role in memory.trained]
    states = sum(12 * one.trained for one in counts)
    return states * ((keep or 2) + 1) + sum(memory.element * one.total for one in counts)


def check_disk(situation: Situation, plans: Plans) -> list[Check]:
    """Compare free space with the checkpoints of the recipe. DPO replaces reward and ppo: the larger counts."""
    sizes: dict[str, float] = {}
    folder = Path()
    for section, found in plans.items():
        if not isinstance(found, UserError):
            flags = situation.recipe.sections[section]
            sizes[section] = disk_bytes(found, int(flags.get("save_total_limit", 2)))
            folder = Path(str(flags.get("output_dir", "."))).absolute()
    if not sizes:
        return []
    folder = next(path for path in (folder, *folder.parents) if path.is_dir())
    needed = sizes.get("sft", 0) + max(sizes.get("dpo", 0), sizes.get("reward", 0) + sizes.get("ppo", 0))
    free = shutil.disk_usage(folder).free
    why = f"{folder}: {free / 1e9:.0f} GB free, checkpoints and models of all steps take up to {needed / 1e9:.0f} GB"
    if free > needed:
        return [Check("disk", "checkpoints", OK, why)]
    todo = "--output_dir on a larger disk, a lower --save_total_limit, or remove a step's checkpoints first"
    return [Check("disk", "checkpoints", WARN if free > max(sizes.values()) else FAIL, why, todo)]


def check_shm(path: Path = Path("/dev/shm")) -> Check:
    """Look at shared memory: containers have little of it."""
    if not path.is_dir():
        return Check("disk", "/dev/shm", SKIP, f"{path} is not here")
    free = shutil.disk_usage(path).free
    if free >= SHM_LITTLE:
        return Check("disk", "/dev/shm", OK, f"{free / GIB:.2f} GiB free")
    why = f"{free / GIB:.2f} GiB free: data workers and NCCL may end with a bus error"
    todo = "docker run --shm-size 16g; Kubernetes: an emptyDir with medium Memory; else NCCL_SHM_DISABLE=1"
    return Check("disk", "/dev/shm", WARN, why, todo)


def check_all_reduce(situation: Situation) -> Check:
    """Sum over two processes on the platform's backend; over one with a single card: NCCL wants a card for each."""
    backend, cards = situation.facts.get("backend"), len(situation.facts.get("cards", []))
    if backend is None:
        return Check("communication", "all-reduce", SKIP, "torch gave no answer")
    count = 2 if backend == "gloo" or cards > 1 else 1
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_addr", "127.0.0.1"]
    launcher += ["--master_port", str(free_port())]
    _, why = probe("all_reduce", backend, situation=situation, launcher=launcher)
    if not why:
        return Check("communication", "all-reduce", OK, f"{backend}, processes: {count}; the sum is right")
    todo = {
        "gloo": "set GLOO_SOCKET_IFNAME to an interface that exists (lo on one machine)",
        "nccl": "NCCL_DEBUG=INFO says why; try NCCL_P2P_DISABLE=1, NCCL_SHM_DISABLE=1, and NCCL_SOCKET_IFNAME",
        "hccl": "check HCCL_IF_IP or HCCL_SOCKET_IFNAME, and that the ports 60000 to 60031 and 16666 are free",
    }
    return Check("communication", "all-reduce", FAIL, f"{backend}: {why}", todo[backend])
