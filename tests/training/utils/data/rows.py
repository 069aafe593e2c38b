"""Rows and records that the tests of the data sources share."""

import json
from pathlib import Path


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn, starting with the user; a first "system: …" is the system message."""
    system = [{"role": "system", "content": contents[0][8:]}] if contents[0].startswith("system: ") else []
    rest = contents[len(system) :]
    return system + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(rest)]


def rec(messages: list[dict[str, str]], chosen: str, rejected: str | None = None, margin: float | None = None) -> dict:
    return {"messages": messages, "chosen": chosen, "rejected": rejected, "margin": margin}


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who are you?\n\nAssistant:"
HH_TURNS = turns("Hi", "Hello.", "Who are you?")

PAIRS = [
    {"prompt": 'Say "hi",\nplease 你好', "chosen": "hi, 你", "rejected": "no"},
    {"prompt": "Q2", "chosen": "A2", "rejected": "B2"},
]
PAIR_RECORDS = [rec(turns(PAIRS[0]["prompt"]), "hi, 你", "no"), rec(turns("Q2"), "A2", "B2")]
