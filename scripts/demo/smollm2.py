"""The preset smollm2: SmolLM2-135M-Instruct through SFT, reward model and PPO towards friendly answers, on a CPU.

    bash scripts/quickstart.sh --preset smollm2 [--seed 1234] [--output output/smollm2] [--threads 2]

Writes base/ (the converted checkpoint), data/, sft/, reward/, ppo/, answers.jsonl, summary.json and report.html. An
interrupted run goes on where it was with the same command; with a changed recipe it begins at the first step that differs.
docs/en/smollm2.md tells what it does and what came out.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.demo import pipeline
from scripts.demo.pipeline import ROOT, SECTIONS, Progress, Stage, models_of_steps, training_stage
from scripts.demo.smollm2_model import check_packages
from scripts.demo.smollm2_prompts import SYSTEM, prompts_of
from scripts.demo.smollm2_score import vader_score
from training.utils.flags.recipe import Recipe

RECIPE = ROOT / "configs/cpu/smollm2.yaml"
DATA_CODE = ("smollm2_prompts.py", "smollm2_prompts.yaml", "smollm2_data.py", "smollm2_score.py")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. Exit code 2 for wrong input, else that of the step that failed."""
    args = parse(argv)
    pipeline.run_command_line(lambda: run_preset(args))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags of the preset."""
    parser = pipeline.common_flags(RECIPE, __doc__, "use and measure only so many prompts; 0 = all")
    return pipeline.parse_checked(parser, argv)


def run_preset(args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, write summary and report. Returns the summary."""
    check_packages()
    recipe = read_recipe(args.config)
    output, models = args.output, models_of_steps(args.output)
    base, sft, data = (output / name for name in ("base", "sft", "data"))
    drawn = ["--seed", args.seed, "--limit", args.prompts]

    def script(name: str, title: str, *command: object, done: bool = False) -> Stage:
        return Stage(name, title, lambda again: pipeline.run_step(title, command, output), done=done)

    def training(section: str, file: str) -> Stage:
        return training_stage(section, args, [*models[section], "--data_path", data / file], recipe[section])

    stages = [
        # config.json is written last: the folder is whole then, and no setting changes it.
        script(
            "convert",
            "The pretrained model, from GGUF to safetensors",
            "scripts.demo.smollm2_model",
            base,
            done=(base / "config.json").is_file(),
        ),
        script(
            "sft data",
            "Answers of the pretrained model, to imitate",
            *("scripts.demo.smollm2_data", "sft", base, data, *drawn),
        ),
        training("sft", "sft.jsonl"),
        script(
            "pairs",
            "Answers of the SFT model, in pairs by their gold score",
            *("scripts.demo.smollm2_data", "pairs", sft, data, *drawn),
        ),
        training("reward", "pairs.jsonl"),
        training("ppo", "ppo.jsonl"),
        Stage("measure", "Answers to held-out prompts, before and after PPO", lambda again: measure_preset(args)),
    ]
    progress = Progress(output, f"seed {args.seed}, prompts {args.prompts}, {data_code()}")
    return pipeline.run_stages(args, "smollm2", progress, stages, f'--system "{SYSTEM}"')


def read_recipe(file: Path) -> dict[str, Any]:
    """Return the sections sft, reward and ppo of the recipe. Raise UserError if it cannot be read or lacks one."""
    sections = Recipe.read(str(file)).sections
    missing = [section for section in SECTIONS if section not in sections]
    if missing:
        raise UserError(f"--config {file}: no section {missing[0]}; start from a copy of {RECIPE.relative_to(ROOT)}.")
    return {section: sections[section] for section in SECTIONS}


def data_code() -> str:
    """Return a digest of the files that make the data."""
    content = b"".join(Path(__file__).with_name(name).read_bytes() for name in DATA_CODE)
    return hashlib.sha256(content).hexdigest()


def measure_preset(args: argparse.Namespace) -> dict[str, Any]:
    """Measure VADER's score on held-out prompts: of the pretrained model, the SFT model and the actor."""
    from scripts.demo.measure import measure
    from scripts.demo.smollm2_data import sample

    output = args.output
    longest = pipeline.read_done(output, "ppo")["flags"]["max_answer_seq_len"]
    held_out = output / "data" / "heldout.jsonl"
    found = measure(output, args.seed, args.prompts, longest, held_out, lambda messages, answer: vader_score(answer))
    answers = sample(output / "base", prompts_of("heldout")[: args.prompts or None], 1, args.seed)
    found["metrics"]["gold_score_pretrained"] = sum(vader_score(text) for text, _ in answers) / len(answers)
    return found


if __name__ == "__main__":
    main()
