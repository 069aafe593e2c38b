"""Print the flags of all steps as Markdown tables, made from the parsers; keeps docs/flags.md and flags_zh.md in step with them.

    python -m scripts.flags_table                               print
    python -m scripts.flags_table --write docs/flags*.md        put them between <!-- flags:begin --> and <!-- flags:end -->
    python -m scripts.flags_table --check docs/flags*.md        exit code 1 if a file holds other tables
"""

from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from errors import told
from scripts.docs.marked_tables import fill_pages
from training.utils.flags.former import NOT_YET, RETIRED, FormerFlag
from training.utils.flags.help import grouped
from training.utils.flags.parse import is_required
from training.utils.flags.steps import STEPS, EvaluateArguments, PromptEvalArguments, RewardEvalArguments

EVALUATIONS = (PromptEvalArguments, EvaluateArguments, RewardEvalArguments)
WORDS = {
    "en": {
        "flag": "flag", "meaning": "meaning", "required": "required", "on": "on", "off": "off", "one of": " One of {}.",
        "also": " Also {}.", "step": "step {}", "other": " {}: {}", "earlier": "earlier flag", "where": "command",
        "here": "here", "refused": "do this instead", "comma": ", ",
        "groups": ("Training: first", "Training: common", "Training: all others"), "evaluations": "Evaluation",
        "retired": "Earlier flags that are accepted", "not yet": "Earlier flags that are refused",
    },
    "zh": {
        "flag": "参数", "meaning": "含义", "required": "必需", "on": "开", "off": "关",
        "one of": "可选：{}。", "also": "别名：{}。", "step": "第 {} 步", "other": "{}：{}", "earlier": "原参数",
        "where": "命令", "here": "在本项目中", "refused": "请这样做", "comma": "、",
        "groups": ("训练：首要参数", "训练：常用参数", "训练：其他参数"), "evaluations": "评估",
        "retired": "仍被接受的原参数", "not yet": "被拒绝的原参数",
    },
}


def flags_by_name(classes: tuple[type, ...]) -> dict[str, Field]:
    """Return the flags of all classes by name; of equal names the first class's."""
    flags: dict[str, Field] = {}
    for one in (one for each in classes for one in fields(each)):
        flags.setdefault(one.name, one)
    return flags


def flags_table(names: Iterable[str], classes: tuple[type, ...], titles: tuple[str, ...], language: str) -> str:
    """Return a table with one row a flag: its name, its default in each of the classes, its meaning."""
    words = WORDS[language]
    columns = {title: {one.name: one for one in fields(each)} for title, each in zip(titles, classes, strict=True)}
    hints = {name: hint for each in classes for name, hint in get_type_hints(each).items()}
    lines = [f"| {words['flag']} | {' | '.join(titles)} | {words['meaning']} |", "|---|" + "---|" * len(titles) + "---|"]
    for name in names:
        flags = {title: column[name] for title, column in columns.items() if name in column}
        defaults = [shown_default(flags.get(title), words) for title in titles]
        lines.append(f"| `--{name}` | {' | '.join(defaults)} | {meaning(flags, hints[name], language)} |")
    return "\n".join(lines)


def shown_default(one: Field | None, words: dict[str, str]) -> str:
    """Return the default as one writes it on the command line; a dash where the step has no such flag."""
    if one is None:
        return "–"
    if is_required(one):
        return words["required"]
    default = one.default if one.default_factory is MISSING else " ".join(one.default_factory())
    if isinstance(default, bool):
        return words["on"] if default else words["off"]
    return "" if default is None else str(default)


def meaning(flags: dict[str, Field], hint: Any, language: str) -> str:
    """Return the help text, other texts of later steps, the choices and other names. flags: the flag by the step's title."""
    words = WORDS[language]
    texts = {title: one.metadata["help" if language == "en" else "zh"] for title, one in flags.items()}
    first, one = next(iter(texts.values())), next(iter(flags.values()))
    others = [words["other"].format(title[:1].upper() + title[1:], text) for title, text in texts.items() if text != first]
    text = first + "".join(others)
    if get_origin(hint) is Literal:
        text += words["one of"].format(words["comma"].join(map(str, get_args(hint))))
    if one.metadata["aliases"]:
        text += words["also"].format(words["comma"].join(f"`--{alias}`" for alias in one.metadata["aliases"]))
    return escaped(text)


def former_table(rows: tuple[FormerFlag, ...], titles: dict[str, str], title: str, language: str) -> str:
    """Return a table with one row for the flags of earlier systems that share a fate. titles: of the commands, by section."""
    words = WORDS[language]
    lines = [f"| {words['earlier']} | {words['where']} | {title} |", "|---|---|---|"]
    for row in rows:
        names, where = " ".join(f"`--{name}`" for name in row.names), words["comma"].join(titles[one] for one in row.steps)
        lines.append(f"| {names} | {where} | {escaped((language == 'zh' and row.zh) or row.now)} |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return text as it stands inside a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def document(language: str = "en", _: str = "") -> str:
    """Return all tables in a language, each under its heading."""
    words = WORDS[language]
    steps = tuple(words["step"].format(one.phase) if one.title.startswith("step") else one.title for one in STEPS)
    evaluations = tuple(one.title for one in EVALUATIONS)
    titles = {one.section: title for one, title in zip((*STEPS, *EVALUATIONS), (*steps, *evaluations), strict=True)}
    groups = grouped(flags_by_name(STEPS).values())
    tables = {
        title: flags_table([one.name for one in group], STEPS, steps, language)
        for title, group in zip(words["groups"], groups, strict=True)
    }
    tables[words["evaluations"]] = flags_table(flags_by_name(EVALUATIONS), EVALUATIONS, evaluations, language)
    tables[words["retired"]] = former_table(RETIRED, titles, words["here"], language)
    tables[words["not yet"]] = former_table(NOT_YET, titles, words["refused"], language)
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in tables.items())


@told
def main(argv: list[str] | None = None) -> int:
    """Print, write or check; returns the exit code."""
    return fill_pages(argv, "flags", "scripts.flags_table", document)


if __name__ == "__main__":
    raise SystemExit(main())
