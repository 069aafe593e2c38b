"""Tables in Markdown pages that a program writes between two marks: printed, written, or compared with what is there."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from errors import UserError


def fill_pages(argv: Sequence[str] | None, title: str, module: str, document: Callable[[str, str], str]) -> int:
    """Run the command line of such a program. Return the exit code: 1 if --check finds an old table.

    A page has <!-- TITLE:begin WORD --> and <!-- TITLE:end --> around each of its tables; most have no WORD. module: the program.
    document: the tables in a language, "en" or "zh", for a word, "" for none. Raise UserError for a page without marks, unless
    it is a README: `*.md` takes that in too.
    """
    parser = argparse.ArgumentParser(description=f"Markdown tables of {title}.")
    parser.add_argument("--write", nargs="+", type=Path, default=[], metavar="FILE", help="fill these files")
    parser.add_argument("--check", nargs="+", type=Path, default=[], metavar="FILE", help="compare with these files")
    args = parser.parse_args(argv)
    if not args.write and not args.check:
        print(document("en", ""))
    marks = re.compile(rf"(<!-- {title}:begin ?(\w*) -->\n).*?(<!-- {title}:end -->)", re.DOTALL)
    stale = False
    for path in (*args.write, *args.check):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; name an existing Markdown file.") from error
        language = "zh" if path.stem.endswith("_zh") or "zh" in path.parent.parts else "en"
        filled, tables = marks.subn(lambda mark, language=language: f"{mark[1]}\n{document(language, mark[2])}\n\n{mark[3]}", text)
        if not tables and path.stem != "README":
            raise UserError(f"{path}: no lines <!-- {title}:begin --> and <!-- {title}:end -->; add both where tables belong.")
        if path in args.write:
            path.write_text(filled, encoding="utf-8")
        elif filled != text:
            stale = True
            print(f"{path}: the table of {title} is old; run python -m {module} --write {path}", file=sys.stderr)
    return int(stale)
