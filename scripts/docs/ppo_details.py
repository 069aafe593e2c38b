"""Write the column of tests in the table of fifty details: docs/en/ppo.md and docs/zh/ppo.md.

    python -m scripts.docs.ppo_details [--check]

A test says which details it shows: ``@pytest.mark.detail(28, 48)``.
"""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("docs/en/ppo.md", "docs/zh/ppo.md")
ROW = re.compile(r"^\| (\d+) \|(.*)\|[^|]*\|$", re.MULTILINE)


def tests_by_detail() -> dict[int, list[str]]:
    """Return for each detail the tests that carry its number, by file and place."""
    found: dict[int, list[str]] = defaultdict(list)
    for file in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        for node in ast.parse(text).body if "pytest.mark.detail(" in text else ():
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.detail":
                    for number in map(ast.literal_eval, mark.args):
                        found[number].append(f"{file.relative_to(REPOSITORY).as_posix()}::{node.name}")
    return found


def page_with_tests(text: str, tests: dict[int, list[str]]) -> str:
    """Return the page with the last column of its table filled in."""

    def row(match: re.Match[str]) -> str:
        number, cells = match.groups()
        return f"| {number} |{cells}| {', '.join(f'`{test}`' for test in tests.get(int(number), ()))} |"

    return ROW.sub(row, text)


def main(argv: list[str]) -> int:
    """Write the pages, or with --check return 1 if one of them is not up to date."""
    stale, tests = [], tests_by_detail()
    for name in PAGES:
        path = REPOSITORY / name
        text = path.read_text(encoding="utf-8")
        page = page_with_tests(text, tests)
        if page != text:
            stale.append(name)
            if "--check" not in argv:
                path.write_text(page, encoding="utf-8")
    if stale and "--check" in argv:
        print(f"{', '.join(stale)}: run python -m scripts.docs.ppo_details")
    return int(bool(stale) and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
