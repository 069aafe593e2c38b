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
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks.runs import markdown_row
from training.utils.run.environment import free_port

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
        self.before, self.own, self.total, self.ended = held(), 0, 0, False
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while True:
            last = self.ended  # read first: one look comes after the end
            own, files = held()
            self.own = max(self.own, own - self.before[0])
            self.total = max(self.total, own + files - sum(self.before))
            if last:
                return
            time.sleep(0.001)

    def __exit__(self, *error) -> None:
        self.ended = True
        self.thread.join()


def held() -> tuple[int, int]:
    """Return the bytes of this process in memory: its own pages, and pages of mapped files."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def measure(rank: int, folder: Path, case: Case, results: multiprocessing.SimpleQueue) -> None:
    """Load once to have everything imported and every pool grown, on a model of one layer; then load and watch."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
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
    results.put({"weights": wanted, "own": peak.own, "total": peak.total, "seconds": time.monotonic() - started})


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
        print(markdown_row(["case", "weights, MB", "own memory / weights", "with mapped files / weights", "seconds"]))
        print(markdown_row(["---"] * 5))
        worst = 0.0
        for case in CASES:
            row = in_a_fresh_process(Path(name, case.files), case)
            own, total = row["own"] / row["weights"], row["total"] / row["weights"]
            worst = max(worst, own if case.files != "old pickles" else 0.0)
            cells = [case.name, f"{row['weights'] / 1e6:.0f}", f"{own:.2f}", f"{total:.2f}", f"{row['seconds']:.1f}"]
            print(markdown_row(cells), flush=True)
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
