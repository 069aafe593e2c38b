"""What a rollout of PPO and its update cost with vocabularies of published sizes, beside TRL's; nothing is learned.

    python -m benchmarks.ppo_vocabulary --trl-python ../trl/bin/python --output output/ppo_vocabulary
    python -m benchmarks.ppo_vocabulary --vocabularies 2048 --rounds 1 --rollouts 2          # ours alone, a short try

The demo's network (4 layers of 256) with random weights and as many rows in its embedding and output matrix; it hardly ever
draws an end token, so all answers have 24 tokens and nobody gains by ending early. Settings as in benchmarks/ppo_learning.py.
Each round runs gae beside TRL, then rloo; the first rollout of a run is not counted. Medians over the rounds (lowest to highest).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ppo_learning
from benchmarks.ppo_learning_clock import read_clock
from benchmarks.ppo_learning_report import TRL, spread
from benchmarks.ppo_learning_tasks import ROOT, TASKS, data_folder
from errors import told

TASK = TASKS["demo"]
VOCABULARIES = (2048, 32000, 50272)  # the demo's, LLaMA's, OPT's


def write_models(folder: Path, vocabulary: int) -> None:
    """An actor and a reward model, sft/ and reward/ of the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from scripts.demo.model import write_base_model

    write_base_model(folder / "sft", data_dir=data_folder(TASK, folder))
    torch.manual_seed(0)
    actor = AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=torch.float32)
    actor.resize_token_embeddings(vocabulary, mean_resizing=False)
    actor.save_pretrained(folder / "sft")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "sft", num_labels=1, dtype=torch.float32)
    reward.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(folder / "sft").save_pretrained(folder / "reward")


def seconds_a_rollout(run: Path) -> float:
    """Processor time, the first rollout left out."""
    clock = read_clock(run)
    first, last = min(clock), max(clock)
    return (clock[last]["cpu_seconds"] - clock[first]["cpu_seconds"]) / (last - first)


@told
def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, help="interpreter that has trl 1.12.0; without it ours runs alone")
    parser.add_argument("--output", type=Path, default=ROOT / "output/ppo_vocabulary")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=4, help="of a run, the first not counted (%(default)s)")
    args = parser.parse_args(argv)
    if args.rollouts < 2:
        parser.error("--rollouts must be 2 or more: the first is not counted")
    if args.trl_python:
        ppo_learning.check_trl(args.trl_python)
    pairs = [["gae", *([TRL] if args.trl_python else [])], ["rloo"]]
    lines = ["| vocabulary | method | CPU seconds a rollout | of TRL's |", "|---|---|---|---|"]
    for vocabulary in args.vocabularies:
        words = ["--output", str(args.output / str(vocabulary)), "--rollouts", str(args.rollouts), "--copies", "1"]
        given = ppo_learning.parse([*words, *(["--trl-python", str(args.trl_python)] if args.trl_python else [])])
        folder = given.output / TASK.name
        if not (folder / "reward/config.json").is_file():
            write_models(folder, vocabulary)
        found: dict[str, list[float]] = defaultdict(list)
        for seed in range(1, args.rounds + 1):
            for methods in pairs:
                runs = {method: folder / f"{method}-{seed}" for method in methods}
                commands = [(ppo_learning.command(TASK, name, seed, run, given), run / "log.txt") for name, run in runs.items()]
                ppo_learning.run_side_by_side(commands, given)
                for method, run in runs.items():
                    found[method].append(seconds_a_rollout(run))
        for method, values in found.items():
            ratio = f"{statistics.median(values) / statistics.median(found[TRL]):.2f}" if TRL in found and method != TRL else ""
            lines.append(f"| {vocabulary} | {method} | {spread(values, '.2f')} | {ratio} |")
            print(lines[-1], flush=True)
    (args.output / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
