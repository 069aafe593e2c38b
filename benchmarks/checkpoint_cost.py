"""Wall time of saving and resuming a checkpoint, beside safetensors and plain reading of the same bytes on the same disk.

    python -m benchmarks.checkpoint_cost [--megabytes 1000] [--rounds 3] [--folder DIR]

One process without ZeRO, float32: weights and two moments of each. The ways take turns; medians. Before each reading the files
leave the page cache (posix_fadvise), so that both read from the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.runs import print_table
from models.device import detect_platform
from training.utils.engine.checkpoint import Checkpoint
from training.utils.engine.configs import PLACEHOLDERS
from training.utils.engine.state import engine_tensors
from training.utils.flags.steps import SFTArguments
from training.utils.run.manifest import file_checksum, flush
from training.utils.run.nodes import Nodes
from training.utils.run.process_group import join_process_group

LAYER = 1024  # 4 MB a weight
SAVE_FILE, FSYNC, READING = "safetensors.save_file", "fsync of it", "reading the files"


def trained(megabytes: int):
    """Return an engine that has made a step, with so many megabytes of weights and moments."""
    import deepspeed

    layers = max(1, round(megabytes * 1e6 / 12 / LAYER**2))
    model = nn.Sequential(*(nn.Linear(LAYER, LAYER, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    config = PLACEHOLDERS | {"train_batch_size": 1}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]
    engine.backward(engine(torch.ones(1, LAYER)).sum())
    engine.step()
    return engine


def checkpoint_of(engine, folder: Path) -> Checkpoint:
    """Return the checkpoints of a run of one process in a folder, of which it resumes from the newest."""
    args = SFTArguments(output_dir=str(folder), model_name_or_path="m", resume="auto", save_total_limit=1)
    metrics = SimpleNamespace(rewind=lambda _: None, files=list)
    run = SimpleNamespace(args=args, rank=0, world_size=1, barrier=lambda: None, metrics=metrics, nodes=Nodes())
    return Checkpoint(run, {"model": engine}, {"world_size": 1}, {})


def files_of(folder: Path) -> list[Path]:
    """Return all files in a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def leave_cache(folder: Path) -> None:
    """Let the page cache forget a folder's files."""
    for path in files_of(folder):
        flush(path)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    """Read all files of a folder."""
    for path in files_of(folder):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def settled(folder: Path) -> None:
    """Bring a folder's files to the disk and compute their checksums, one after the other."""
    for path in files_of(folder):
        flush(path)
        file_checksum(path)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write; None: a temporary folder")
    args = parser.parse_args()
    join_process_group(detect_platform())
    engine = trained(args.megabytes)
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, work: Callable[..., object], *words: object, **more: object) -> None:
        begun = time.perf_counter()
        work(*words, **more)
        seconds[name].append(time.perf_counter() - begun)

    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        plain, ours, theirs = (Path(place) / name for name in ("plain", "ours", "theirs"))
        for step in range(1, args.rounds + 1):
            for folder in (plain, ours, theirs):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            os.sync()
            file, checkpoint = plain / "all.safetensors", checkpoint_of(engine, ours)
            timed(SAVE_FILE, save_file, engine_tensors(engine, keeps_disk=True), file)
            timed(FSYNC, flush, file)
            timed("checkpoint", checkpoint.save, step)
            timed("DeepSpeed's save_checkpoint", engine.save_checkpoint, str(theirs), tag="t", save_latest=False)
            timed("fsync and checksums of it", settled, theirs)
            leave_cache(ours)
            timed(READING, read_all, ours)
            leave_cache(ours)
            timed("resume", checkpoint.resume)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    reading = {name: middle.pop(name) for name in (READING, "resume")}
    report("save_file and fsync", middle, middle[SAVE_FILE] + middle[FSYNC])
    report("reading", reading, reading[READING])


def report(beside: str, seconds: dict[str, float], unit: float) -> None:
    """Print a table of seconds, and their ratio to a unit."""
    rows = ((name, f"{value:.2f}", f"{value / unit:.2f}") for name, value in seconds.items())
    print_table(("way", "seconds", f"beside {beside}"), rows)


if __name__ == "__main__":
    main()
