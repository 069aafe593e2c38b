"""Each page of the documents stands in English and in Chinese, with the same headings, code, tables and figures."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    ("README.md", "README_zh.md"),
    ("docs/README.md", "docs/README_zh.md"),
    *((f"docs/en/{page}", f"docs/zh/{page}") for page in sorted(
        str(path.relative_to(REPOSITORY / "docs/en")) for path in (REPOSITORY / "docs/en").rglob("*.md")
    )),
]
pytestmark = pytest.mark.fast


def shape(page: str) -> dict[str, list]:
    """Return what both languages of a page share: levels of headings, lines of code without comments, widths of tables."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    code = [
        (language, len(block.splitlines()), [line.split()[0] for line in block.splitlines() if line.strip()])
        for language, block in blocks
        if language in ("bash", "json", "yaml", "diff")
    ]
    rows = re.findall(r"^\|.*\|$", prose, flags=re.MULTILINE)
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", prose, flags=re.MULTILINE)],
        "code": code,
        "commands": re.findall(r"^    ((?:bash|python|deepspeed|pip) .*)$", prose, flags=re.MULTILINE),
        "tables": [len(re.findall(r"(?<!\\)\|", row)) for row in rows],
        "images": re.findall(r"!\[[^\]]*\]\(([^)]+)\)", prose),
    }


@pytest.mark.parametrize(("english", "chinese"), PAGES)
def test_both_languages_have_the_same_shape(english, chinese):
    ours, theirs = shape(english), shape(chinese)
    for key in ours:
        if key == "images":
            assert [Path(image).name for image in ours[key]] == [Path(image).name for image in theirs[key]]
        else:
            assert ours[key] == theirs[key], key


def test_no_page_stands_in_one_language_only():
    english, chinese = (
        {path.relative_to(REPOSITORY / folder) for path in (REPOSITORY / folder).rglob("*.md")}
        for folder in ("docs/en", "docs/zh")
    )
    assert english == chinese


@pytest.mark.parametrize("page", sorted({page for pair in PAGES for page in pair} | {"benchmarks/RESULTS.md", "docs/lab-log.md"}))
def test_links_lead_somewhere(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        assert ((REPOSITORY / page).parent / link).exists(), link


@pytest.mark.parametrize("page", [page for pair in PAGES for page in pair if page.startswith("docs/")])
def test_each_page_links_its_twin(page):
    first = (REPOSITORY / page).read_text(encoding="utf-8").splitlines()[2]
    assert re.fullmatch(r"English \| \[中文\]\([^)]+\)|\[English\]\([^)]+\) \| 中文", first)
