"""Prepare the data of step 1, from JSON lines to tokens on disk, beside datasets.map with two processes.

    python -m benchmarks.data_preparation --records 200000 --rounds 3

Records are dialogues of random words with the lengths of real ones; the tokenizer is a BPE of 8,192 tokens trained on them. Each
side is a process of its own that has its libraries imported before the clock starts; the sides take turns. datasets reads the
file, writes prompt and answer one after the other, tokenises them in batches and notes where the answer begins: without checks,
split, held-out part, limits and report, which ours has. Memory is the sum of what all processes of a side hold for themselves
(Pss), ten times a second. Needs nothing but requirements.txt; Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from benchmarks.beside_trl import random_records, train_tokenizer
from benchmarks.runs import print_table

LENGTH = 1024
SIDES = ("ours", "datasets")


def ours(folder: Path, work: Path) -> int:
    """Prepare with this repository; return the number of tokens."""
    from models.load import load_tokenizer
    from models.templates import load_template
    from training.utils.data.prepare import prepare_phase
    from training.utils.flags.parse import parse
    from training.utils.flags.steps import SFTArguments

    flags = ["--model_name_or_path", str(folder / "model"), "--data_path", str(folder / "pairs.jsonl"), "--output_dir", str(work)]
    args = parse(SFTArguments, [*flags, "--max_seq_len", str(LENGTH), "--cache_dir", str(work / "cache"), "--data_split", "1,0,0"])
    tokenizer = load_tokenizer(next(iter(args.models.values())))
    data = prepare_phase(args, 1, tokenizer, load_template(next(iter(args.models.values())), tokenizer))
    return sum(data.report[split]["tokens"] for split in ("train", "eval"))


def by_datasets(folder: Path, work: Path) -> int:
    """Prepare with datasets.map in two processes; return the number of tokens."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

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


def held(pid: int) -> float:
    """Return the MB that a process and all its children hold, shared pages divided among them."""
    total, todo = 0.0, [pid]
    while todo:
        one = todo.pop()
        try:
            todo += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        total += next(float(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    return total


def side(name: str, folder: Path) -> None:
    """Run one side on the folder's file; print wall and CPU seconds, peak MB and tokens as JSON."""
    import datasets  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from training.utils.data import prepare  # noqa: F401

    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, held(os.getpid()))

    with tempfile.TemporaryDirectory(dir=folder) as work:
        watcher = threading.Thread(target=watch)
        watcher.start()
        start, used = time.monotonic(), [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        tokens = {"ours": ours, "datasets": by_datasets}[name](folder, Path(work))
        seconds = time.monotonic() - start
        after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        done.set()
        watcher.join()
    cpu = sum(new.ru_utime + new.ru_stime - old.ru_utime - old.ru_stime for new, old in zip(after, used, strict=True))
    print(json.dumps({"wall": seconds, "cpu": cpu, "mb": peak, "tokens": tokens}))


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
                command = [sys.executable, "-m", "benchmarks.data_preparation", "--side", one, "--folder", folder]
                made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True).stdout
                found[one].append(SimpleNamespace(**json.loads(made.splitlines()[-1])))

        def median(one: str, what: str) -> float:
            return statistics.median(getattr(run, what) for run in found[one])

        head = ("side", "wall seconds", "CPU seconds", "peak MB", "tokens")
        print_table(head, ([one, *(f"{median(one, what):.5g}" for what in ("wall", "cpu", "mb", "tokens"))] for one in SIDES))
        gains = [theirs.wall / own.wall for own, theirs in zip(found["ours"], found["datasets"], strict=True)]
        share = median("ours", "mb") / median("datasets", "mb")
        middle, least, most = statistics.median(gains), min(gains), max(gains)
        print(f"wall time of datasets / ours: {middle:.2f} ({least:.2f} to {most:.2f}); memory of ours / datasets: {share:.2f}")


def write_model(folder: Path, tokenizer: object) -> None:
    """Write the smallest folder that step 1 takes as a model."""
    from transformers import OPTForCausalLM

    from benchmarks.runs import opt_config

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    OPTForCausalLM(opt_config(16, 1, 2, vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
