"""Measure the memory that loading a checkpoint takes, beside the weights themselves.

    python -m benchmarks.loading_memory [--width 1024] [--layers 10] [--vocabulary 12000]

Writes a random ChatGLM-shaped checkpoint of some hundred MB in a temporary folder (float16, shards), loads it through
models.load in a fresh process for each case, and prints what the process held at its peak above what it held before:
memory of its own (anonymous pages), and with it the pages of the files it had mapped, which the system takes back when
it needs them. Both are divided by the bytes of the weights as they were wanted. The limit is 1.3 for own memory; pickles
of the kind that torch wrote before 1.6 (no ChatGLM release is one) cannot be mapped, and converting them to another dtype
takes their own size on top. Linux only: the numbers come from /proc/self/status.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from benchmarks.runs import print_table
from training.utils.run.environment import free_port

LIMIT = 1.3
SHARDS = 4
HEAD = ("files", "loaded as", "bits", "ZeRO-3 processes", "weights, MB", "own memory / weights", "with mapped files", "seconds")


class Case(NamedTuple):
    """A kind of files, the dtype they are loaded as, --quantization_bit, the number of processes under ZeRO-3 (0: plainly)."""

    files: str
    dtype: str = "float16"
    bits: int = 0
    processes: int = 0


CASES = [
    *(Case(files, dtype) for files in ("bin", "safetensors", "old pickles", "int4 bin") for dtype in ("float16", "float32")),
    *(Case("bin", bits=bits) for bits in (8, 4)),
    *(Case(files, "float32", processes=2) for files in ("bin", "safetensors")),
]


def write_checkpoint(folder: Path, files: str, width: int, layers: int, vocabulary: int) -> None:
    """Write a random ChatGLM-6B of these sizes, float16, in four shards of this kind; lm_head is stored too, as in the release."""
    import torch
    from safetensors.torch import save_file

    from models.adapters.quantization import quantize_linears
    from models.chatglm.configuration_chatglm import ChatGLMConfig
    from models.chatglm.modeling_chatglm import ChatGLMForConditionalGeneration

    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_layers": layers, "inner_hidden_size": 4 * width}
    names = ("bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id")
    ids = {name: vocabulary - 4 + number for number, name in enumerate(names)} | {"pad_token_id": 3}
    config = ChatGLMConfig(num_attention_heads=width // 64, **sizes, **ids)
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
    weight_map = {
        name: f"{stem}-{1 + number * SHARDS // len(tensors):05d}-of-{SHARDS:05d}.{ending}" for number, name in enumerate(tensors)
    }
    for file in sorted(set(weight_map.values())):
        content = {name: tensors[name] for name in tensors if weight_map[name] == file}
        if ending == "safetensors":
            save_file(content, folder / file, metadata={"format": "pt"})
        else:
            torch.save(content, folder / file, _use_new_zipfile_serialization=files != "old pickles")
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Watch this process from a thread. Yields the most bytes above those before: own pages, and in total with mapped files."""
    before, peak, ended = held(), {"own": 0, "total": 0}, threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(0.001)  # asked first: one look comes after the end
            own, files = held()
            peak["own"] = max(peak["own"], own - before[0])
            peak["total"] = max(peak["total"], own + files - sum(before))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def held() -> tuple[int, int]:
    """Return the bytes of this process in memory: its own pages, and pages of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssFile"].split()[0]) * 1024


def measure(rank: int, folder: Path, case: Case, results: multiprocessing.SimpleQueue) -> None:
    """Load once to have everything imported and every pool grown, on a model of one layer; then load and watch."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    import torch

    from models.load import load_causal_lm

    options = {"dtype": getattr(torch, case.dtype), "quantization_bit": case.bits}
    if case.processes:
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
        batch = {"train_batch_size": case.processes, "train_micro_batch_size_per_gpu": 1}
        options["zero3_config"] = batch | {"zero_optimization": {"stage": 3}}
    load_causal_lm(folder.with_name(f"{folder.name} warm"), **options)
    started = time.monotonic()
    with watched() as peak:
        model = load_causal_lm(folder, **options)
        # pages of a mapped file count when they are read
        held_by_model = [t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"]
        for tensor in held_by_model:
            tensor.view(-1)[:: 4096 // tensor.element_size()].sum()
    wanted = sum(max(t.numel(), getattr(t, "ds_numel", 0)) * t.element_size() for t in held_by_model)
    results.put({"weights": wanted, **peak, "seconds": time.monotonic() - started})


def in_a_fresh_process(folder: Path, case: Case) -> dict[str, float]:
    """Run ``measure`` in new processes; of several return the largest metrics. When one fails, all end."""
    from torch.multiprocessing import spawn

    count = max(case.processes, 1)
    variables = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "DS_ACCELERATOR": "cpu"}
    # At the width of a 6B model every matrix is above 32 MB, and malloc gives such blocks back at once. Smaller ones it keeps
    # for later; said so, it gives these back too.
    variables |= {"OMP_NUM_THREADS": 1, "MALLOC_MMAP_THRESHOLD_": 2**20}
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()}):
        spawn(measure, (folder, case, results), nprocs=count)
    rows = [results.get() for _ in range(count)]
    return {name: max(row[name] for row in rows) for name in rows[0]}


def cells(case: Case, row: dict[str, float]) -> list[object]:
    """Return a row of the table; the share of own memory is marked where it is above the limit."""
    own, total = row["own"] / row["weights"], row["total"] / row["weights"]
    share = f"{own:.2f}" + " (above the limit)" * (own > LIMIT and case.files != "old pickles")
    return [*case, f"{row['weights'] / 1e6:.0f}", share, f"{total:.2f}", f"{row['seconds']:.1f}"]


def main() -> None:
    """Measure every case and print a table; exit code 1 if one takes more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 1024), ("layers", 10), ("vocabulary", 12000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for files in {case.files for case in CASES}:
            write_checkpoint(Path(name, files), files, args.width, args.layers, args.vocabulary)
            write_checkpoint(Path(name, f"{files} warm"), files, 64, 1, 1000)
        shown = print_table(HEAD, (cells(case, in_a_fresh_process(Path(name, case.files), case)) for case in CASES))
    sys.exit("above the limit" in shown)

if __name__ == "__main__":
    main()
