"""Measure the memory that loading a checkpoint takes, beside the weights themselves.

    python -m benchmarks.loading_memory [--width 1024] [--layers 10] [--vocabulary 12000]

Writes a random ChatGLM-shaped checkpoint of some hundred MB in a temporary folder (float16, shards), loads it through
models.load in a fresh process for each case, and prints what the process held at its peak above what it held before:
memory of its own (anonymous pages), and with it the pages of the files it had mapped, which the system takes back when
it needs them. Both are divided by the bytes of the weights as they were wanted. The limit is 1.3 for own memory; pickles
of the kind that torch wrote before 1.6 (no ChatGLM release is one) cannot be mapped, and converting them to another dtype
takes their own size on top. Linux only: the numbers come from /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 1.3
SHARDS = 4
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Case:
    """A kind of files, the dtype they are loaded as, --quantization_bit, the number of processes under ZeRO-3 (0: plainly)."""

    files: str
    dtype: str = "float16"
    bits: int = 0
    processes: int = 0

    @property
    def name(self) -> str:
        kinds = [f"as {self.dtype}", f"to {self.bits} bits" if self.bits else ""]
        kinds.append(f"ZeRO-3, each of {self.processes}" if self.processes else "")
        return ", ".join([self.files, *filter(None, kinds)])


CASES = [
    Case("bin"),
    Case("bin", "float32"),
    Case("safetensors"),
    Case("safetensors", "float32"),
    Case("old pickles"),
    Case("old pickles", "float32"),
    Case("bin", bits=8),
    Case("bin", bits=4),
    Case("int4 bin"),
    Case("int4 bin", "float32"),
    Case("bin", "float32", processes=2),
    Case("safetensors", "float32", processes=2),
]


# --- a checkpoint -----------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, files: str, width: int, layers: int, vocabulary: int) -> None:
    """Write a random ChatGLM-6B of these sizes, float16, in four shards of this kind; lm_head is stored too, as in the release."""
    import torch
    from safetensors.torch import save_file

    from models.adapters.quantization import quantize_linears
    from models.chatglm.configuration import ChatGLMConfig
    from models.chatglm.network import ChatGLMForConditionalGeneration

    config = ChatGLMConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_attention_heads=width // 64,
        inner_hidden_size=4 * width,
        bos_token_id=vocabulary - 4,
        eos_token_id=vocabulary - 3,
        gmask_token_id=vocabulary - 2,
        mask_token_id=vocabulary - 1,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    model = ChatGLMForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    if files.startswith("int4"):
        quantize_linears(model, 4)
        config.quantization_bit = 4
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stem, ending = ("model", "safetensors") if files == "safetensors" else ("pytorch_model", "bin")
    names, weight_map = list(tensors), {}
    for number in range(SHARDS):
        mine = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        file = f"{stem}-{number + 1:05d}-of-{SHARDS:05d}.{ending}"
        weight_map |= dict.fromkeys(mine, file)
        content = {name: tensors[name] for name in mine}
        if ending == "safetensors":
            save_file(content, folder / file, metadata={"format": "pt"})
        else:
            torch.save(content, folder / file, _use_new_zipfile_serialization=files != "old pickles")
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- one process ------------------------------------------------------------------------------------------------------


class Peak:
    """Watch this process from a thread; afterwards own and total are the most bytes above those before, without and with files."""

    def __enter__(self) -> Peak:
        self.before = held()
        self.own = self.total = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.is_set():
            self._look()
            time.sleep(0.001)

    def _look(self) -> None:
        own, files = held()
        self.own = max(self.own, own - self.before[0])
        self.total = max(self.total, own + files - sum(self.before))

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()
        self._look()


def held() -> tuple[int, int]:
    """Return the bytes of this process in memory: its own pages, and pages of mapped files."""
    found = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return tuple(int(found[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def measure(folder: Path, case: Case) -> dict[str, float]:
    """Load once to have everything imported and every pool grown, on a model of one layer; then load and watch."""
    import torch

    from models.load import load_causal_lm

    options = {"dtype": getattr(torch, case.dtype), "quantization_bit": case.bits}
    if case.processes:
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
        options["zero3_config"] = {
            "train_batch_size": case.processes,
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
        }
    load_causal_lm(folder.with_name(f"{folder.name} warm"), **options)
    started = time.monotonic()
    with Peak() as peak:
        model = load_causal_lm(folder, **options)
        # pages of a mapped file count when they are read
        held_by_model = [t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"]
        for tensor in held_by_model:
            tensor.view(-1)[:: 4096 // tensor.element_size()].sum()
    wanted = sum(max(t.numel(), getattr(t, "ds_numel", 0)) * t.element_size() for t in held_by_model)
    return {"weights": wanted, "own": peak.own, "total": peak.total, "seconds": time.monotonic() - started}


def in_a_fresh_process(folder: Path, case: Case) -> dict[str, float]:
    """Run ``measure`` in new processes; of several return the largest metrics."""
    argv = ["--folder", str(folder), "--dtype", case.dtype, "--bits", str(case.bits)]
    argv += ["--processes", str(case.processes), "--files", case.files]
    found = in_processes(argv, max(case.processes, 1), case.name)
    return {name: max(one[name] for one in found) for name in found[0]}


def in_processes(argv: list[str], count: int, title: str) -> list[Any]:
    """Run this file in so many new processes; return what each prints last, as JSON. When one fails, all end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        variables |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}
        # At the width of a 6B model every matrix is above 32 MB, and malloc gives such blocks back at once. Smaller ones
        # it keeps for later; said so, it gives these back too.
        variables["MALLOC_MMAP_THRESHOLD_"] = 2**20
        env = os.environ | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, "-m", "benchmarks.loading_memory", *argv]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    with ThreadPoolExecutor(count) as pool:  # all are read at once: one that waits for the others does not hide which failed
        try:
            reading = [pool.submit(process.communicate, timeout=600) for process in running]
            for one in as_completed(reading):
                err, process = one.result()[1], running[reading.index(one)]
                if process.returncode:
                    raise RuntimeError(f"{title}: {err[-3000:]}")
        finally:
            for process in running:
                process.kill()  # nothing to one that has ended
    return [json.loads(one.result()[0].splitlines()[-1]) for one in reading]


def write_cases(folder: Path, kinds: set[str], width: int, layers: int, vocabulary: int) -> None:
    """Write the checkpoints that the cases need, in processes of their own, and a small one of each kind to warm up with."""
    for kind in sorted(kinds):
        for name, size in ((kind, (width, layers, vocabulary)), (f"{kind} warm", (64, 1, 1000))):
            argv = [sys.executable, "-m", "benchmarks.loading_memory", "--write", str(folder / name), "--files", kind]
            sizes = zip(("--width", "--layers", "--vocabulary"), map(str, size), strict=True)
            subprocess.run([*argv, *(part for pair in sizes for part in pair)], check=True)


def main() -> None:
    """Measure every case and print a table; exit code 1 if one takes more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 1024), ("layers", 10), ("vocabulary", 12000), ("bits", 0), ("processes", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("folder", "write", "files", "dtype"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write_checkpoint(Path(args.write), args.files, args.width, args.layers, args.vocabulary)
        return
    if args.folder:
        print(json.dumps(measure(Path(args.folder), Case(args.files, args.dtype, args.bits, args.processes))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cases(folder, {case.files for case in CASES}, args.width, args.layers, args.vocabulary)
        print("| case | weights, MB | own memory / weights | with mapped files / weights | seconds |")
        print("|---|---|---|---|---|")
        worst = 0.0
        for case in CASES:
            found = in_a_fresh_process(folder / case.files, case)
            own, total = found["own"] / found["weights"], found["total"] / found["weights"]
            worst = max(worst, own if case.files != "old pickles" else 0.0)
            print(
                f"| {case.name} | {found['weights'] / 1e6:.0f} | {own:.2f} | {total:.2f} | {found['seconds']:.1f} |",
                flush=True,
            )
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
