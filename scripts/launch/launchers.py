"""Write training/STEP/training_scripts/PLATFORM/run_MODEL.sh for every recipe, or compare them with what is there.

    python -m scripts.launch.launchers [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.launch.platforms import ROOT, load_platforms
from steps import STEPS
from training.utils.flags.recipe import load_recipe, recipes_of

LAUNCHER = """#!/usr/bin/env bash
# {title}, {model}, {machine}: {arguments} [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" {room} configs/{platform}/{model}.yaml "$@"
"""
ARGUMENTS = {"ppo": "[ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT]"}
WITHOUT = "smollm2"  # whose model and data scripts/demo/smollm2.py makes first


def launchers() -> dict[Path, str]:
    """Return path -> text of every launcher: a recipe's steps but DPO, which takes the place of two of them."""
    texts = {}
    for name, platform in load_platforms().items():
        for recipe in recipes_of(ROOT / "configs", name):
            if recipe.stem == WITHOUT:
                continue
            sections = load_recipe(str(recipe))
            for step in (step for step in STEPS if step.section in sections and step.section != "dpo"):
                title = step.title[0].upper() + step.title[1:]
                path = ROOT / "training" / step.room / "training_scripts" / name / f"run_{recipe.stem}.sh"
                texts[path] = LAUNCHER.format(
                    title=title,
                    model=recipe.stem,
                    machine=platform.title,
                    arguments=ARGUMENTS.get(step.section, "[OUTPUT] [ZERO_STAGE]"),
                    room=step.room,
                    platform=name,
                )
    return texts


def main(argv: list[str] | None = None) -> int:
    """Write the launchers; with --check, list those that differ and return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m scripts.launch.launchers", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args(argv).check
    wanted = launchers()
    existing = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("training/*/training_scripts/*/*.sh")}
    different = [path for path, text in wanted.items() if existing.get(path) != text]
    unknown = sorted(existing.keys() - wanted.keys())
    for path in different if not check else ():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
        path.chmod(0o755)
    for path in [*different, *unknown]:
        word = "belongs to no recipe; remove it" if path in unknown else "differs" if check else "written"
        print(f"{path.relative_to(ROOT)}: {word}")
    return int(bool(unknown or (check and different)))


if __name__ == "__main__":
    sys.exit(main())
