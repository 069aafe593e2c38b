"""The demo: a small model from a random start through SFT, reward model and PPO, measured on held-out prompts.

    python -m scripts.demo [--seed 1234] [--output output/demo] [--threads 2]
    python -m scripts.demo --ppo_flags "--ppo_epochs 4 --generation_batches 2" --pad_is_eos

Writes base/, sft/, reward/, ppo/, answers.jsonl, summary.json and report.html into the output folder. A second run
starts afresh.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from scripts.demo import pipeline
from scripts.demo.pipeline import ROOT, SECTIONS, Progress, Stage, models_of_steps, training_stage
from scripts.demo.score import demo_score

RECIPE = ROOT / "configs/cpu/demo.yaml"
HELD_OUT_PROMPTS = ROOT / "data/demo/prompts_heldout.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. Exit code 2 for wrong input, else that of the step that failed."""
    args = parse(argv)
    pipeline.run_command_line(lambda: run_demo(args))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags of the demo."""
    parser = pipeline.common_flags(RECIPE, __doc__, "measure on so many held-out prompts; 0 = all")
    parser.add_argument("--ppo_flags", type=shlex.split, default=[], metavar="FLAGS", help="further flags of step 3, as one text")
    parser.add_argument("--pad_is_eos", action="store_true", help="pad with the end token, as many checkpoints do")
    return pipeline.parse_checked(parser, argv)


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, write summary and report. Returns the summary."""
    output = args.output
    base = ["scripts.demo.model", output / "base", "--seed", args.seed, *["--pad_is_eos"] * args.pad_is_eos]
    models = models_of_steps(output)
    models["ppo"] += args.ppo_flags
    title = "The base model"

    def write_base(again: bool) -> None:
        # Random weights are written on the CPU; saying so keeps DeepSpeed from announcing what it looked for.
        pipeline.run_step(title, base, output, DS_ACCELERATOR="cpu")

    stages = [
        Stage("base", title, write_base),
        *(training_stage(section, args, models[section]) for section in SECTIONS),
        Stage("measure", "Answers to held-out prompts, before and after PPO", lambda again: measure_demo(args)),
    ]
    return pipeline.run_stages(args, "demo", Progress(output, "", fresh=True), stages)


def measure_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the SFT model and the actor by the gold rule."""
    from scripts.demo.measure import measure

    longest = pipeline.read_done(args.output, "ppo")["flags"]["max_answer_seq_len"]
    return measure(args.output, args.seed, args.prompts, longest, HELD_OUT_PROMPTS, demo_score)


if __name__ == "__main__":
    main()
