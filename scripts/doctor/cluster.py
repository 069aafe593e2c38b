"""Several nodes and the shell: hostfile, port, answers of the hosts over ssh, and variables that mislead a run."""

import contextlib
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

from errors import UserError, nearest
from scripts.doctor.probe import versions
from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Situation, ask, refused
from scripts.launch.checks import check_address, check_port
from scripts.launch.commands import FORWARDED, master_address
from scripts.launch.hostfile import resolved
from scripts.launch.options import DEFAULT_HOSTFILE, DEFAULT_PORT
from scripts.launch.platforms import variable_reasons

HCCL_PORTS = 60000  # the first of 32; HCCL_IF_BASE_PORT moves them
CLOCKS_APART = 30  # seconds
READ_BY = {  # vendor -> the variables that it reads, the first of them by preference
    "cuda": ("CUDA_VISIBLE_DEVICES",),
    "dcu": ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    "npu": ("ASCEND_RT_VISIBLE_DEVICES",),
}
VISIBLE = (*READ_BY["dcu"], *READ_BY["npu"])
# Names that users misspell, beside those of configs/platforms.yaml.
KNOWN = {
    *VISIBLE,
    *["DS_ACCELERATOR", "MASTER_ADDR", "MASTER_PORT", "HF_HUB_OFFLINE", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"],
    *["GLOO_SOCKET_IFNAME", "CUDA_HOME", "ROCM_HOME", "OMP_NUM_THREADS", "DEEPSPEED_TIMEOUT", "PYTORCH_CUDA_ALLOC_CONF"],
}


def check_hostfile(situation: Situation, hosts: Mapping[str, int]) -> list[Check]:
    """Say which hosts take part. What is wrong with a hostfile was said when it was read."""
    options = situation.options
    if hosts:
        count = f"{len(hosts)} hosts, {sum(hosts.values())} processes"
        return [Check("cluster", "hostfile", OK, count)]
    if options and (options.by_ssh or (options.several and options.no_ssh)):
        todo = "--hostfile FILE with a line NAME slots=N for each node; torchrun and Slurm need none"
        why = f"several nodes, but no --hostfile and no {DEFAULT_HOSTFILE}"
        return [Check("cluster", "hostfile", WARN, why, todo)]
    return [Check("cluster", "hostfile", SKIP, "none is needed")]


def port_error(port: int) -> UserError | None:
    """Return the reason why nobody can listen on a port of this machine; None for a free one."""
    try:
        check_port(port)
    except UserError as error:
        return error
    return None


def master_port(situation: Situation) -> int | None:
    """Return the port that the run will listen on; None where the launcher takes any that is free."""
    given = situation.options.master_port if situation.options else None
    return given or (DEFAULT_PORT if situation.several else None)


def check_ports(situation: Situation) -> list[Check]:
    """Look whether the master's port, and on Ascend HCCL's, are free."""
    port = master_port(situation)
    if port is None:
        checks = [Check("cluster", "port", SKIP, "one machine: the launcher takes a free one")]
    elif error := port_error(port):
        checks = [refused("cluster", "port", error)]
    else:
        checks = [Check("cluster", "port", OK, f"{port} is free here")]
    if situation.accelerator == "npu":
        first = int(situation.environ.get("HCCL_IF_BASE_PORT", HCCL_PORTS))
        taken = [str(one) for one in range(first, first + 32) if port_error(one)]
        todo = "reserve them by net.ipv4.ip_local_reserved_ports, or set HCCL_IF_BASE_PORT" if taken else ""
        why = f"{first} to {first + 31}: taken are {', '.join(taken) or 'none'}"
        checks.append(Check("cluster", "HCCL ports", WARN if taken else OK, why, todo))
    return checks


def check_master_address(situation: Situation, hosts: Mapping[str, int]) -> tuple[list[Check], str | None]:
    """Look whether others can reach the first node by its name. Return findings, and our own address if it is one."""
    if len(hosts) < 2 or not situation.options:
        return [], None
    try:
        check_address(situation.options)
    except UserError as error:
        return [refused("cluster", "master address", error)], None
    address = master_address(situation.options, situation.environ)
    number = resolved(address)[1]
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
    checks, address = check_master_address(situation, hosts)
    port, question = master_port(situation), ["-m", "scripts.doctor.probe", "host"]
    words = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, int(situation.seconds / 2))}"]
    words += ["-p", str(options.ssh_port)] if options and options.ssh_port else []
    with contextlib.ExitStack() as stack:
        if port and address and not port_error(port):  # only the first node listens here; the backlog accepts for us
            stack.enter_context(socket.create_server(("", port), backlog=128))
            question += [address, str(port)]
        command = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join([sys.executable, *question])}"
        with ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda host: ask([*words, host, command], situation.seconds, situation.environ), hosts)
            for (host, slots), (answer, why) in zip(hosts.items(), answers, strict=True):
                checks.append(judge_host(host, slots, answer, why, versions()))
    return checks


def judge_host(
    host: str, slots: int, answer: dict[str, Any] | None, why: str, versions: Mapping[str, str]
) -> Check:
    """Return the finding about a host by its answer; without one, why says the reason."""
    if answer is None:
        todo = f"ssh {host} must work without a password, with the same folder and interpreter (ssh -v says more)"
        return Check("cluster", host, FAIL, why, todo)
    there, faults = answer["versions"], {}  # what is wrong -> what to do
    other = [f"{name} {there.get(name)}, here {here}" for name, here in versions.items() if there.get(name) != here]
    if other:
        faults[", ".join(other)] = "install the same versions on every node"
    if 0 < answer["cards"] < slots:
        faults[f"slots={slots}, but it has {answer['cards']} cards"] = f"write slots={answer['cards']}"
    if answer.get("unreachable"):
        why = f"it cannot reach the master's port: {answer['unreachable']}"
        faults[why] = "open the port in the firewall, or give --master_addr with an IP it sees"
    state, apart = FAIL if faults else WARN, abs(answer["clock"] - time.time())
    if apart > CLOCKS_APART:
        faults[f"its clock is {apart:.0f} seconds off"] = "run a time service (chrony, ntpd) on every node"
    if faults:
        return Check("cluster", host, state, "; ".join(faults), "; ".join(faults.values()))
    return Check("cluster", host, OK, "answers; same folder, interpreter and versions")


# --- variables --------------------------------------------------------------------------------------------------------


def check_forwarded(situation: Situation) -> Check:
    """List the variables of this shell that other nodes will miss."""
    if not situation.environment or not situation.options.by_ssh:
        return Check("environment", "forwarded", SKIP, "ssh is not used")
    sent = situation.environment.forwarded
    left = sorted(
        name for name, value in situation.environ.items() if value and FORWARDED.match(name) and name not in sent
    )
    if not left:
        why = f"{len(sent)} variables go to the other nodes (--dry-run shows them)"
        return Check("environment", "forwarded", OK, why)
    todo = "set them on each node (tokens: hf auth login; devices: slots in the hostfile), or use --launcher torchrun"
    return Check("environment", "forwarded", WARN, f"stay here: {', '.join(left)}", todo)


def check_spelling(environ: Mapping[str, str]) -> list[Check]:
    """Look for variables with a name that differs from a known one by a letter or two."""
    known = KNOWN | variable_reasons().keys()
    checks = []
    for name in sorted(environ.keys() - known):
        # 0.94 keeps ASCEND_VISIBLE_DEVICES apart from ASCEND_RT_VISIBLE_DEVICES. NCCL_X and HCCL_X are both read.
        near = name.upper() if name.upper() in known else nearest(name, known, 0.94)
        if near and name.replace("HCCL", "NCCL") != near.replace("HCCL", "NCCL"):
            why = f"{name} is set, which nothing reads"
            checks.append(Check("environment", "spelling", WARN, why, f"did you mean {near}?"))
    return checks


def check_visible(situation: Situation) -> list[Check]:
    """Look at visible-devices variables: more than one, the wrong one, and on Ascend an order that hides all devices."""
    vendor, checks = situation.vendor, []
    here = {name: situation.environ[name] for name in VISIBLE if name in situation.environ and vendor in READ_BY}
    if len(here) > 1:
        checks.append((WARN, f"{' and '.join(here)} are set together", f"keep {READ_BY[vendor][0]} alone"))
    for name, value in here.items():
        main, rising = READ_BY[vendor][0], ",".join(sorted(set(re.findall(r"\d+", value)), key=int))
        if name not in READ_BY[vendor]:
            checks.append((WARN, f"{name} is set, but {vendor} reads {main}", f"set {main}"))
        elif value.strip() in ("", "-1"):
            checks.append((WARN, f"{name}={value!r} hides every device", f"unset {name}"))
        elif vendor == "npu" and value != rising:  # CANN, envref_07_0028
            why = f"{name}={value}: torch_npu finds 0 devices unless the numbers rise, without blanks"
            checks.append((FAIL, why, f"{name}={rising}"))
    return [Check("environment", "visible devices", *check) for check in checks]
