"""The other nodes: the hostfile, the port, and what each host answers over ssh."""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Output, Situation, run_tool
from scripts.launch.commands import DEFAULT_HOSTFILE, DEFAULT_PORT, master_address
from scripts.launch.hostfile import is_loopback, read_hostfile, resolved

HCCL_PORTS = range(60000, 60032)  # HCCL_IF_BASE_PORT moves them
CLOCKS_APART = 30  # seconds
SAYS = "SANBU-HOST "
SAME = ("torch", "deepspeed", "transformers")


def check_hostfile(path: str | None, needed: bool) -> tuple[Check, dict[str, int]]:
    """The hostfile's lines, and its hosts."""
    if path is None and needed and Path(DEFAULT_HOSTFILE).is_file():
        path = DEFAULT_HOSTFILE
    if path is None:
        if not needed:
            return Check("cluster", "hostfile", SKIP, "none is given, and none is needed"), {}
        todo = "--hostfile FILE with a line NAME slots=N for each node; torchrun and Slurm need none"
        return Check(
            "cluster", "hostfile", WARN, f"several nodes, but no --hostfile and no {DEFAULT_HOSTFILE}", todo
        ), {}
    try:
        hosts = read_hostfile(path)
    except UserError as error:
        return Check("cluster", "hostfile", FAIL, str(error), "correct that line"), {}
    total = sum(hosts.values())
    return Check("cluster", "hostfile", OK, f"{path}: {len(hosts)} hosts, {total} processes"), hosts


# --- ports ------------------------------------------------------------------------------------------------------------


def port_error(port: int) -> str | None:
    """Why nobody can listen on a port of this machine; None if one can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OverflowError:
            return "no port; they go from 1 to 65535"
        except OSError as error:
            return (error.strerror or str(error)).lower()
    return None


def master_port(situation: Situation) -> int | None:
    """The port that the run will listen on; None where the launcher takes any that is free."""
    given = situation.options.master_port if situation.options else None
    if given is None and situation.environ.get("MASTER_PORT", "").isdigit():
        given = int(situation.environ["MASTER_PORT"])
    return given or (DEFAULT_PORT if situation.several else None)


def check_ports(situation: Situation) -> list[Check]:
    """The master's port, and on Ascend HCCL's."""
    port = master_port(situation)
    if port is None:
        checks = [Check("cluster", "port", SKIP, "one machine: the launcher takes a free one")]
    elif why := port_error(port):
        checks = [
            Check(
                "cluster", "port", FAIL, f"{port}: {why}", "another run may use it: --master_port with another number"
            )
        ]
    else:
        checks = [Check("cluster", "port", OK, f"{port} is free here")]
    if situation.accelerator == "npu":
        base = situation.environ.get("HCCL_IF_BASE_PORT", "")
        ports = range(int(base), int(base) + len(HCCL_PORTS)) if base.isdigit() else HCCL_PORTS
        taken = [str(one) for one in ports if port_error(one)]
        todo = "reserve them by net.ipv4.ip_local_reserved_ports, or set HCCL_IF_BASE_PORT"
        why = f"{ports[0]} to {ports[-1]}: " + (f"taken are {', '.join(taken)}" if taken else "free")
        checks.append(Check("cluster", "HCCL ports", WARN if taken else OK, why, todo if taken else ""))
    return checks


@contextlib.contextmanager
def listening(port: int) -> Iterator[bool]:
    """Accept connections on a port meanwhile; gives False if that cannot be had."""
    try:
        server = socket.create_server(("", port), backlog=64)
    except OSError:
        yield False
        return

    def accept() -> None:
        with contextlib.suppress(OSError):  # when it is closed
            while True:
                server.accept()[0].close()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()


# --- hosts ------------------------------------------------------------------------------------------------------------


def remote_script(folder: str, python: str, address: str | None, port: int | None) -> str:
    """What a host is asked: its clock, the working directory, the interpreter and its versions, its cards, the way back."""
    names = " ".join(SAME)
    versions = (
        "import sys; from importlib.metadata import version\n"
        f"for name in {names!r}.split():\n"
        "    try: print('VERSION', name, version(name))\n"
        "    except Exception: print('VERSION', name, 'none')\n"
    ).replace("VERSION", f"{SAYS}version")
    lines = [
        f"echo {SAYS}clock $(date +%s)",
        f"cd {shlex.quote(folder)} 2>/dev/null && echo {SAYS}folder yes || echo {SAYS}folder no",
        f"test -x {shlex.quote(python)} && echo {SAYS}python yes || echo {SAYS}python no",
        f"{shlex.quote(python)} -c {shlex.quote(versions)} 2>/dev/null",
        f"echo {SAYS}cards $(ls /dev 2>/dev/null | grep -cE '^(nvidia|davinci)[0-9]+$')",
    ]
    if address and port:
        connect = f"exec 3<>/dev/tcp/{address}/{port}"
        lines.append(
            f"timeout 5 bash -c {shlex.quote(connect)} 2>/dev/null && echo {SAYS}port yes || echo {SAYS}port no"
        )
    return "; ".join([*lines, "true"])


def ask_host(
    host: str, script: str, seconds: float, environ: Mapping[str, str], port: int | None = None
) -> Output | None:
    """What a host says over ssh, which may ask for nothing."""
    limit = max(1, int(seconds / 2))
    words = [
        "ssh",
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={limit}",
        *(["-p", str(port)] if port else []),
        host,
        script,
    ]
    return run_tool(words, seconds, environ)


def read_host(text: str) -> dict[str, Any]:
    """The host's answers: clock, folder, python, cards, port, and its versions."""
    said: dict[str, Any] = {"versions": {}}
    for line in text.splitlines():
        words = line[len(SAYS) :].split() if line.startswith(SAYS) else []
        if len(words) == 3 and words[0] == "version":
            said["versions"][words[1]] = words[2]
        elif len(words) == 2:
            said[words[0]] = words[1]
    return said


def judge_host(
    host: str, slots: int, output: Output, versions: Mapping[str, str | None], asked: float, address: str | None
) -> list[Check]:
    """One finding for each thing that is wrong with a host, or one that all is well. asked: when, in seconds since 1970."""
    if output.code is None or (output.code == 255):
        if re.search(r"permission denied|host key", output.errors, re.I):
            todo = f"ssh-copy-id {host}, and connect once by hand to accept its key"
        else:
            todo = f"ssh -v {host} says more; name, address, sshd and its port (--ssh_port), firewall"
        return [Check("cluster", host, FAIL, f"ssh without a password: {output.reason}", todo)]
    said, checks = read_host(output.text), []

    def add(state: str, why: str, todo: str) -> None:
        checks.append(Check("cluster", host, state, why, todo))

    if said.get("folder") != "yes":
        add(FAIL, f"no folder {Path.cwd()} there", "the project must lie at the same path on every node")
    if said.get("python") != "yes":
        add(FAIL, f"no {sys.executable} there", "the same interpreter at the same path on every node")
    elif other := {
        name: said["versions"].get(name)
        for name in SAME
        if versions and said["versions"].get(name) != (versions.get(name) or "none")
    }:
        why = ", ".join(f"{name} {there}, here {versions.get(name)}" for name, there in other.items())
        add(FAIL, why, "install the same versions on every node")
    if said.get("cards", "0") not in ("0", "") and int(said["cards"]) < slots:
        add(FAIL, f"slots={slots}, but it has {said['cards']} cards", f"write slots={said['cards']}")
    if said.get("clock", "").isdigit() and abs(int(said["clock"]) - asked) > CLOCKS_APART:
        add(
            WARN,
            f"its clock is {abs(int(said['clock']) - asked):.0f} seconds off",
            "run a time service (chrony, ntpd) on every node",
        )
    if said.get("port") == "no":
        add(
            FAIL,
            f"it cannot reach {address} on the master's port",
            "open the port in the firewall, or give --master_addr with an IP it sees",
        )
    reach = ", and the way back to the master's port is open" if said.get("port") == "yes" else ""
    return checks or [Check("cluster", host, OK, f"answers{reach}; same folder, interpreter and versions")]


def check_hosts(situation: Situation, hosts: Mapping[str, int]) -> list[Check]:
    """Every host of the hostfile over ssh, at the same time, where the launcher will use ssh."""
    if not hosts:
        return [Check("cluster", "hosts", SKIP, "no hosts are named")]
    options = situation.options
    if options and options.several and not options.by_ssh:
        return [Check("cluster", "hosts", SKIP, "each node is started by itself, so ssh is not used")]
    address = master_address(options, situation.environ) if options else next(iter(hosts))
    checks = [*check_address(address, bool(options and options.master_addr), len(hosts) > 1)]
    port = master_port(situation)
    with listening(port) if port else contextlib.nullcontext(False) as open_here:
        way_back = (
            address if open_here and is_here(address) else None
        )  # from another node than the first nobody listens there
        script = remote_script(str(Path.cwd()), sys.executable, way_back, port)
        asked = time.time()

        def ask(host: str) -> Output | None:
            return ask_host(host, script, situation.seconds, situation.environ, options.ssh_port if options else None)

        with ThreadPoolExecutor(16) as pool:
            outputs = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    if any(output is None for output in outputs.values()):
        return [
            *checks,
            Check(
                "cluster", "hosts", SKIP, "ssh is not installed", "install it, or use --launcher torchrun or --no_ssh"
            ),
        ]
    versions = situation.facts.get("versions", {})
    for host, output in outputs.items():
        checks += judge_host(host, hosts[host], output, versions, asked, address)
    return checks


def is_here(address: str | None) -> bool:
    """Whether an address is one of this machine's own: only those can be bound."""
    try:
        family, found = resolved(address or "")
        with socket.socket(family) as probe:
            probe.bind((found, 0))
    except OSError:
        return False
    return bool(address)


def check_address(address: str | None, given: bool, several: bool) -> list[Check]:
    """Whether the first node's name means something that the others can reach."""
    if not address or not several:
        return []
    try:
        found = resolved(address)[1]
    except OSError as error:
        why = f"{address} does not resolve here ({error.strerror or error})"
        return [Check("cluster", "master address", FAIL, why, "--master_addr with the IP of the first node")]
    if is_loopback(found) and not given:
        why = f"{address} is {found} here, which no other node can reach"
        return [Check("cluster", "master address", FAIL, why, "--master_addr with the IP that the others see")]
    return [Check("cluster", "master address", OK, f"{address} is {found}")]
