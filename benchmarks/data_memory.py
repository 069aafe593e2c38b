"""Measure memory and time of preparing 100,000 preference pairs for step 2.

    python -m benchmarks.data_memory [--pairs 100000] [--processes 2]

Writes synthetic dialogues of a few hundred tokens as JSONL into a temporary folder, trains a small tokenizer, and starts
the given number of processes at once, as a training run does: one of them tokenises while the others wait for it. Then
one more process opens what is cached. Prints seconds and peak memory of each process; the limit is 1 GB.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.runs import byte_tokenizer

LIMIT_MB = 1000.0
WORDS = 4000  # different words in the synthetic text


def write_pairs(file: Path, count: int) -> None:
    """Write pairs with one to three earlier turns; lengths are log-normal, as in chat data."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(random.choice(letters, size)) for size in random.integers(2, 10, WORDS)]
    frequency = 1.0 / np.arange(1, WORDS + 1)
    text = random.choice(words, size=500_000, p=frequency / frequency.sum()).tolist()

    def sentence(median: float) -> str:
        size = max(3, int(random.lognormal(np.log(median), 0.6)))
        start = int(random.integers(0, len(text) - size)) if size < len(text) else 0
        return " ".join(text[start : start + size])

    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            turns = [f"\n\nHuman: {number} {sentence(25)}"]
            for _ in range(int(random.integers(0, 3))):
                turns.append(f"\n\nAssistant: {sentence(40)}\n\nHuman: {sentence(20)}")
            pair = {"prompt": "".join(turns) + "\n\nAssistant:", "chosen": sentence(60), "rejected": sentence(50)}
            out.write(json.dumps(pair) + "\n")


def write_tokenizer(folder: Path, file: Path) -> None:
    """Write a byte-level BPE of 8000 tokens, trained on the first pairs."""
    with file.open(encoding="utf-8") as lines:
        texts = [line for line, _ in zip(lines, range(3000), strict=False)]
    byte_tokenizer(0).train_new_from_iterator(texts, 8000, show_progress=False).save_pretrained(folder)


def prepare_pairs(file: Path, tokenizer_folder: Path, cache: Path) -> dict[str, float]:
    """Prepare the pairs in this process, read 1000 of them, and return what it took."""
    from transformers import AutoTokenizer

    from models.templates import load_template
    from training.utils.data.prepare import prepare_phase
    from training.utils.flags.parse import parse
    from training.utils.flags.steps import RewardArguments

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    imported = peak_mb()
    started, cpu = time.monotonic(), time.process_time()
    flags = ["--model_name_or_path", str(tokenizer_folder), "--output_dir", str(cache), "--data_path", str(file)]
    flags += ["--max_seq_len", "512", "--data_split", "0,1,0", "--cache_dir", str(cache)]
    data = prepare_phase(parse(RewardArguments, flags), 2, tokenizer, load_template(None, tokenizer))
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    rows = data.train[np.random.default_rng(0).integers(0, len(data.train), 1000).tolist()]
    assert max(map(len, rows["chosen_ids"])) <= 512
    counts = data.report["train"]
    took = {"seconds": seconds, "cpu": cpu, "imported_mb": imported, "peak_mb": peak_mb()}
    return took | {name: counts[name] for name in ("kept", "tokens")}


def peak_mb() -> float:
    """Return the largest resident memory of this process so far, in MB (10^6 bytes). ru_maxrss is in KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, tokenizer_folder, cache = folder / "pairs.jsonl", folder / "tokenizer", folder / "cache"
        write_pairs(file, args.pairs)
        write_tokenizer(tokenizer_folder, file)
        print(f"{args.pairs} pairs, {file.stat().st_size / 1e6:.0f} MB of JSONL")
        peaks = []
        for what, number in (("build", args.processes), ("reopen", 1)):
            with ProcessPoolExecutor(number, mp_context=spawn) as pool:
                jobs = [pool.submit(prepare_pairs, file, tokenizer_folder, cache) for _ in range(number)]
                for process, job in enumerate(jobs):
                    took = job.result()
                    peaks.append(took["peak_mb"])
                    print(
                        f"{what}, process {process}: {took['seconds']:.1f} s ({took['cpu']:.1f} s of CPU), peak memory "
                        f"{took['peak_mb']:.0f} MB ({took['imported_mb']:.0f} MB after the imports), "
                        f"{took['kept']:.0f} training pairs, {took['tokens'] / 1e6:.1f} million tokens"
                    )
        written = sum(one.stat().st_size for one in cache.rglob("*.arrow"))
        print(f"cache: {written / 1e6:.0f} MB of Arrow; largest peak {max(peaks):.0f} MB, limit {LIMIT_MB:.0f} MB")
    if max(peaks) >= LIMIT_MB:
        raise SystemExit("too much memory")


if __name__ == "__main__":
    main()
