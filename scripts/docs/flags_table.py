"""Print the flags of all steps as Markdown tables, made from the parsers; keeps docs/flags.md in step with them.

    python -m scripts.flags_table                       print
    python -m scripts.flags_table --write docs/flags.md     put them between <!-- flags:begin --> and <!-- flags:end -->
    python -m scripts.flags_table --check docs/flags.md     exit code 1 if the file holds other tables
"""

from __future__ import annotations

from argparse import SUPPRESS, Action

from errors import told
from scripts.docs.marked_tables import fill_pages
from training.utils.flags.former import NOT_YET, RETIRED, FormerFlag
from training.utils.flags.parse import FlagParser
from training.utils.flags.steps import STEPS, EvaluateArguments, PromptEvalArguments, RewardEvalArguments

BEGIN, END = "<!-- flags:begin -->", "<!-- flags:end -->"
EVALUATIONS = (PromptEvalArguments, EvaluateArguments, RewardEvalArguments)


def actions(args_class: type) -> dict[str, Action]:
    """The flags of a step by name, without hidden ones and --help."""
    shown = (action for action in FlagParser(args_class)._actions if action.help != SUPPRESS and action.dest != "help")
    return {action.dest: action for action in shown}


def flags_table(classes: tuple[type, ...], titles: tuple[str, ...]) -> str:
    """One row a flag: its name, its default in each of the classes, what it means."""
    parsers = [actions(one) for one in classes]
    lines = ["| flag | " + " | ".join(titles) + " | meaning |", "|---|" + "---|" * len(titles) + "---|"]
    for name in dict.fromkeys(name for parser in parsers for name in parser):
        found = {title: parser[name] for title, parser in zip(titles, parsers, strict=True) if name in parser}
        defaults = [shown_default(found.get(title)) for title in titles]
        lines.append(f"| `--{name}` | {' | '.join(defaults)} | {meaning(found)} |")
    return "\n".join(lines)


def shown_default(action: Action | None) -> str:
    """The default as one writes it on the command line; a dash where the step has no such flag."""
    if action is None:
        return "–"
    if action.default is SUPPRESS:
        return "required"
    if action.default in (None, []):
        return ""
    if isinstance(action.default, bool):
        return "on" if action.default else "off"
    return " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)


def meaning(found: dict[str, Action]) -> str:
    """Help text, what a step says otherwise, choices and other names."""
    first = next(iter(found.values()))
    text = first.help.removeprefix("Required. ")
    for title, action in found.items():
        if action.help != first.help:
            text += f" {title[:1].upper()}{title[1:]}: {action.help}"
    if first.choices and len(first.choices) > 1:
        text += f" One of {', '.join(map(str, first.choices))}."
    other = [one for one in first.option_strings[1:] if "_" in one]
    if other:
        text += " Also " + ", ".join(f"`{one}`" for one in other) + "."
    return escaped(text)


def former_table(rows: tuple[FormerFlag, ...], title: str) -> str:
    """One row for the flags of earlier systems that share a fate."""
    lines = [f"| earlier flag | {title} |", "|---|---|"]
    for row in rows:
        lines.append(f"| {' '.join(f'`--{name}`' for name in row.names)} | {escaped(row.now)} |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text inside a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def document() -> str:
    """All tables."""
    steps = tuple(f"step {one.phase}" if one.title.startswith("step") else one.title for one in STEPS)
    return "\n\n".join([
        flags_table(STEPS, steps),
        flags_table(EVALUATIONS, tuple(one.title for one in EVALUATIONS)),
        former_table(RETIRED, "here"),
        former_table(NOT_YET, "refused, because"),
    ])  # fmt: skip


@told
def main(argv: list[str] | None = None) -> int:
    """Print, write or check; returns the exit code."""
    return fill_pages(argv, "flags", "scripts.flags_table", (BEGIN, END), lambda _: document())


if __name__ == "__main__":
    raise SystemExit(main())
