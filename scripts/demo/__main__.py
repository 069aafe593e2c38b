"""The demo: a small model from a random start through SFT, reward model and PPO, measured on held-out prompts.

    python -m scripts.demo [--seed 1234] [--output output/demo] [--threads 2]
    python -m scripts.demo --ppo_flags "--ppo_epochs 4 --generation_batches 2" --pad_is_eos
    python -m scripts.smollm2 [--seed 1234] [--output output/smollm2] [--threads 2]

The first writes base/, sft/, reward/, ppo/, answers.jsonl, summary.json and report.html into the output folder; a second run
starts afresh. scripts.smollm2 takes a pretrained model (docs/en/smollm2.md); a second run goes on where the first was
interrupted, or at the first step whose recipe differs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.demo import pipeline, smollm2
from scripts.demo.pipeline import ROOT, SECTIONS, Stage
from scripts.demo.score import demo_score

HELD_OUT_PROMPTS = ROOT / "data/demo/prompts_heldout.jsonl"


@dataclass(frozen=True)
class Preset:
    """A model and its data. stages(args) are done one after the other, the last of them measures.

    fresh: a second run starts afresh. chat_flags: of chat.py, for the model to hear what it was trained on.
    """

    stages: Callable[[Namespace], list[Stage]]
    prompts: str
    fresh: bool = False
    chat_flags: str = ""


def demo_stages(args: Namespace) -> list[Stage]:
    """Return the stages of the demo."""
    title = "The base model"
    base = ["scripts.demo.model", args.output / "base", "--seed", args.seed, *["--pad_is_eos"] * args.pad_is_eos]

    def write_base(again: bool) -> None:
        # Random weights are written on the CPU; saying so keeps DeepSpeed from announcing what it looked for.
        pipeline.run_step(title, base, args.output, DS_ACCELERATOR="cpu")

    def measure(again: bool) -> dict[str, Any]:
        from scripts.demo.measure import measure

        return measure(args.output, args.seed, args.prompts, HELD_OUT_PROMPTS, demo_score)

    return [
        Stage("base", title, write_base),
        *(pipeline.training_stage(section, args, *args.ppo_flags * (section == "ppo")) for section in SECTIONS),
        Stage("measure", "Answers to held-out prompts, before and after PPO", measure),
    ]


PRESETS = {
    "demo": Preset(demo_stages, "measure on so many held-out prompts; 0 = all", fresh=True),
    "smollm2": Preset(
        smollm2.stages, "use and measure only so many prompts; 0 = all", chat_flags=smollm2.CHAT_FLAGS
    ),
}


def parse(argv: Sequence[str] | None, preset: str = "demo") -> Namespace:
    """Parse the flags of a preset, check their bounds, and make their paths whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, folder, recipe = parser.add_argument, f"output/{preset}", f"configs/cpu/{preset}.yaml"
    add("--seed", type=int, default=1234, help="random seed of all steps (%(default)s)")
    add("--output", type=Path, default=ROOT / folder, help=f"where results go ({folder})")
    add("--threads", type=int, default=usable_cores(), help="CPU threads (%(default)s)")
    add("--config", type=Path, default=ROOT / recipe, help=f"recipe of the steps ({recipe})")
    add("--prompts", type=int, default=0, help=PRESETS[preset].prompts)
    if preset == "demo":
        add("--ppo_flags", type=shlex.split, default=[], metavar="FLAGS", help="further flags of step 3, as one text")
        add("--pad_is_eos", action="store_true", help="pad with the end token, as many checkpoints do")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.seed < 0 or args.prompts < 0:
        parser.error("--threads must be 1 or more, --seed and --prompts 0 or more")
    # The steps run in the root of the repository, where the recipe's data paths lead; the user may stand elsewhere.
    args.output, args.config = args.output.resolve(), args.config.resolve()
    return args


def usable_cores() -> int:
    """Return how many cores this process may use; all, where the system cannot say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(args: Namespace, preset: str = "demo") -> dict[str, Any]:
    """Train, measure, write summary and report. Returns the summary."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by torch here and in the steps, once it is imported
    one = PRESETS[preset]
    records = pipeline.run_stages(args.output, one.stages(args), one.fresh)
    return pipeline.finish(args, preset, records, one.chat_flags)


def main(argv: Sequence[str] | None = None, preset: str = "demo") -> None:
    """Command line. Exit code 2 for wrong input, else that of the step that failed; a signal ends the running step as well."""
    args = parse(argv, preset)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves subprocess.run, which then ends the step as well
    try:
        run(args, preset)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # the step got the same signal and has ended
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
