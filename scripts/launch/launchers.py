"""Write training/STEP/training_scripts/PLATFORM/run_MODEL.sh for every recipe, or compare them with what is there.

    python -m scripts.launch.launchers [--check]
"""

import argparse
import sys
from pathlib import Path

from scripts.generated import write_files
from scripts.launch.platforms import ROOT, load_platforms
from steps import STEPS
from training.utils.flags.recipe import load_recipe, recipes_of

LAUNCHER = """#!/usr/bin/env bash
# {title}, {model}, {machine}: {arguments} [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" {room} configs/{platform}/{model}.yaml "$@"
"""
ARGUMENTS = {"ppo": "[ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT]"}
WITHOUT = "smollm2"  # whose model and data scripts.smollm2 makes first


def launchers() -> dict[Path, str]:
    """Return path -> text of every launcher: a recipe's steps but DPO, which takes the place of two of them."""
    texts = {}
    for name, platform in load_platforms().items():
        for recipe in recipes_of(ROOT / "configs", name):
            if recipe.stem == WITHOUT:
                continue
            sections = load_recipe(str(recipe))
            for step in (step for step in STEPS if step.section in sections and step.section != "dpo"):
                values = {"room": step.room, "platform": name, "model": recipe.stem, "machine": platform.title}
                values |= {"title": step.title[0].upper() + step.title[1:]}
                values |= {"arguments": ARGUMENTS.get(step.section, "[OUTPUT] [ZERO_STAGE]")}
                path = ROOT / "training" / step.room / "training_scripts" / name / f"run_{recipe.stem}.sh"
                texts[path] = LAUNCHER.format(**values)
    return texts


def main(argv: list[str] | None = None) -> int:
    """Write the launchers; with --check, list those that differ and return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m scripts.launch.launchers", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args(argv)
    return write_files(launchers(), ROOT.glob("training/*/training_scripts/*/*.sh"), args.check, mode=0o755)


if __name__ == "__main__":
    sys.exit(main())
