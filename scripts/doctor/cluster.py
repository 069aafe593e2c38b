"""Several nodes and the shell: hostfile, port, answers of the hosts over ssh, and variables that mislead a run."""

from __future__ import annotations

import contextlib
import difflib
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from errors import UserError
from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Situation, ask
from scripts.launch.commands import FORWARDED, build_environment, master_address
from scripts.launch.hostfile import is_loopback, read_hostfile, resolved
from scripts.launch.options import DEFAULT_HOSTFILE, DEFAULT_PORT
from scripts.launch.platforms import variable_reasons

HCCL_PORTS = 60000  # the first of 32; HCCL_IF_BASE_PORT moves them
CLOCKS_APART = 30  # seconds
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
READ_BY = {"cuda": VISIBLE[:1], "dcu": VISIBLE[:3], "npu": VISIBLE[3:], "cpu": ()}
# Names that users misspell, beside those of configs/platforms.yaml.
KNOWN = (
    *VISIBLE,
    *("DS_ACCELERATOR", "MASTER_ADDR", "MASTER_PORT", "HF_HUB_OFFLINE", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"),
    *(
        "GLOO_SOCKET_IFNAME",
        "CUDA_HOME",
        "ROCM_HOME",
        "OMP_NUM_THREADS",
        "DEEPSPEED_TIMEOUT",
        "PYTORCH_CUDA_ALLOC_CONF",
    ),
)


def check_hostfile(path: str | None, situation: Situation) -> tuple[list[Check], dict[str, int]]:
    """Read the hostfile. Return the finding, and its hosts."""
    options = situation.options
    if path is None and not (options and (options.by_ssh or (options.several and options.no_ssh))):
        return [Check("cluster", "hostfile", SKIP, "none is given, and none is needed")], {}
    if path is None and not Path(DEFAULT_HOSTFILE).is_file():
        todo = "--hostfile FILE with a line NAME slots=N for each node; torchrun and Slurm need none"
        return [
            Check("cluster", "hostfile", WARN, f"several nodes, but no --hostfile and no {DEFAULT_HOSTFILE}", todo)
        ], {}
    try:
        hosts = read_hostfile(path or DEFAULT_HOSTFILE)
    except UserError as error:
        return [Check("cluster", "hostfile", FAIL, str(error), "correct that line")], {}
    return [Check("cluster", "hostfile", OK, f"{path}: {len(hosts)} hosts, {sum(hosts.values())} processes")], hosts


def port_error(port: int) -> str | None:
    """Return the reason why nobody can listen on a port of this machine; None for a free one."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def master_port(situation: Situation) -> int | None:
    """Return the port that the run will listen on; None where the launcher takes any that is free."""
    given = situation.options.master_port if situation.options else None
    return given or (DEFAULT_PORT if situation.several else None)


def check_ports(situation: Situation) -> list[Check]:
    """Look whether the master's port, and on Ascend HCCL's, are free."""
    port, checks = master_port(situation), []
    if port is None:
        checks.append(Check("cluster", "port", SKIP, "one machine: the launcher takes a free one"))
    elif why := port_error(port):
        todo = "another run may use it: --master_port with another number"
        checks.append(Check("cluster", "port", FAIL, f"{port}: {why}", todo))
    else:
        checks.append(Check("cluster", "port", OK, f"{port} is free here"))
    if situation.accelerator == "npu":
        first = int(situation.environ.get("HCCL_IF_BASE_PORT", HCCL_PORTS))
        taken = [str(one) for one in range(first, first + 32) if port_error(one)]
        todo = "reserve them by net.ipv4.ip_local_reserved_ports, or set HCCL_IF_BASE_PORT" if taken else ""
        why = f"{first} to {first + 31}: taken are {', '.join(taken) or 'none'}"
        checks.append(Check("cluster", "HCCL ports", WARN if taken else OK, why, todo))
    return checks


def check_address(situation: Situation, hosts: Mapping[str, int]) -> tuple[list[Check], str | None]:
    """Look whether others can reach the first node by its name. Return findings, and our own address if it is one."""
    address = master_address(situation.options, situation.environ) if situation.options else next(iter(hosts))
    if not address or len(hosts) < 2:
        return [], None
    todo = "--master_addr with the IP of the first node that the others see"
    try:
        number = resolved(address)[1]
    except OSError as error:
        return [Check("cluster", "master address", FAIL, f"{address} does not resolve here ({error})", todo)], None
    if is_loopback(number) and not (situation.options and situation.options.master_addr):
        why = f"{address} is {number} here, which no other node can reach"
        return [Check("cluster", "master address", FAIL, why, todo)], None
    ours = any(number == one.address for addresses in psutil.net_if_addrs().values() for one in addresses)
    return [Check("cluster", "master address", OK, f"{address} is {number}")], address if ours else None


def check_hosts(situation: Situation, hosts: Mapping[str, int]) -> list[Check]:
    """Ask every host of the hostfile over ssh, all at the same time, where the launcher will use ssh."""
    options = situation.options
    if not hosts or (options and options.several and not options.by_ssh):
        return [Check("cluster", "hosts", SKIP, "ssh is not used" if hosts else "no hosts are named")]
    if shutil.which("ssh", path=situation.environ.get("PATH")) is None:
        todo = "install it, or use --launcher torchrun or --no_ssh"
        return [Check("cluster", "hosts", SKIP, "ssh is not installed", todo)]
    checks, address = check_address(situation, hosts)
    port = master_port(situation)
    words = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, int(situation.seconds / 2))}"]
    words += ["-p", str(options.ssh_port)] if options and options.ssh_port else []
    with contextlib.ExitStack() as stack:
        back = ""
        if port and address and not port_error(port):  # only the first node listens here; the backlog accepts for us
            stack.enter_context(socket.create_server(("", port), backlog=128))
            back = f" {address} {port}"
        question = (
            f"cd {shlex.quote(str(Path.cwd()))} && {shlex.quote(sys.executable)} -m scripts.doctor.probe host{back}"
        )
        with ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda host: ask([*words, host, question], situation.seconds, situation.environ), hosts)
            for (host, slots), (answer, why) in zip(hosts.items(), answers, strict=True):
                checks += judge_host(host, slots, answer, why, situation.facts.get("versions", {}))
    return checks


def judge_host(
    host: str, slots: int, answer: dict[str, Any] | None, why: str, versions: Mapping[str, str]
) -> list[Check]:
    """Return a finding for each thing that is wrong with a host, or one that all is well."""
    if answer is None:
        todo = f"ssh {host} must work without a password, with the same folder and interpreter (ssh -v says more)"
        return [Check("cluster", host, FAIL, why, todo)]
    checks = []
    other = {name: answer["versions"].get(name) for name in versions if answer["versions"].get(name) != versions[name]}
    if other:
        why = ", ".join(f"{name} {there}, here {versions[name]}" for name, there in other.items())
        checks.append(Check("cluster", host, FAIL, why, "install the same versions on every node"))
    if 0 < answer["cards"] < slots:
        why = f"slots={slots}, but it has {answer['cards']} cards"
        checks.append(Check("cluster", host, FAIL, why, f"write slots={answer['cards']}"))
    apart = abs(answer["clock"] - time.time())
    if apart > CLOCKS_APART:
        todo = "run a time service (chrony, ntpd) on every node"
        checks.append(Check("cluster", host, WARN, f"its clock is {apart:.0f} seconds off", todo))
    if answer.get("unreachable"):
        todo = "open the port in the firewall, or give --master_addr with an IP it sees"
        checks.append(Check("cluster", host, FAIL, f"it cannot reach the master's port: {answer['unreachable']}", todo))
    return checks or [Check("cluster", host, OK, "answers; same folder, interpreter and versions")]


# --- variables --------------------------------------------------------------------------------------------------------


def check_forwarded(situation: Situation) -> list[Check]:
    """List the variables of this shell that other nodes will miss."""
    if not (situation.options and situation.options.by_ssh):
        return [Check("environment", "forwarded", SKIP, "ssh is not used")]
    try:
        told = build_environment(situation.options, situation.environ).forwarded
    except UserError as error:
        return [Check("environment", "forwarded", FAIL, str(error), "correct the value or the line")]
    left = sorted(
        name for name, value in situation.environ.items() if value and FORWARDED.match(name) and name not in told
    )
    if not left:
        return [
            Check("environment", "forwarded", OK, f"{len(told)} variables go to the other nodes (--dry-run shows them)")
        ]
    todo = "set them on each node (tokens: hf auth login; devices: slots in the hostfile), or use --launcher torchrun"
    return [Check("environment", "forwarded", WARN, f"stay here: {', '.join(left)}", todo)]


def check_spelling(environ: Mapping[str, str]) -> list[Check]:
    """Look for variables with a name that differs from a known one by a letter or two."""
    known = {*KNOWN, *variable_reasons()}
    checks = []
    for name in sorted(environ.keys() - known):
        # 0.94 keeps ASCEND_VISIBLE_DEVICES apart from ASCEND_RT_VISIBLE_DEVICES. NCCL_X and HCCL_X are both read.
        near = [name.upper()] if name.upper() in known else difflib.get_close_matches(name, known, 1, cutoff=0.94)
        if near and name.replace("HCCL", "NCCL") != near[0].replace("HCCL", "NCCL"):
            why = f"{name} is set, which nothing reads"
            checks.append(Check("environment", "spelling", WARN, why, f"did you mean {near[0]}?"))
    return checks


def check_visible(situation: Situation) -> list[Check]:
    """Look at visible-devices variables: more than one, the wrong one, and values that are not read as they look."""
    relevant = READ_BY[situation.vendor]
    here = {name: situation.environ[name] for name in VISIBLE if name in situation.environ} if relevant else {}
    checks = []

    def add(state: str, why: str, todo: str) -> None:
        checks.append(Check("environment", "visible devices", state, why, todo))

    if len(here) > 1:
        kept = "HIP_VISIBLE_DEVICES" if situation.vendor == "dcu" else relevant[0]
        add(WARN, f"{' and '.join(here)} are set together", f"keep {kept} alone")
    for name, value in here.items():
        numbers = re.findall(r"\d+", value)
        if name not in relevant:
            add(WARN, f"{name} is set, but {situation.vendor} reads {relevant[0]}", f"set {relevant[0]}")
        elif value.strip() in ("", "-1"):
            add(WARN, f"{name}={value!r} hides every device", f"unset {name}")
        elif len(set(numbers)) != len(numbers):
            add(FAIL, f"{name}={value} names a device twice", "name each once")
        elif name == "ASCEND_RT_VISIBLE_DEVICES" and value != (rising := ",".join(sorted(set(numbers), key=int))):
            # CANN, envref_07_0028
            add(
                FAIL,
                f"{name}={value}: torch_npu finds 0 devices unless the numbers rise, without blanks",
                f"{name}={rising}",
            )
        elif not re.fullmatch(r"[\d, ]+", value):
            add(
                FAIL,
                f"{name}={value}: DeepSpeed's launcher reads numbers only",
                "give the numbers, or use --launcher torchrun",
            )
    return checks
