"""Tables in Markdown pages that a program writes between two marks: printed, written, or compared with what is there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from errors import UserError


def fill_pages(
    argv: Sequence[str] | None, title: str, module: str, marks: tuple[str, str], document: Callable[[str], str]
) -> int:
    """The command line of such a program; returns the exit code: 1 if --check finds an old table.

    title: what the tables are about ("flags"). module: the program. marks: the lines around the tables. document: their text
    in a language, "en", or "zh" for pages whose names end in _zh. Raises UserError for a page that has no place for them.
    """
    parser = argparse.ArgumentParser(description=f"Markdown tables of all {title}.")
    parser.add_argument("--write", nargs="+", type=Path, default=[], metavar="FILE", help="fill these files")
    parser.add_argument("--check", nargs="+", type=Path, default=[], metavar="FILE", help="compare with these files")
    args = parser.parse_args(argv)
    if not args.write and not args.check:
        print(document("en"))
    for path in args.write:
        path.write_text(filled(path, marks, document)[1], encoding="utf-8")
    stale = [path for path in args.check if len(set(filled(path, marks, document))) > 1]
    for path in stale:
        print(f"{path}: the table of {title} is old; run python -m {module} --write {path}", file=sys.stderr)
    return 1 if stale else 0


def language_of(path: Path) -> str:
    """Return "zh" for a page under docs/zh or with a name on _zh, else "en"."""
    return "zh" if path.stem.endswith("_zh") or "zh" in path.parent.parts else "en"


def filled(path: Path, marks: tuple[str, str], document: Callable[[str], str]) -> tuple[str, str]:
    """The text of a file, and the same with fresh tables between the marks. Raises UserError without marks."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name an existing Markdown file.") from error
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise UserError(f"{path}: no lines {marks[0]} and {marks[1]}; add both where the tables belong.")
    return text, f"{before}{begin}\n\n{document(language_of(path))}\n\n{end}{after}"
