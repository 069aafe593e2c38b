"""How a run ends after SIGHUP, SIGINT or SIGTERM, sent to a step, to the launcher and to train.py, once and twice.

    python -m benchmarks.signal_table [--to step launcher train.py] [--signals HUP INT TERM] [--times 1 2]
        [--moments loading training evaluating saving]

A tiny model makes steps of step 1, each with an evaluation and a checkpoint. The signal is sent to one process, as kill and
schedulers do, not to its group, as Ctrl-C does; a second one follows after 0.2 s. A row says the exit code, how long the end
took, the last step in the metrics and of the newest whole checkpoint, and the last line printed.
"""

import argparse
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.runs import as_flags, print_table, read_records
from benchmarks.survival import SIGNALS, Trial, prepare
from training.utils.run.manifest import whole_checkpoints

MOMENTS = ("loading", "training", "evaluating", "saving")
MORE = {"max_steps": 500, "num_train_epochs": 500, "eval_interval": 1, "eval_fraction": 0.5, "per_device_eval_batch_size": 1}
BEGUN = 3  # steps before the signal


def start(to: str, trial: Trial, output: Path) -> multiprocessing.Process | subprocess.Popen:
    """Start step 1, alone, under the launcher or under train.py."""
    if to == "step":
        return trial.begin(output, **MORE)
    flags = trial.flags(output, **MORE)
    model, where = flags.pop("model_name_or_path"), flags.pop("output_dir")
    if to == "launcher":
        words = ["-m", "scripts.launch", "step1_sft", "configs/cpu/demo.yaml", where, *as_flags(flags)]
        words += ["--model_name_or_path", model]
    else:
        words = ["train.py", "--actor-model", model, "--deployment-type", "cpu", "--step", "1", "--output-dir", where]
        words += ["--sft-flags", " ".join(as_flags(flags))]
    with Path(f"{output}.log").open("w") as log:
        names = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen([sys.executable, *map(str, words)], stdout=log, stderr=log, env=names)


def moment(output: Path) -> tuple[str, int]:
    """Return what the run in a folder does now, and the last step in its metrics."""
    try:
        records = read_records(output)
    except (OSError, ValueError):  # none yet, or a line half-written
        records = []
    steps = [record["step"] for record in records if "train/loss" in record]
    if not steps:
        return ("loading" if (output / ".lock").exists() else "starting"), 0
    if list((output / "checkpoints").glob(".writing-*")):
        return "saving", steps[-1]
    return ("training" if "eval/loss" in records[-1] else "evaluating"), steps[-1]


def tried(to: str, trial: Trial, number: int, times: int, wanted: str) -> list[object]:
    """Send a signal so many times at this moment of a run; return a row of the table."""
    output = trial.folder / f"{to}-{number}-{times}-{wanted}"
    process = start(to, trial, output)
    while True:
        where = next(iter(output.glob("actor-models/*")), output)
        now, step = moment(where)
        if now == wanted and (step >= BEGUN or wanted == "loading"):
            break
        if (process.exitcode if to == "step" else process.poll()) is not None:
            sys.exit(f"{output}.log: the run ended by itself:\n{Path(f'{output}.log').read_text()[-2000:]}")
        time.sleep(0.001)
    sent = time.monotonic()
    for again in range(times):
        os.kill(process.pid, number)
        time.sleep(0.2 * (again + 1 < times))
    process.join() if to == "step" else process.wait()
    seconds, code = time.monotonic() - sent, process.exitcode if to == "step" else process.returncode
    newest = next(whole_checkpoints(where / "checkpoints"), None)
    text = [line for line in Path(f"{output}.log").read_text(errors="replace").splitlines() if line.strip()]
    ends = "a traceback" if any(line.startswith("Traceback") for line in text) else text[-1] if text else "nothing"
    name = signal.Signals(number).name
    saved = int(newest.name.removeprefix("step-")) if newest else 0
    return [to, name, times, wanted, code if code >= 0 else 128 - code, f"{seconds:.1f}", moment(where)[1], saved, ends[:110]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", nargs="+", default=["step", "launcher", "train.py"])
    parser.add_argument("--signals", nargs="+", default=[number.name[3:] for number in SIGNALS])
    parser.add_argument("--times", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="signals-") as name:
        prepare(Path(name))
        trial = Trial("sft", Path(name), random.Random(0))
        rows = (
            tried(to, trial, number, times, when)
            for to in args.to
            for number in (signal.Signals[f"SIG{name}"] for name in args.signals)
            for times in args.times
            for when in args.moments
        )
        print_table(("to", "signal", "times", "while", "exit code", "seconds", "last step", "saved", "last line"), rows)


if __name__ == "__main__":
    main()
