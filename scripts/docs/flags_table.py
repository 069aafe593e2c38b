"""Print the flags of all steps as Markdown tables, made from the parsers; keeps docs/flags.md and flags_zh.md in step with them.

    python -m scripts.flags_table                               print
    python -m scripts.flags_table --write docs/flags*.md        put them between <!-- flags:begin --> and <!-- flags:end -->
    python -m scripts.flags_table --check docs/flags*.md        exit code 1 if a file holds other tables
"""

from __future__ import annotations

from argparse import SUPPRESS, Action
from dataclasses import fields

from errors import told
from scripts.docs.marked_tables import fill_pages
from training.utils.flags.former import NOT_YET, RETIRED, FormerFlag
from training.utils.flags.parse import FlagParser
from training.utils.flags.steps import STEPS, EvaluateArguments, PromptEvalArguments, RewardEvalArguments

BEGIN, END = "<!-- flags:begin -->", "<!-- flags:end -->"
EVALUATIONS = (PromptEvalArguments, EvaluateArguments, RewardEvalArguments)
WORDS = {
    "en": {
        "flag": "flag", "meaning": "meaning", "required": "required", "on": "on", "off": "off", "one of": " One of {}.",
        "also": " Also {}.", "step": "step {}", "other": " {}: {}", "earlier": "earlier flag", "here": "here",
        "refused": "refused, because", "comma": ", ",
    },
    "zh": {
        "flag": "参数", "meaning": "含义", "required": "必需", "on": "开", "off": "关",
        "one of": "可选：{}。", "also": "别名：{}。", "step": "第 {} 步", "other": "{}：{}", "earlier": "原参数",
        "here": "在本项目中（英文）", "refused": "拒绝的原因（英文）", "comma": "、",
    },
}


def actions(args_class: type) -> dict[str, Action]:
    """The flags of a step by name, without hidden ones and --help."""
    shown = (action for action in FlagParser(args_class)._actions if action.help != SUPPRESS and action.dest != "help")
    return {action.dest: action for action in shown}


def flags_table(classes: tuple[type, ...], titles: tuple[str, ...], language: str) -> str:
    """Return a table with one row a flag: its name, its default in each of the classes, its meaning."""
    words = WORDS[language]
    parsers = [actions(one) for one in classes]
    chinese = {title: {one.name: one.metadata["zh"] for one in fields(each)} for title, each in zip(titles, classes, strict=True)}
    lines = [f"| {words['flag']} | {' | '.join(titles)} | {words['meaning']} |", "|---|" + "---|" * len(titles) + "---|"]
    for name in dict.fromkeys(name for parser in parsers for name in parser):
        found = {title: parser[name] for title, parser in zip(titles, parsers, strict=True) if name in parser}
        texts = {title: action.help.removeprefix("Required. ") for title, action in found.items()}
        if language == "zh":
            texts = {title: chinese[title][name] for title in found}
        defaults = [shown_default(found.get(title), words) for title in titles]
        lines.append(f"| `--{name}` | {' | '.join(defaults)} | {meaning(next(iter(found.values())), texts, words)} |")
    return "\n".join(lines)


def shown_default(action: Action | None, words: dict[str, str]) -> str:
    """Return the default as one writes it on the command line; a dash where the step has no such flag."""
    if action is None:
        return "–"
    if action.default is SUPPRESS:
        return words["required"]
    if action.default in (None, []):
        return ""
    if isinstance(action.default, bool):
        return words["on"] if action.default else words["off"]
    return " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)


def meaning(action: Action, texts: dict[str, str], words: dict[str, str]) -> str:
    """Return the help text, other texts of later steps, the choices and other names."""
    first = next(iter(texts.values()))
    text = first
    for title, other in texts.items():
        if other != first:
            text += words["other"].format(title[:1].upper() + title[1:], other)
    if action.choices and len(action.choices) > 1:
        text += words["one of"].format(words["comma"].join(map(str, action.choices)))
    names = [one for one in action.option_strings[1:] if "_" in one]
    if names:
        text += words["also"].format(words["comma"].join(f"`{one}`" for one in names))
    return escaped(text)


def former_table(rows: tuple[FormerFlag, ...], head: str, title: str) -> str:
    """Return a table with one row for the flags of earlier systems that share a fate."""
    lines = [f"| {head} | {title} |", "|---|---|"]
    for row in rows:
        lines.append(f"| {' '.join(f'`--{name}`' for name in row.names)} | {escaped(row.now)} |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text inside a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def document(language: str = "en") -> str:
    """Return all tables in a language."""
    words = WORDS[language]
    steps = tuple(words["step"].format(one.phase) if one.title.startswith("step") else one.title for one in STEPS)
    tables = [
        flags_table(STEPS, steps, language),
        flags_table(EVALUATIONS, tuple(one.title for one in EVALUATIONS), language),
        former_table(RETIRED, words["earlier"], words["here"]),
        former_table(NOT_YET, words["earlier"], words["refused"]),
    ]
    return "\n\n".join(tables)


@told
def main(argv: list[str] | None = None) -> int:
    """Print, write or check; returns the exit code."""
    return fill_pages(argv, "flags", "scripts.flags_table", (BEGIN, END), document)


if __name__ == "__main__":
    raise SystemExit(main())
