"""The preset smollm2: SmolLM2-135M-Instruct through SFT, reward model and PPO towards friendly answers, on a CPU.

It writes base/ (the converted checkpoint) and data/ beside what every preset writes; docs/en/smollm2.md tells what came out.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.demo import pipeline
from scripts.demo.pipeline import SECTIONS, Stage
from scripts.demo.smollm2_data import SYSTEM, prompts_of, sample
from scripts.demo.smollm2_model import check_packages
from scripts.demo.smollm2_score import vader_score
from training.utils.flags.recipe import Recipe

RECIPE = "configs/cpu/smollm2.yaml"
CHAT_FLAGS = f'--system "{SYSTEM}"'  # of chat.py, for the model to hear what it was trained on
DATA_CODE = ("smollm2_data.py", "smollm2_prompts.yaml", "smollm2_score.py")


def stages(args: Namespace) -> list[Stage]:
    """Return the stages. Raise UserError for packages that are missing and for a recipe that cannot be used."""
    check_packages()
    recipe, output = read_recipe(args.config), args.output
    base, sft, data = (output / name for name in ("base", "sft", "data"))
    drawn = ["--seed", args.seed, "--limit", args.prompts]

    def script(name: str, title: str, *command: object, settings: Any = None) -> Stage:
        return Stage(name, title, lambda again: pipeline.run_step(title, command, output), settings)

    def training(section: str, file: str) -> Stage:
        return pipeline.training_stage(section, args, "--data_path", data / file, settings=recipe[section])

    return [
        script("convert", "The pretrained model, from GGUF to safetensors", "scripts.demo.smollm2_model", base),
        script(
            "sft data",
            "Answers of the pretrained model, to imitate",
            *("scripts.demo.smollm2_data", "sft", base, data, *drawn),
            settings=[args.seed, args.prompts, data_code()],
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


def read_recipe(file: Path) -> dict[str, Any]:
    """Return the sections sft, reward and ppo of the recipe. Raise UserError if it cannot be read or lacks one."""
    sections = Recipe.read(str(file)).sections
    missing = [section for section in SECTIONS if section not in sections]
    if missing:
        raise UserError(f"--config {file}: no section {missing[0]}; start from a copy of {RECIPE}.")
    return {section: sections[section] for section in SECTIONS}


def data_code() -> str:
    """Return a digest of the files that make the data."""
    content = b"".join(Path(__file__).with_name(name).read_bytes() for name in DATA_CODE)
    return hashlib.sha256(content).hexdigest()


def measure_preset(args: Namespace) -> dict[str, Any]:
    """Measure VADER's score on held-out prompts: of the pretrained model, the SFT model and the actor."""
    from scripts.demo.measure import measure

    output, held_out = args.output, args.output / "data" / "heldout.jsonl"
    record = measure(output, args.seed, args.prompts, held_out, lambda messages, answer: vader_score(answer))
    answers = sample(output / "base", prompts_of("heldout")[: args.prompts or None], 1, args.seed)
    record["metrics"]["gold_score_pretrained"] = sum(vader_score(answer.text) for answer in answers) / len(answers)
    return record
