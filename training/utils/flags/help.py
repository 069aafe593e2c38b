"""The text of --help, made from the fields of a step's dataclass: the common flags, or all of them; English or Chinese."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from errors import UserError

WORDS = {
    "en": {"usage": "usage", "flags": "flags", "required": "required", "default": "default", "also": "also"},
    "zh": {"usage": "用法", "flags": "参数", "required": "必需", "default": "缺省", "also": "别名"},
}
FIRST = (
    "output_dir", "model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path",
    "model_name_or_path_baseline", "model_name_or_path_finetune", "data_path", "config", "max_seq_len", "max_prompt_seq_len",
    "max_answer_seq_len", "per_device_train_batch_size", "per_device_generation_batch_size", "per_device_training_batch_size",
    "num_train_epochs", "learning_rate", "actor_learning_rate", "critic_learning_rate", "kl_coef", "beta", "zero_stage",
    "actor_zero_stage", "critic_zero_stage", "lora_dim", "resume",
)
GROUPS = {"en": ("First", "Common", "Others"), "zh": ("首要", "常用", "其他")}
MORE = {
    "en": "These are the flags that most runs need. --help all lists all {count}; docs/flags.md has them as tables.",
    "zh": "以上是常用参数。--help all 列出全部 {count} 个；表格见 docs/flags_zh.md。",
}


def wanted_help(tokens: list[str]) -> Literal["", "common", "all"]:
    """Return how much help a command line asks for. Raise UserError for another word after --help than all."""
    for place, token in enumerate(tokens):
        if token in ("--help", "-h"):
            rest = tokens[place + 1 : place + 2]
            if rest and rest[0] != "all" and not rest[0].startswith("-"):
                raise UserError(f"--help {rest[0]}: give --help for the common flags, or --help all.")
            return "all" if rest == ["all"] else "common"
    return ""


def help_text(args_class: type, module: str, amount: Literal["common", "all"], language: Literal["en", "zh"]) -> str:
    """Return the help of one command. module: the program's name, as after python -m."""
    words, hints, every = WORDS[language], get_type_hints(args_class), fields(args_class)
    required = [f"--{one.name} …" for one in every if one.default is MISSING and one.default_factory is MISSING]
    title = args_class.zh if language == "zh" else args_class.__doc__
    lines = [f"{words['usage']}: python -m {module} {' '.join(required)} [{words['flags']}]", "", title, ""]
    groups = grouped(every) if amount == "all" else grouped(every)[:2]
    for title, group in zip(GROUPS[language], groups, strict=False):
        lines += [f"{title}:", *(line for one in group for line in flag_lines(one, hints[one.name], language)), ""]
    if amount == "common":
        lines += [MORE[language].format(count=len(every))]
    return "\n".join(lines)


def grouped(flags: Iterable[Field]) -> tuple[list[Field], list[Field], list[Field]]:
    """Return the flags that every run thinks about, in the order of FIRST, the other common ones, and the rest."""
    groups: tuple[list[Field], list[Field], list[Field]] = ([], [], [])
    for one in flags:
        groups[0 if one.name in FIRST else 1 if one.metadata["common"] else 2].append(one)
    groups[0].sort(key=lambda one: FIRST.index(one.name))
    return groups


def flag_lines(one: Field, hint: Any, language: Literal["en", "zh"]) -> list[str]:
    """Return the lines of one flag: its name, values and default, then its meaning."""
    words = WORDS[language]
    value = {bool: "[true|false]", list[str]: "VALUE …"}.get(hint) or one.metadata.get("metavar", "VALUE")
    if get_origin(hint) is Literal:
        value = "|".join(map(str, get_args(hint)))
    default = one.default_factory() if one.default_factory is not MISSING else one.default
    notes = [words["required"]] if default is MISSING else []
    if default not in (MISSING, None, []):
        shown = " ".join(default) if isinstance(default, list) else str(default)
        notes.append(f"{words['default']}: {shown.lower() if isinstance(default, bool) else shown}")
    if one.metadata["aliases"]:
        notes.append(f"{words['also']}: {' '.join(f'--{alias}' for alias in one.metadata['aliases'])}")
    head = f"  --{one.name} {value}" + (f"   ({'; '.join(notes)})" if notes else "")
    if language == "zh":
        return [head, f"      {one.metadata['zh']}"]
    return [head, *textwrap.wrap(one.metadata["help"], 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]
