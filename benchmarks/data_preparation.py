"""Prepare the data of step 1, from JSON lines to tokens on disk, beside datasets.map with two processes.

    python -m benchmarks.data_preparation --records 200000 --rounds 3

Records are dialogues of random words with the lengths of real ones; the tokenizer is a BPE of 8,192 tokens trained on them. Each
side is a process of its own that imports what it needs, and no more, before the clock starts; the sides take turns. datasets reads
the file, writes prompt and answer one after the other, tokenises them in batches and notes where the answer begins: without checks,
split, held-out part, limits and report, which ours has. Memory is what all processes of a side hold, shared pages divided among
those who share them (Pss), five times a second, seen from outside; its anonymous part is without the pages of files, libraries
and data, which the system can take back. Needs nothing but requirements.txt; Linux.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from benchmarks.beside_trl import random_records, train_tokenizer
from benchmarks.runs import as_flags, print_table

LENGTH = 1024
Prepare = Callable[[Path, Path], int]


def ours() -> Prepare:
    """Import what our side needs; return a function of the data's folder and a new one, which returns the number of tokens."""
    from models.templates import load_template
    from models.tokenizer import load_tokenizer
    from training.utils.data.prepare import prepare_phase
    from training.utils.flags.parse import parse
    from training.utils.flags.steps import SFTArguments

    gc.freeze()  # as run_main does

    def prepare(folder: Path, work: Path) -> int:
        places = {"model_name_or_path": folder / "model", "data_path": folder / "pairs.jsonl", "cache_dir": work / "cache"}
        args = parse(SFTArguments, as_flags(places | {"output_dir": work, "max_seq_len": LENGTH, "data_split": "1,0,0"}))
        tokenizer = load_tokenizer(next(iter(args.models.values())))
        data = prepare_phase(args, 1, tokenizer, load_template(next(iter(args.models.values())), tokenizer))
        return sum(data.report[split]["tokens"] for split in ("train", "eval"))

    return prepare


def by_datasets() -> Prepare:
    """The same with datasets.map in two processes."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    def prepare(folder: Path, work: Path) -> int:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")

        def rows(records: dict[str, list[str]]) -> dict[str, list]:
            prompts = [f"\n\nHuman: {text}\n\nAssistant:" for text in records["prompt"]]
            prompts = tokenizer(prompts, add_special_tokens=False)["input_ids"]
            answers = tokenizer([text + tokenizer.eos_token for text in records["chosen"]], add_special_tokens=False)["input_ids"]
            ids = [(prompt + answer)[:LENGTH] for prompt, answer in zip(prompts, answers, strict=True)]
            return {"input_ids": ids, "prompt_length": list(map(len, prompts)), "length": list(map(len, ids))}

        data = load_dataset("json", data_files=str(folder / "pairs.jsonl"), cache_dir=str(work / "cache"), split="train")
        data = data.map(rows, batched=True, num_proc=2, remove_columns=data.column_names)
        return sum(data["length"])

    return prepare


SIDES = {"ours": ours, "datasets": by_datasets}


def held(pid: int) -> tuple[float, float]:
    """Return the MB that a process and all its children hold, shared pages divided among them, and the anonymous part of it."""
    found, todo = {"Pss:": 0.0, "Pss_Anon:": 0.0}, [pid]
    while todo:
        one = todo.pop()
        try:
            todo += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        for name, value, *_ in map(str.split, rollup.splitlines()):
            if name in found:
                found[name] += float(value) / 1024
    return found["Pss:"], found["Pss_Anon:"]


def side(name: str, folder: Path) -> None:
    """Run one side on the folder's file; print a line when its imports are done, then wall and CPU seconds and tokens as JSON."""
    prepare = SIDES[name]()
    print("imported", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        start, used = time.monotonic(), [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        tokens = prepare(folder, Path(work))
        seconds = time.monotonic() - start
        after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(new.ru_utime + new.ru_stime - old.ru_utime - old.ru_stime for new, old in zip(after, used, strict=True))
    print(json.dumps({"wall": seconds, "cpu": cpu, "tokens": tokens}))


def watched(name: str, folder: Path) -> SimpleNamespace:
    """Run a side as a process of its own; return what it prints and the peaks of its memory from its imports on."""
    command = [sys.executable, "-m", "benchmarks.data_preparation", "--side", name, "--folder", folder]
    peaks = [0.0, 0.0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        process.stdout.readline()
        while not select.select([process.stdout], [], [], 0.2)[0]:
            peaks = list(map(max, peaks, held(process.pid)))
        told = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{name} ended with code {process.returncode}; run it alone: {' '.join(map(str, command))}")
    return SimpleNamespace(**json.loads(told), mb=peaks[0], anonymous=peaks[1])


def main() -> None:
    """Write the file, run the sides in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return side(args.side, args.folder)
    with tempfile.TemporaryDirectory(prefix="preparation-") as name:
        folder = Path(name)
        some = [json.dumps(record) + "\n" for record in random_records("pairs", min(args.records, 5000))]
        (folder / "pairs.jsonl").write_text("".join(some), encoding="utf-8")
        tokenizer = train_tokenizer(folder)
        write_model(folder / "model", tokenizer)
        with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in islice(random_records("pairs", args.records), args.records))
        found: dict[str, list[SimpleNamespace]] = {one: [] for one in SIDES}
        for number in range(args.rounds):
            for one in SIDES if number % 2 else reversed(SIDES):
                found[one].append(watched(one, folder))

        def median(one: str, what: str) -> float:
            return statistics.median(getattr(run, what) for run in found[one])

        head = ("side", "wall seconds", "CPU seconds", "peak MB", "anonymous", "tokens")
        whats = ("wall", "cpu", "mb", "anonymous", "tokens")
        print_table(head, ([one, *(f"{median(one, what):.5g}" for what in whats)] for one in SIDES))
        gains = [theirs.wall / own.wall for own, theirs in zip(found["ours"], found["datasets"], strict=True)]
        shares = [f"{median('ours', what) / median('datasets', what):.2f}" for what in ("mb", "anonymous")]
        middle, least, most = statistics.median(gains), min(gains), max(gains)
        print(f"wall time of datasets / ours: {middle:.2f} ({least:.2f} to {most:.2f})")
        print(f"memory of ours / datasets: {shares[0]}, anonymous {shares[1]}")


def write_model(folder: Path, tokenizer: object) -> None:
    """Write the smallest folder that step 1 takes as a model."""
    from transformers import OPTForCausalLM

    from benchmarks.runs import opt_config

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    OPTForCausalLM(opt_config(16, 1, 2, vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
