"""Every text of a record is in what it became, or its field is named, or something is counted as left out - or it is refused."""

import json
import random
import re
from itertools import count

import pytest

from errors import UserError
from training.utils.data.arrow_rows import read_arrow
from training.utils.data.records import write_records
from training.utils.data.sources import Table

pytestmark = pytest.mark.fast

NAMES = ["prompt", "response", "chosen", "rejected", "messages", "conversations", "conversation", "context", "instruction", "input"]
NAMES += ["output", "history", "system", "score", "rank", "label", "tools", "responses", "completions", "question", "answer"]
NAMES += ["query", "notes", "title", "user", "chosen_score", "rejected_score", "tie"]
MARK = re.compile(r"mark\d+x")


def random_row(chance: random.Random, marks: count) -> dict:
    """A row of a few known names, whose values have the forms that published sets have; each text is another one."""

    def text() -> str:
        return f"mark{next(marks)}x"

    def turns(number: int) -> list[dict]:
        return [{"role": ("user", "assistant")[place % 2], "content": text()} for place in range(number)]

    def dialogue() -> list:
        sharegpt = [{"from": ("human", "gpt")[place % 2], "value": text(), "note": text()} for place in range(2)]
        pairs = [{"human": text(), "assistant": text()} for _ in range(2)]
        return chance.choice([turns(chance.randrange(1, 5)), sharegpt, pairs, [text() for _ in range(4)]])

    def answer() -> object:
        scored = [{"response": text(), "score": place, "why": text()} for place in range(3)]
        return chance.choice([text(), text(), [text(), text()], scored, turns(2)[1:], turns(2)[1], turns(4)])

    forms = {
        **dict.fromkeys(("messages", "conversations", "conversation"), dialogue),
        **dict.fromkeys(("chosen", "rejected", "output", "response", "responses", "completions"), answer),
        **dict.fromkeys(("score", "rank"), lambda: [2, 1]),
        **dict.fromkeys(("chosen_score", "rejected_score"), lambda: chance.randrange(3)),
        "label": lambda: chance.choice([True, 1, 0]),
        "tie": lambda: chance.choice([True, False]),
        "history": lambda: [[text(), text()]],
        "tools": lambda: [{"name": text(), "parameters": {}}],
        "prompt": lambda: chance.choice([text(), text(), turns(1), turns(3)]),
    }
    return {name: forms.get(name, text)() for name in chance.sample(NAMES, chance.randrange(1, 6))}


def test_no_text_is_lost_without_a_word(tmp_path):
    chance, marks, read, told = random.Random(7), count(), 0, 0
    for _ in range(1500):
        row = random_row(chance, marks)
        table = Table("a.jsonl", lambda row=row: iter([("line 1", json.loads(json.dumps(row)))]), "digest")
        try:
            reading = write_records(tmp_path / "a.arrow", [table], None, None)
        except UserError:
            continue
        read += 1
        kept = json.dumps(list(read_arrow(tmp_path / "a.arrow")))
        lost = [mark for mark in MARK.findall(json.dumps(row)) if mark not in kept]
        fields = {name for name, value in row.items() for mark in lost if mark in json.dumps(value)}
        notes = " ".join(reading.notes)
        assert reading.left_out or all(name in notes for name in fields), (row, kept, notes)
        told += bool(lost)
    assert read > 300 and told > 60, "rows that are read, and that are told to lose something"
