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
from scripts.doctor.machine import GIB
from scripts.launch.platforms import load_platforms, platform_named

TABLE = re.compile(r"(<!-- memory:begin (\w+) -->\n).*?(<!-- memory:end -->)", re.S)
SECTIONS = ("sft", "reward", "ppo", "dpo")
HEADS = {"en": ("model", "step 1", "step 2", "step 3", "DPO"), "zh": ("模型", "第一步", "第二步", "第三步", "DPO")}


@lru_cache
def computed(platform: str) -> dict[str, dict[str, Any]]:
    """recipe -> section -> what scripts/doctor/probe.py says of it."""
    from scripts.doctor.probe import memory

    machine = platform_named(platform)
    card = machine.accelerator != "cpu"
    found = {}
    for path in recipe_files(platform):
        where = {
            "devices": machine.devices * machine.nodes,
            "per_node": machine.devices,
            "device_memory": machine.device_memory_gib * GIB if card else 0.0,
            "host_memory": machine.host_memory_gib * GIB,
            "accelerator": card,
            "dtype": machine.dtype,
            "attention": machine.attention,
        }
        found[path.stem] = memory(str(path), where)
    return found


def row(model: str, answer: dict[str, Any], card: bool) -> str:
    """GiB of one card / GiB of one host for each step; on a CPU the host alone. A model that is not known: no figure."""
    cells = []
    for section in SECTIONS:
        plan = answer.get(section, {})
        if "host" not in plan:
            cells.append("–")
        else:
            cells.append(f"{plan['card'] / GIB:.1f} / {plan['host'] / GIB:.0f}" if card else f"{plan['host'] / GIB:.1f}")
    return f"| {model} | {' | '.join(cells)} |"


def table(platform: str, language: str) -> str:
    """The table of a platform's recipes; those of which nothing is known are left out."""
    card = platform_named(platform).accelerator != "cpu"
    lines = [f"| {' | '.join(HEADS[language])} |", "|---|---|---|---|---|"]
    for model, answer in computed(platform).items():
        line = row(model, answer, card)
        if re.search(r"\d / \d|\| \d", line):
            lines.append(line)
    return "\n".join(lines) + "\n"


def page_text(path: Path) -> str:
    """What a page holds. UserError if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name an existing page, such as docs/en/hardware/dcu.md.") from error


def filled(path: Path) -> tuple[str, str]:
    """A page as it is, and as it should be. UserError if it has no place for a table."""
    text = page_text(path)
    if not TABLE.search(text):
        raise UserError(f"{path} has no lines <!-- memory:begin PLATFORM --> and <!-- memory:end -->; leave it out, or add them.")
    language = language_of(path)
    return text, TABLE.sub(lambda match: match[1] + table(match[2], language) + match[3], text)


def main(argv: list[str] | None = None) -> int:
    """Print, write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--check", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if not (args.write or args.check):
        for platform in sorted(load_platforms()):
            print(f"{platform}\n{table(platform, 'en')}")
        return 0
    stale = []
    for path in args.write or args.check:
        if not TABLE.search(page_text(path)) and path.stem.startswith("README"):
            continue
        text, wanted = filled(path)
        if text != wanted:
            stale.append(str(path))
            if args.write:
                path.write_text(wanted, encoding="utf-8")
    if stale and args.check:
        sentence = f"other tables are in {', '.join(stale)}: python -m scripts.memory_table --write docs/*/hardware/*.md"
        print(sentence, file=sys.stderr)
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(told(main)())
