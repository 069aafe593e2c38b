"""What each recipe of configs/ takes, computed, as Markdown tables; keeps docs/*/hardware/ in step with recipes and plan.

    python -m scripts.memory_table                               print the table of every platform
    python -m scripts.memory_table --write docs/*/hardware/*.md    put them between the markers of these pages
    python -m scripts.memory_table --check docs/*/hardware/*.md    exit code 1 if a page holds other tables

A page has a line <!-- memory:begin PLATFORM --> for each table that it wants, and after it <!-- memory:end -->. Recipes are
planned for the machine that configs/platforms.yaml describes; all of them take about a minute.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from errors import UserError, told
from scripts.docs.marked_tables import language_of
from scripts.docs.recipes_table import recipe_files
from scripts.launch.platforms import load_platforms, platform_named
from steps import SECTIONS
from training.utils.flags.recipe import Recipe
from training.utils.memory.arithmetic import GIB

TABLE = re.compile(r"(<!-- memory:begin (\w+) -->\n).*?(<!-- memory:end -->)", re.S)
HEADS = {"en": ("model", "step 1", "step 2", "step 3", "DPO"), "zh": ("模型", "第一步", "第二步", "第三步", "DPO")}


@lru_cache
def computed(platform: str) -> dict[str, dict[str, Any]]:
    """Return recipe -> section -> its plan, or the error that stands in its way."""
    from scripts.plan.section import plan_sections

    return {path.stem: plan_sections(Recipe.read(str(path)), platform_named(platform)) for path in recipe_files(platform)}


def table(platform: str, language: str) -> str:
    """Return GiB of one card / of one host for each step of a platform's recipes, on a CPU the host alone; a dash for what
    is not known. Recipes of which nothing is known are left out.
    """
    card = platform_named(platform).accelerator != "cpu"
    lines = [f"| {' | '.join(HEADS[language])} |", "|---|---|---|---|---|"]
    for model, sections in computed(platform).items():
        plans = {section: found.plan for section, found in sections.items() if not isinstance(found, UserError)}
        cells = dict.fromkeys(SECTIONS, "–")
        for section, plan in plans.items():
            host = plan.on_host / GIB
            cells[section] = f"{plan.on_card / GIB:.1f} / {host:.0f}" if card else f"{host:.1f}"
        lines += [f"| {model} | {' | '.join(cells.values())} |"] if plans else []
    return "\n".join(lines) + "\n"


def filled(path: Path) -> tuple[str, str]:
    """Return a page as it is, and as it should be. Raise UserError if it has no place for a table; a README needs none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name an existing page, such as docs/en/hardware/dcu.md.") from error
    if not TABLE.search(text) and not path.stem.startswith("README"):
        raise UserError(f"{path} has no lines <!-- memory:begin PLATFORM --> and <!-- memory:end -->; leave it out, or add them.")
    return text, TABLE.sub(lambda match: match[1] + table(match[2], language_of(path)) + match[3], text)


def main(argv: list[str] | None = None) -> int:
    """Print, write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--check", nargs="+", type=Path, default=[], metavar="FILE")
    args = parser.parse_args(argv)
    if not (args.write or args.check):
        for platform in sorted(load_platforms()):
            print(f"{platform}\n{table(platform, 'en')}")
    for path in args.write:
        path.write_text(filled(path)[1], encoding="utf-8")
    stale = [str(path) for path in args.check if len(set(filled(path))) > 1]
    if stale:
        advice = "python -m scripts.memory_table --write docs/*/hardware/*.md"
        print(f"other tables are in {', '.join(stale)}: {advice}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(told(main)())
