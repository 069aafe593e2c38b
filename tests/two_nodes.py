"""Two nodes on one machine: two network namespaces with a cable between them, or, where those are not allowed, loopback.

Each node has a folder of its own in place of a disk, in which its commands run. ``unshare`` keeps a namespace alive with a
sleeping process; with that process the namespace and the cable are gone, whatever becomes of the tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.launching import environment
from training.utils.run.environment import free_port

PATIENCE = 300  # seconds for a run of two tiny nodes on a machine that does much else


@dataclass
class Node:
    """One of the two: how to run a command there, and its folder."""

    number: int
    folder: Path
    prefix: list[str] = field(default_factory=list)  # words that move a command into the node's namespaces
    env: dict[str, str] = field(default_factory=dict)

    def start(self, command: list[str]) -> Job:
        """Start a command; what it prints goes to a file."""
        log = (self.folder / "printed.txt").open("wb")
        with log:
            process = subprocess.Popen(
                [*self.prefix, *command], cwd=self.folder, env=environment() | self.env, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return Job(self, process)


@dataclass
class Job:
    """A command that runs on a node."""

    node: Node
    process: subprocess.Popen

    @property
    def printed(self) -> str:
        """All it has printed so far."""
        return (self.node.folder / "printed.txt").read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code."""
        return self.process.wait(timeout=seconds)

    def family(self) -> list[psutil.Process]:
        """The command and all that it has started."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: int) -> None:
        """Send a signal to the whole family at once, as a node ends that loses its power (SIGKILL)."""
        for one in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)


@dataclass
class TwoNodes:
    """The machine room. separate: whether the nodes have networks of their own."""

    nodes: list[Node]
    separate: bool
    port: int

    @property
    def address(self) -> str:
        """Of the first node."""
        return "10.77.0.1" if self.separate else "127.0.0.1"

    def cable(self, state: str, job: Job) -> None:
        """Pull the cable of the second node (down) or put it back (up); on loopback its processes are frozen instead."""
        if self.separate:
            subprocess.run([*self.nodes[1].prefix, "ip", "link", "set", "eth0", state], check=True)
        else:
            job.signal(signal.SIGSTOP if state == "down" else signal.SIGKILL)

    @contextmanager
    def running(self, command: Callable[[Node], list[str]]) -> Iterator[list[Job]]:
        """A command on both nodes, which are cleared of it at the end."""
        jobs = [node.start(command(node)) for node in self.nodes]
        try:
            yield jobs
        finally:
            for job in jobs:
                job.signal(signal.SIGKILL)
                job.process.wait()

    def run(self, command: Callable[[Node], list[str]]) -> list[str]:
        """A command on both nodes, to a good end. Returns what each has printed."""
        with self.running(command) as jobs:
            codes = [job.wait() for job in jobs]
            printed = [job.printed for job in jobs]
        assert codes == [0, 0], "\n".join([str(codes), *(text[-6000:] for text in printed)])
        return printed


def until(condition: Callable[[], bool], jobs: list[Job], what: str, seconds: float = PATIENCE) -> None:
    """Wait for something that the jobs bring about while they run."""
    ends = time.monotonic() + seconds
    while not condition():
        ended = [job for job in jobs if job.process.poll() is not None]
        assert not ended, f"{what}: the command ended before\n{ended[0].printed[-6000:]}"
        assert time.monotonic() < ends, f"{what}: not within {seconds:.0f} s\n{jobs[0].printed[-6000:]}"
        time.sleep(0.02)


SILENCE = 20  # seconds after which a node is lost; with 6, other work on the machine was taken for a loss


@contextmanager
def machine_room(folder: Path) -> Iterator[TwoNodes]:
    """Two nodes, connected; everything they were made of is gone at the end."""
    nodes = [Node(number, folder / f"node{number}") for number in (0, 1)]
    for node in nodes:
        node.folder.mkdir()
        node.env = {"SANBU_CACHE": str(node.folder / "cache"), "SANBU_NODE_TIMEOUT": str(SILENCE)}
    holders: list[subprocess.Popen] = []
    try:
        separate = lay_cable(nodes, holders)
        for node in nodes:
            node.env["GLOO_SOCKET_IFNAME"] = "eth0" if separate else "lo"
        yield TwoNodes(nodes, separate, free_port())
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def lay_cable(nodes: list[Node], holders: list[subprocess.Popen]) -> bool:
    """Make a namespace of network and host name for each node and connect them. False where that is not allowed."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    try:
        for node in nodes:
            # It tells when the namespaces are there: until then nsenter would enter those of the machine.
            words = ["unshare", "--net", "--uts", "sh", "-c", f"hostname node-{'ab'[node.number]} && echo made && exec sleep 1500"]
            holder = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            holders.append(holder)
            if holder.stdout.readline() != "made\n":
                return False
            node.prefix = ["nsenter", "--target", str(holder.pid), "--net", "--uts", "--"]
        steps = [(0, f"link add eth0 type veth peer name eth0 netns {holders[1].pid}")]
        for node in nodes:
            steps += [(node.number, f"addr add 10.77.0.{node.number + 1}/24 dev eth0")]
            steps += [(node.number, "link set lo up"), (node.number, "link set eth0 up")]
        for number, words in steps:
            subprocess.run([*nodes[number].prefix, "ip", *words.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        for node in nodes:
            node.prefix = []
        return False
    return True


def launcher(room: TwoNodes, node: Node, step: str, *words: str, way: str = "torchrun") -> list[str]:
    """What a user types on a node: scripts.launch with the recipe of the node's folder."""
    how = {
        "no_ssh": ["--hostfile", "hosts", "--no_ssh", "--node_rank", str(node.number)],
        "torchrun": ["--launcher", "torchrun", "--num_nodes", "2", "--num_gpus", "1", "--node_rank", str(node.number)],
    }[way]
    where = ["--master_addr", room.address, "--master_port", str(room.port)]
    return [sys.executable, "-m", "scripts.launch", step, "recipe.yaml", *words, *how, *where]


@contextmanager
def ssh_servers(room: TwoNodes, folder: Path) -> Iterator[dict[str, str]]:
    """A real sshd on each node, for a key that is made here. Yields the environment in which ``ssh node-a`` finds them."""
    addresses = ["10.77.0.1", "10.77.0.2"] if room.separate else ["127.0.0.2", "127.0.0.3"]
    ports = [free_port(), free_port()]
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)   # where a package's sshd locks itself in; a service makes it elsewhere
    settings = [
        f"IdentityFile {folder / 'key'}", "StrictHostKeyChecking no", "UserKnownHostsFile /dev/null", "LogLevel ERROR",
        "BatchMode yes",
    ]  # fmt: skip
    lines = []
    for node, address, port in zip(room.nodes, addresses, ports, strict=True):
        lines += [f"Host node-{'ab'[node.number]}", f"  HostName {address}", f"  Port {port}"]
    (folder / "ssh_config").write_text("\n".join([*lines, "Host *", *settings, ""]))
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "ssh_config"} "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    servers = []
    try:
        for node, address, port in zip(room.nodes, addresses, ports, strict=True):
            words = [shutil.which("sshd", path="/usr/sbin:/usr/bin"), "-D", "-e", "-f", "/dev/null"]
            options = {
                "ListenAddress": address, "Port": port, "HostKey": folder / "host_key", "AuthorizedKeysFile": folder / "key.pub",
                "PidFile": "none", "StrictModes": "no", "UsePAM": "no", "PasswordAuthentication": "no",
            }  # fmt: skip
            words += [f"-o{name}={value}" for name, value in options.items()]
            with (folder / f"sshd{node.number}.txt").open("wb") as log:
                servers.append(subprocess.Popen([*node.prefix, *map(str, words)], stderr=log))
        yield {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    finally:
        for server in servers:
            with contextlib.suppress(psutil.NoSuchProcess):
                for session in psutil.Process(server.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        session.kill()
            server.kill()
            server.wait()
