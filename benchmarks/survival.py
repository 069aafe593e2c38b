"""Kill, damage, fill and signal runs at random, and count how many come to the same end as one that nothing happened to.

    python -m benchmarks.survival [--kills 50] [--flips 200] [--disks 5] [--signals 12] [--seed 0]

A tiny model makes 12 steps of step 1 with a checkpoint after each. What is tried:

kill     SIGKILL at a random moment, start and saving included, then --resume; survived: the final weights and all losses of
         the metrics are those of the run without a kill, bit for bit.
flip     one bit of a random byte of a random file of the newest checkpoint, then --resume; survived: the same weights (an older
         checkpoint took its place), or one sentence and exit code 2 that name the damage. Every tenth flip is resumed to the end;
         of the others only the check of the checkpoint is run, which --resume begins with.
disk     a tmpfs (needs root) that becomes full at a random moment; survived: exit code 74, a whole checkpoint, and after
         more space --resume ends with the same weights.
signal   SIGTERM, SIGINT or SIGHUP, once or twice, at a random moment, then --resume; survived: the same weights.
"""

import argparse
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.runs import as_flags, byte_tokenizer, opt_config, print_table, read_records
from errors import UserError
from steps import STEPS
from training.utils.run.manifest import check_content, step_folders, whole_checkpoints

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "deepspeed", "transformers", "datasets", "peft", *(step.module for step in STEPS)])
LENGTH = 12  # steps
MODULE = "training.step1_sft.main"
COMMON = {"data_split": "1,1,1", "dtype": "fp32", "logging_steps": 1, "save_steps": 1, "save_total_limit": 3, "max_steps": LENGTH}
FLAGS = COMMON | {"max_seq_len": 64, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "show_examples": 0}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def begin(folder: Path, output: Path) -> multiprocessing.Process:
    """Start the step, or resume it, in a process forked from one that has the packages imported."""
    resume = {"resume": True} if (output / "checkpoints").exists() else {}
    flags = FLAGS | {"model_name_or_path": folder / "base", "data_path": folder / "data.jsonl", "output_dir": output}
    process = FORKS.Process(target=work, args=(as_flags(flags | {"cache_dir": folder / "cache"} | resume), f"{output}.log"))
    process.start()
    return process


def work(flags: list[str], log: str) -> None:
    """Do in a forked process what ``python -m MODULE`` does in a new one."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.argv = [MODULE, *flags]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


def finished(folder: Path, output: Path) -> int:
    """Run or resume to the end; return the exit code."""
    process = begin(folder, output)
    process.join()
    return process.exitcode


def result(output: Path) -> tuple[bytes, list[float]]:
    """Return the final weights and the losses of all steps."""
    losses = [record["train/loss"] for record in read_records(output) if "train/loss" in record]
    return (output / "model.safetensors").read_bytes(), losses


class Trial:
    """What all trials share: the folder, the result of a run without trouble, how long it took, and what was lost."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        """Run once without trouble, and a second time for its duration with warm caches."""
        self.folder, self.draw, self.lost = folder, draw, []
        finished(folder, folder / "warm")
        started = time.monotonic()
        finished(folder, folder / "whole")
        self.seconds = time.monotonic() - started
        self.wanted = result(folder / "whole")

    def ends_well(self, output: Path, what: str) -> bool:
        """Resume to the end, and say whether the result is the wanted one; keep what was not."""
        code = finished(self.folder, output)
        good = code == 0 and result(output) == self.wanted
        if not good:
            self.lost.append(f"{what}: exit code {code}, {output}.log")
        return good

    def interrupted(self, output: Path, act: Callable[[multiprocessing.Process], None]) -> str:
        """Start or resume, and act at a random moment of the run. Return when, as a share of its duration."""
        process, share = begin(self.folder, output), self.draw.random()
        time.sleep(share * self.seconds)
        act(process)
        process.join()
        return f"{share:.2f} of a run"

    def kill(self, number: int) -> bool:
        """Kill a run two times, then let it end."""
        output = self.folder / f"kill-{number}"
        when = [self.interrupted(output, lambda process: process.kill()) for _ in range(2)]
        return self.ends_well(output, f"killed at {', '.join(when)}")

    def signal(self, number: int) -> bool:
        """Send a signal once or twice, then let the run end."""
        output, name, twice = self.folder / f"signal-{number}", self.draw.choice(SIGNALS), self.draw.random() < 0.5

        def act(process: multiprocessing.Process) -> None:
            for _ in range(1 + twice):
                if process.is_alive():
                    os.kill(process.pid, name)
                time.sleep(0.05)

        when = self.interrupted(output, act)
        return self.ends_well(output, f"{name.name} at {when}")

    def flip(self, number: int) -> bool:
        """Flip one bit of the newest checkpoint of a run that stopped in its middle."""
        stopped, output = self.folder / "stopped", self.folder / f"flip-{number}"
        if not stopped.exists():
            while not (process := begin(self.folder, stopped)).join(self.seconds * 0.7) and process.is_alive():
                process.kill()
                process.join()
                if len(list(whole_checkpoints(stopped / "checkpoints"))) > 1:
                    break
        shutil.copytree(stopped, output)
        newest = step_folders(output / "checkpoints")[-1]
        file = self.draw.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
        content = bytearray(file.read_bytes())
        place = self.draw.randrange(len(content))
        content[place] ^= 1 << self.draw.randrange(8)
        file.write_bytes(content)
        what = f"a bit of byte {place} of {file.relative_to(output)}"
        try:
            check_content(newest)
        except UserError:
            good = True
        else:
            good = False
            self.lost.append(f"{what} was not noticed")
        if number % 10 == 0:
            good = self.ends_well(output, what) and good
        shutil.rmtree(output)
        return good

    def disk(self, number: int) -> bool:
        """Run on a small tmpfs until it is full, then give it more space."""
        output = self.folder / f"disk-{number}"
        output.mkdir()
        size = sum(file.stat().st_size for file in (self.folder / "whole").rglob("*") if file.is_file())
        limit = int(size * self.draw.uniform(0.4, 1.0))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", output], check=True)
        try:
            code = finished(self.folder, output)
            kept = list(whole_checkpoints(output / "checkpoints"))
            if code not in (0, 74) or (code == 74 and len(step_folders(output / "checkpoints")) > 1 and not kept):
                self.lost.append(f"a disk of {limit} bytes: exit code {code}, {len(kept)} whole checkpoints, {output}.log")
                return False
            subprocess.run(["mount", "-o", f"remount,size={4 * size}", output], check=True)
            return self.ends_well(output, f"a disk of {limit} bytes")
        finally:
            subprocess.run(["umount", "-l", output], check=True)


def prepare(folder: Path) -> None:
    """Write a tiny model and its data."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(300)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 128}
    AutoModelForCausalLM.from_config(opt_config(32, 2, 4, vocab_size=300, **ids)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = ({"prompt": f"What is {number} plus 1?", "response": f"It is {number + 1}."} for number in range(200))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Try everything, and print survived / tried; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = {"kill": 50, "flip": 200, "disk": 5, "signal": 12}
    for name, count in usual.items():
        parser.add_argument(f"--{name}s", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="survival-") as name:
        folder = Path(name)
        prepare(folder)
        trial = Trial(folder, random.Random(args.seed))
        print(f"a run takes {trial.seconds:.1f} s")

        def rows():
            for kind in usual:
                count = getattr(args, f"{kind}s") // (2 if kind == "kill" else 1)  # each of these is killed twice
                survived = sum(getattr(trial, kind)(number) for number in range(count))
                yield kind, survived, count

        print_table(("what", "survived", "tried"), rows())
        for sentence in trial.lost:
            print(sentence)
    sys.exit(bool(trial.lost))


if __name__ == "__main__":
    main()
