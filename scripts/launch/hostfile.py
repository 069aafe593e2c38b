"""Hostfiles: lines ``HOST slots=N``, as DeepSpeed, OpenMPI and Kubeflow's operators read and write them; and what names mean."""

import ipaddress
import re
import socket
from functools import lru_cache
from pathlib import Path

from errors import UserError


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Return host -> processes, in the order of the file. Raise UserError with the line that DeepSpeed would stumble over."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"hostfile {path}: {reason}; write one line HOST slots=N for each node.") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)(\s*#.*)?", text)
        if match is None or int(match[2]) < 1:
            raise UserError(f"{path}, line {number}: {text!r} is not HOST slots=N with N of 1 or more, as in: node-1 slots=8.")
        if match[1] in hosts:
            raise UserError(f"{path}, line {number}: {match[1]} stands there a second time; one line a host, with all its slots.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{path} names no host; write one line HOST slots=N for each node.")
    return hosts


def resolved(name: str) -> tuple[socket.AddressFamily, str]:
    """Return what a host's name or address means on this machine, IPv4 before IPv6. Raise OSError if nothing."""
    addresses = sorted(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM), key=lambda one: one[0] != socket.AF_INET)
    return addresses[0][0], addresses[0][4][0]


@lru_cache
def is_this_machine(name: str) -> bool:
    """Return whether a host of a hostfile, USER@HOST too, is this machine: a socket can be bound to its address."""
    host = name.rpartition("@")[2]
    try:
        family, address = resolved(host)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return host == socket.gethostname()
    return True


def is_loopback(address: str) -> bool:
    """Return whether an address (no name) is one that only its own machine reaches."""
    return ipaddress.ip_address(address.split("%")[0]).is_loopback
