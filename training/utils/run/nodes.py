"""Several nodes, each perhaps with a disk of its own: who they are, which process tidies up which disk, and agreement."""

import logging
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from errors import UserError
from training.utils.run import heartbeat
from training.utils.run.environment import check_writable

logger = logging.getLogger("sanbu")


@dataclass
class Nodes:
    """The nodes of a run as one process sees them.

    names: for every rank, what to call its node. keeps_disk: this process writes what lies once on a disk; there is one
    such process for each disk that holds the output folder, rank 0 among them.
    """

    names: list[str] = field(default_factory=lambda: [socket.gethostname()])
    keeps_disk: bool = True
    several: bool = False

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes by rank; all must call it."""
        if len(self.names) == 1:
            return [value]
        values: list[Any] = [None] * len(self.names)
        dist.all_gather_object(values, value)
        return values

    def together(self, attempt: Callable[[], Any]) -> Any:
        """Return attempt(). Of several nodes, a UserError of one process is raised by all, with its node's name."""
        if not self.several:
            return attempt()
        result, problem = None, None
        try:
            result = attempt()
        except UserError as error:
            problem = str(error)
        for name, sentence in zip(self.names, self.gather(problem), strict=True):
            if sentence:
                raise UserError(f"{name}: {sentence}")
        return result


def meet(output: Path, rank: int, local_rank: int, world_size: int) -> Nodes:
    """Learn about the nodes and watch over them from now on (heartbeat.py); all processes call it, in their group.

    output: the folder of the run, which may lie on one disk that all nodes see, or on one of each node.
    """
    if not heartbeat.several_nodes():
        return Nodes([socket.gethostname()] * world_size, keeps_disk=local_rank == 0)
    limit = heartbeat.time_limit()
    listener = heartbeat.open_listener() if rank == 0 and limit else None
    port = listener.getsockname()[1] if listener else 0
    processes: list[Any] = [None] * world_size
    dist.all_gather_object(processes, (socket.gethostname(), local_rank, port, uuid.uuid4().hex))
    names = node_names([(host, local) for host, local, _, _ in processes])
    nodes = Nodes(names, several=True)
    _, _, port, token = processes[0]
    if limit and port:
        problem = heartbeat.start(rank, names, token, speaks=local_rank == 0, listener=listener, port=port)
        if problem:
            print(f"{names[rank]}: if a node is lost, this one will not say so: {problem}.", flush=True)
    leaders = [one for one, (_, local, _, _) in enumerate(processes) if local == 0]
    nodes.keeps_disk = keeps_disk(nodes, output, rank, leaders, token)
    return nodes


def node_names(processes: list[tuple[str, int]]) -> list[str]:
    """Return what to call the node of each rank, from the host names and local ranks of all. The ranks of a node need not stand
    side by side (mpirun --map-by node). Where two nodes have one host name they must.
    """
    names, numbers, newest = [], {}, -1
    for host, local in processes:
        newest += local == 0
        numbers[host] = newest if local == 0 else numbers.get(host, 0)
        names.append(f"node {numbers[host]} ({host})")
    return names


def keeps_disk(nodes: Nodes, output: Path, rank: int, leaders: list[int], token: str) -> bool:
    """Tell whether this process is the first on its disk. Each node's first process leaves a mark and looks for those of others."""
    mark = output / f".node-{token}-{rank}"

    def leave_mark() -> None:
        check_writable(output)
        mark.touch()

    nodes.together(leave_mark if rank in leaders else lambda: None)
    # A name that nobody has asked for before: no cache of a network file system can deny it.
    earlier = [one for one in leaders if one < rank and (output / f".node-{token}-{one}").exists()]
    shared = nodes.gather(bool(earlier))
    if rank in leaders:
        mark.unlink(missing_ok=True)
    if rank == 0:
        seen = sum(shared[one] for one in leaders)
        where = "shared by all nodes" if seen == len(leaders) - 1 else "on disks of their own" if not seen else "partly shared"
        logger.info("%d nodes; %s is %s.", len(leaders), output, where)
    return rank in leaders and not earlier


def waiting_note() -> str:
    """Return the line to print while the other nodes are not there."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"{socket.gethostname()}: still waiting for all {os.environ.get('WORLD_SIZE')} processes to meet at {address}. Is the "
        "command started on every node, with the same --master_addr and --master_port, and lets a firewall the port through?"
    )
