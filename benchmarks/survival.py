"""Kill, damage, fill and signal runs at random, and count how many come to the same end as one that nothing happened to.

    python -m benchmarks.survival [--steps sft reward dpo ppo] [--kills 50] [--flips 50] [--disks 2] [--signals 6]
    python -m benchmarks.survival --soak 2000

For each step a tiny model makes 12 optimizer steps (PPO: rollouts) with a checkpoint after each. What is tried:

kill     SIGKILL at a random moment, start and saving included, then --resume; survived: the final weights and all metrics but
         times are those of the run without a kill, bit for bit.
flip     one bit of a random byte of a random file of the newest checkpoint, then --resume; survived: the same weights (an older
         checkpoint took its place), or one sentence and exit code 2 that name the damage. Every tenth flip is resumed to the end;
         of the others only the check of the checkpoint is run, which --resume begins with.
disk     a tmpfs (needs root) that becomes full at a random moment; survived: exit code 74, a whole checkpoint, and after
         more space --resume ends with the same weights.
signal   SIGTERM, SIGINT or SIGHUP, once or twice, at a random moment, then --resume; survived: the same weights.

--soak N makes one run of N optimizer steps of each step in their place, and prints its resident memory and descriptors.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
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
from steps import STEPS, step_of
from training.utils.run.manifest import check_content, step_folders, whole_checkpoints

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "deepspeed", "transformers", "datasets", "peft", *(step.module for step in STEPS)])
LENGTH = 12  # steps
COMMON = {"data_split": "1,1,1", "dtype": "fp32", "logging_steps": 1, "show_examples": 0}
ONE_MODEL = {"max_seq_len": 64, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
PPO = {"max_prompt_seq_len": 96, "max_answer_seq_len": 8, "eval_prompts": 4, "critic_model_name_or_path": "reward/whole"}
PPO |= {"per_device_generation_batch_size": 4, "per_device_training_batch_size": 2, "enable_ema": True}
OWN = {"sft": ONE_MODEL, "reward": ONE_MODEL, "dpo": ONE_MODEL, "ppo": PPO}  # flags
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def result(output: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Return the final weights by file, and the metrics without times."""
    files = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.safetensors")}
    weights = {name: content for name, content in files.items() if not name.startswith("checkpoints")}
    return weights, [{name: one for name, one in record.items() if "second" not in name} for record in read_records(output)]


def work(module: str, flags: list[str], log: str) -> None:
    """Do in a forked process what ``python -m module`` does in a new one."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Trial:
    """What all trials of a step share: the folder, the result of a run without trouble, how long it took, and what was lost."""

    def __init__(self, kind: str, files: Path, draw: random.Random) -> None:
        """Run once without trouble, and a second time for its duration with warm caches. files: what prepare() has made."""
        self.kind, self.files, self.folder, self.draw, self.lost = kind, files, files / kind, draw, []
        self.folder.mkdir()
        self.finished(self.folder / "warm")
        started = time.monotonic()
        if code := self.finished(self.folder / "whole"):
            sys.exit(f"{kind} ended with {code}:\n{Path(f'{self.folder}/whole.log').read_text()[-2000:]}")
        self.seconds = time.monotonic() - started
        self.wanted = result(self.folder / "whole")

    def flags(self, output: Path, **more: object) -> dict[str, object]:
        """Return the flags of a run in a folder, which goes on with it if it has begun."""
        base, saving = self.files / "base", {"save_steps": 1, "save_total_limit": 3, "max_steps": LENGTH}
        flags = COMMON | saving | OWN[self.kind] | {"data_path": self.files / "data.jsonl", "output_dir": output} | more
        flags["actor_model_name_or_path" if self.kind == "ppo" else "model_name_or_path"] = base
        if "critic_model_name_or_path" in flags:
            flags["critic_model_name_or_path"] = self.files / flags["critic_model_name_or_path"]
        return flags | {"cache_dir": self.files / "cache"} | ({"resume": True} if (output / "checkpoints").exists() else {})

    def begin(self, output: Path, **more: object) -> multiprocessing.Process:
        """Start the step, or resume it, in a process forked from one that has the packages imported. more: flags."""
        flags = self.flags(output, **more)
        process = FORKS.Process(target=work, args=(step_of(self.kind).module, as_flags(flags), f"{output}.log"))
        process.start()
        return process

    def finished(self, output: Path) -> int:
        """Run or resume to the end; return the exit code."""
        process = self.begin(output)
        process.join()
        return process.exitcode

    def ends_well(self, output: Path, what: str) -> bool:
        """Resume to the end, and say whether the result is the wanted one; keep what was not."""
        code = self.finished(output)
        good = code == 0 and result(output) == self.wanted
        if not good:
            self.lost.append(f"{what}: exit code {code}, {output}.log")
        return good

    def interrupted(self, output: Path, act: Callable[[multiprocessing.Process], None]) -> str:
        """Start or resume, and act at a random moment of the run. Return when, as a share of its duration."""
        process, share = self.begin(output), self.draw.random()
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
            while not (process := self.begin(stopped)).join(self.seconds * 0.7) and process.is_alive():
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
            code = self.finished(output)
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
    texts = ((f"What is {number} plus 1?", f"It is {number + 1}.", "No idea.") for number in range(200))
    rows = (json.dumps(dict(zip(("prompt", "chosen", "rejected"), text, strict=True))) + "\n" for text in texts)
    (folder / "data.jsonl").write_text("".join(rows), encoding="utf-8")


def soak(trial: Trial, steps: int) -> list[object]:
    """Make one run of so many steps; return its resident MiB and descriptors after a tenth of it and at its end."""
    output, found = trial.folder / "soak", []
    process = trial.begin(output, max_steps=steps, num_train_epochs=steps, save_steps=steps // 20, eval_interval=steps // 20)
    while not process.join(0.2) and process.is_alive():
        try:
            resident = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024
            descriptors = sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir())
            found.append((read_records(output)[-1]["step"], resident, descriptors))
        except (OSError, IndexError, TypeError, ValueError):  # not begun, a line half-written, or ended
            continue
    found = [one[1:] for one in found if one[0] >= steps / 10]
    if process.exitcode or not found:
        sys.exit(f"the soak of {trial.kind} ended with {process.exitcode}:\n{Path(f'{output}.log').read_text()[-2000:]}")
    columns = [(values[0], min(values), max(values), values[-1]) for values in zip(*found, strict=True)]
    return [trial.kind, steps, *(" / ".join(f"{value:.0f}" for value in column) for column in columns)]


def main() -> None:
    """Try everything, and print survived / tried; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = {"kill": 50, "flip": 50, "disk": 2, "signal": 6}
    parser.add_argument("--steps", nargs="+", choices=OWN, default=list(OWN))
    for name, count in usual.items():
        parser.add_argument(f"--{name}s", type=int, default=count, help="for each step")
    for name in ("soak", "seed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    args = parser.parse_args()
    lost = []
    with tempfile.TemporaryDirectory(prefix="survival-") as name:
        prepare(Path(name))
        kinds = [kind for kind in OWN if kind in args.steps or (kind == "reward" and "ppo" in args.steps)]
        trials = (Trial(kind, Path(name), random.Random(args.seed)) for kind in kinds)
        asked = (trial for trial in trials if trial.kind in args.steps)

        def rows():
            for trial in asked:
                for kind in usual:
                    count = getattr(args, f"{kind}s") // (2 if kind == "kill" else 1)  # each of these is killed twice
                    survived = sum(getattr(trial, kind)(number) for number in range(count))
                    yield trial.kind, f"{trial.seconds:.1f}", kind, survived, count
                lost.extend(f"{trial.kind}: {sentence}" for sentence in trial.lost)

        if args.soak:
            what = " after a tenth / least / most / at the end"
            print_table(("step", "steps", f"resident MiB{what}", f"descriptors{what}"), (soak(one, args.soak) for one in asked))
        else:
            print_table(("step", "seconds of a run", "what", "survived", "tried"), rows())
        for sentence in lost:
            print(sentence)
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
