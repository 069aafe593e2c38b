"""One process of a run: device, process group, seed, output folder, metrics, and the wish to stop."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist

from errors import UserError, refuse
from models.device import (
    Platform,
    attention_implementation,
    detect_platform,
    peak_memory_gb,
    resolve_dtype,
    seed_device,
    set_device,
)
from models.quiet import quiet_libraries
from training.utils.flags.deepspeed_file import check_keys
from training.utils.run import heartbeat
from training.utils.run.deepspeed_internals import (
    forget_shared_memory_collectives,
    skip_muon_kernels,
    wait_for_all_gathers,
)
from training.utils.run.environment import DONE, check_writable, describe_inputs, hold_folder
from training.utils.run.manifest import sizes_to_resume
from training.utils.run.metrics import Metrics, format_seconds
from training.utils.run.nodes import Nodes, meet, waiting_note

logger = logging.getLogger("sanbu")


@dataclass
class Run:
    """The process that a step runs in, among the others.

    rank counts over all processes, local_rank over those of this node. Only the process with rank 0 prints and writes metrics.
    """

    args: object
    platform: Platform
    device: torch.device
    dtype: torch.dtype
    attention: str
    rank: int
    local_rank: int
    world_size: int
    metrics: Metrics
    nodes: Nodes = field(default_factory=Nodes)
    stop_signals: list[int] = field(default_factory=list)
    stopping: bool = False
    started: float = field(default_factory=time.monotonic)
    lock: IO[str] | None = None  # of the output folder, on the processes that write it
    inputs: dict = field(default_factory=dict)  # as describe_inputs says, on the processes that write DONE
    sizes: dict[str, int] = field(default_factory=dict)  # of batches, of the run that is resumed (manifest.sizes_to_resume)

    @classmethod
    def start(cls, args) -> Run:
        """Open the run of a step. Raises UserError for a device, DeepSpeed file, dtype or output folder that cannot be used, for
        the last two on all nodes with the name of the one that is in trouble.
        """
        started = time.monotonic()
        platform = detect_platform()
        check_keys(args)
        rank, local_rank, world_size = join_process_group(platform)
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
        quiet_libraries()
        device = set_device(platform, local_rank)
        seed_everything(args.seed)
        nodes = meet(Path(args.output_dir), rank, local_rank, world_size)
        dtype = nodes.together(lambda: resolve_dtype(args.dtype, platform))
        nodes.together(lambda: check_writable(Path(args.output_dir)))
        lock = held_alone(nodes, Path(args.output_dir))
        metrics = Metrics(
            Path(args.output_dir),
            enabled=rank == 0,
            tensorboard=args.tensorboard_path if args.enable_tensorboard else None,
        )
        quiet_libraries(Path(args.output_dir, "training.log") if rank == 0 else None)
        attention = attention_implementation(args.attn_implementation, platform)
        process = (rank, local_rank, world_size)
        run = cls(args, platform, device, dtype, attention, *process, metrics, nodes, started=started, lock=lock)
        run.sizes = next(filter(None, nodes.gather(sizes_to_resume(args))), {})
        run.inputs = describe_inputs(args) if nodes.keeps_disk else {}  # before the run, in which files may change
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # Slurm, Kubernetes; a terminal that closes
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda number, _: run.stop_signals.append(number))
        if platform.name == "cpu" and rank == 0:
            logger.info("CPU: DeepSpeed's compiled operators are not used; gloo and torch's own AdamW do their work.")
        return run

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Return the sums of the values over all processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            # Accelerators without float64 collectives exist (NPU): there float32 has to do.
            on_device = total.to(self.device, torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32)
            dist.all_reduce(on_device)
            total = on_device.double().cpu()
        return total.tolist()

    def maximum(self, value: float) -> float:
        """Return the largest of the values over all processes."""
        largest = torch.tensor([value], dtype=torch.float32, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.item()

    def agree(self, loss: float) -> float:
        """Return the loss of the global batch from every process's share; ``stopping`` tells whether anyone was asked to stop.

        Raises UserError, on all processes alike and before the weights move, if the loss is not finite.
        """
        total, stops = self.sum(loss, len(self.stop_signals))
        if not math.isfinite(total):
            raise UserError(
                f"The loss became {total}; the weights were not changed by this step and the newest whole checkpoint under "
                f"{self.args.output_dir}/checkpoints is kept. Lower the learning rate or check the data, then --resume."
            )
        self.stopping = stops > 0
        return total

    @contextmanager
    def in_turn(self, needed: bool = True) -> Iterator[None]:
        """Let, with ``needed`` (the same on all processes) one process of each node at a time inside; all must come."""
        turns = int(self.maximum(self.local_rank + 1)) if needed and self.world_size > 1 else 0
        for _ in range(min(self.local_rank, turns)):
            dist.barrier()
        yield
        for _ in range(self.local_rank, turns):
            dist.barrier()

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def leave(self, step: int) -> None:
        """End the process after a signal, once the checkpoint is written. Raises SystemExit(143), as SIGTERM itself would."""
        if self.is_main:
            print(f"Stopped by a signal after step {step}; the same command with --resume continues.", flush=True)
        self.close()
        raise SystemExit(143)

    def finish(self) -> None:
        """Mark the output folder as done (train.py skips it then) and close."""
        if self.nodes.keeps_disk:
            done = {"flags": asdict(self.args), **self.inputs, "seconds": round(time.monotonic() - self.started, 1)}
            done["peak_memory_gb"] = round(peak_memory_gb(), 3)
            path = Path(self.args.output_dir) / DONE
            path.write_text(json.dumps(done, indent=1, default=str), encoding="utf-8")
        if self.is_main:
            print(f"Saved to {self.args.output_dir} after {format_seconds(done['seconds'])}.", flush=True)
        if self.local_rank == 0 and "SANBU_NODE_DONE" in os.environ:   # scripts/launch on a node without rank 0 waits for it
            Path(os.environ["SANBU_NODE_DONE"]).touch()
        self.close()

    def close(self) -> None:
        """Close the metrics and leave the process group together; a group left alone ends in an abort at exit."""
        self.metrics.close()
        if self.lock:
            self.lock.close()
        if dist.is_initialized():
            self.barrier()
            heartbeat.stop()
            dist.destroy_process_group()


def held_alone(nodes: Nodes, folder: Path) -> IO[str] | None:
    """Return hold_folder() in the process that writes this disk. All raise UserError if one finds another run there."""
    lock, problem = None, None
    if nodes.keeps_disk:
        try:
            lock = hold_folder(folder)
        except UserError as error:
            problem = str(error)
    for sentence in filter(None, nodes.gather(problem)):
        raise UserError(sentence)
    return lock


def join_process_group(platform: Platform) -> tuple[int, int, int]:
    """Join the group that the launcher (deepspeed, torchrun, srun) describes in the environment, or open one of one process.

    A group of one meets nobody, so it takes no port that could be in use. Returns rank, local rank and number of processes. Raises
    UserError where another program listens on the port of the first process.
    """
    import deepspeed

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    if platform.name == "cpu":
        forget_shared_memory_collectives()
        wait_for_all_gathers()
    skip_muon_kernels()
    if not dist.is_initialized():
        minutes = timeout_minutes()
        note = threading.Timer(60.0, lambda: print(waiting_note(), flush=True))
        note.daemon = True
        if heartbeat.several_nodes() and os.environ.get("LOCAL_RANK", "0") == "0":
            note.start()
        timeout = timedelta(minutes=minutes)
        if os.environ.get("WORLD_SIZE") == "1":
            dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        elif os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            store, (rank, size) = store_after_restart(timeout), (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
            dist.init_process_group(platform.backend, store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            deepspeed.init_distributed(dist_backend=platform.backend, verbose=False, timeout=timeout)
        except dist.DistNetworkError as error:
            refuse(
                "EADDRINUSE" in str(error),
                f"port {os.environ['MASTER_PORT']} of {socket.gethostname()} is in use; give another --master_port to the "
                "launcher, or set MASTER_PORT where srun or mpirun starts the step.",
            )
            raise
        note.cancel()
    return dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0")), dist.get_world_size()


def store_after_restart(timeout: timedelta) -> dist.Store:
    """Return torchrun's store, with names of this start's own: in torch 2.13 it still holds the addresses of the processes that
    --max_restarts has replaced, and connecting to them fails.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, else by the first process
    store = dist.TCPStore(address, port, is_master=not held and os.environ["RANK"] == "0", timeout=timeout)
    return dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def timeout_minutes() -> int:
    """Return how long a process waits for the others, SANBU_TIMEOUT_MINUTES. Raises UserError unless it is 1 or more."""
    text = os.environ.get("SANBU_TIMEOUT_MINUTES", "30").strip()
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"SANBU_TIMEOUT_MINUTES is {text!r}: expected a whole number of minutes, such as 30; correct or unset it.")
    return int(text)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch. Equal on all processes: parameters start equal; sampling in rollouts has seeds of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    seed_device(seed)
