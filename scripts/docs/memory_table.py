"""What each recipe of configs/ takes, computed, as Markdown tables; keeps docs/*/hardware/ in step with recipes and plan.

    python -m scripts.memory_table                               print the table of every platform
    python -m scripts.memory_table --write docs/*/hardware/*.md    put them between the markers of these pages
    python -m scripts.memory_table --check docs/*/hardware/*.md    exit code 1 if a page holds other tables

A page has a line <!-- memory:begin PLATFORM --> for each table that it wants, and after it <!-- memory:end -->. Recipes are
planned for the machine that configs/platforms.yaml describes; all of them take about a minute.
"""

from functools import lru_cache
from typing import Any

from errors import UserError, told
from scripts.docs.marked_tables import fill_pages
from scripts.docs.recipes_table import recipe_files
from scripts.launch.platforms import load_platforms, platform_named
from steps import SECTIONS
from training.utils.flags.recipe import Recipe
from training.utils.memory.arithmetic import GIB

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
    return "\n".join(lines)


def document(language: str = "en", platform: str = "") -> str:
    """Return the table of a platform; without one the tables of all."""
    if platform:
        return table(platform, language)
    return "\n\n".join(f"{name}\n{table(name, language)}" for name in sorted(load_platforms()))


@told
def main(argv: list[str] | None = None) -> int:
    """Print, write or check; returns the exit code."""
    return fill_pages(argv, "memory", "scripts.memory_table", document)


if __name__ == "__main__":
    raise SystemExit(main())
