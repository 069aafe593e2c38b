"""What each recipe of configs/ does, as Markdown tables made from the files; keeps docs/en/recipes.md in step with them.

    python -m scripts.recipes_table                                        print, in English
    python -m scripts.recipes_table --write docs/*/recipes.md             put them between the markers
    python -m scripts.recipes_table --check docs/*/recipes.md             exit code 1 if a file holds other tables

A file whose name ends in _zh.md gets Chinese words.
"""

import re
from pathlib import Path
from typing import Any

from errors import told
from scripts.docs.marked_tables import fill_pages
from scripts.launch.platforms import ROOT, load_platforms
from training.utils.flags.recipe import load_recipe, recipe_file, recipes_of

WORDS = {
    "en": {
        "model": "model", "sft": "step 1", "reward": "step 2", "ppo": "step 3", "dpo": "DPO", "full": "full", "bits": "{} bits",
        "host": "Adam on the host", "shared": "one copy", "actor": "actor", "critic": "critic",
    },
    "zh": {
        "model": "模型", "sft": "第一步", "reward": "第二步", "ppo": "第三步", "dpo": "DPO", "full": "全参数", "bits": "{} 位",
        "host": "Adam 在主机内存", "shared": "共用一份", "actor": "actor", "critic": "critic",
    },
}  # fmt: skip


# Not in the tables: the recipe of scripts.smollm2, which makes its model and data first, and those of step 1 alone.
LEFT_OUT = re.compile("smollm2|ptuning_.*|finetune_.*")


def recipe_files(platform: str) -> list[Path]:
    """Return the recipes of a platform that anybody can start: the demo first, then by family and size."""

    def order(path: Path) -> tuple[bool, list[Any]]:
        name = re.sub(r"^([a-z]+)-", r"\g<1>1-", path.stem)  # chatglm-6b before chatglm2-6b
        parts = re.split(r"(\d+(?:\.\d+)?)", name)
        return path.stem != "demo", [float(part) if index % 2 else part for index, part in enumerate(parts)]

    return sorted((path for path in recipes_of(ROOT / "configs", platform) if not LEFT_OUT.fullmatch(path.stem)), key=order)


def method(flags: dict[str, Any], words: dict[str, str], prefix: str = "") -> str:
    """Name the way in which a model is trained, such as "LoRA 64, 4 bits, ZeRO-2"."""
    rank = flags.get(f"{prefix}lora_dim")
    parts = [f"LoRA {rank}" if rank else words["full"]]
    if rank and flags.get("quantization_bit"):
        parts.append(words["bits"].format(flags["quantization_bit"]))
    stage = flags.get(f"{prefix}zero_stage", 0)
    if stage:
        parts.append(f"ZeRO-{stage}")
        if flags.get("offload") or flags.get("offload_optimizer"):
            parts.append(words["host"])
    return ", ".join(parts)


def cell(section: str, flags: dict[str, Any] | None, words: dict[str, str]) -> str:
    """Return the table's word for a section of a recipe; a dash where it has none."""
    if flags is None:
        return "–"
    if section != "ppo":
        return method(flags, words)
    actor, critic = method(flags, words, "actor_"), method(flags, words, "critic_")
    if flags.get("memory_mode") == "shared":
        return f"{actor}, {words['shared']}"
    return actor if actor == critic else f"{words['actor']}: {actor}; {words['critic']}: {critic}"


def document(language: str = "en", _: str = "") -> str:
    """Return one table a platform."""
    words, sections = WORDS[language], ("sft", "reward", "ppo", "dpo")
    tables = []
    for name in load_platforms():
        lines = [f"`{name}`", "", f"| {words['model']} | {' | '.join(words[section] for section in sections)} |", "|---" * 5 + "|"]
        for path in recipe_files(name):
            recipe = load_recipe(str(path))
            cells = [cell(section, recipe.get(section), words) for section in sections]
            file, _ = recipe_file(path)
            lines.append(f"| [{path.stem}](../../{file.relative_to(ROOT).as_posix()}) | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


@told
def main(argv: list[str] | None = None) -> int:
    """Print, write or check; returns the exit code."""
    return fill_pages(argv, "recipes", "scripts.recipes_table", document)


if __name__ == "__main__":
    raise SystemExit(main())
