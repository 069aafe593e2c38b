"""Rows and records that the tests of the data share, and the flags of a step."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from errors import UserError
from models.templates import load_template
from training.utils.data.cache import CachedData
from training.utils.data.prepare import prepare_phase
from training.utils.data.records import read_records, readings
from training.utils.data.sources import open_source


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn, starting with the user; a first "system: …" is the system message."""
    system = [{"role": "system", "content": contents[0][8:]}] if contents[0].startswith("system: ") else []
    rest = contents[len(system) :]
    return system + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(rest)]


def rec(messages: list[dict[str, str]], chosen: str, rejected: str | None = None, margin: float | None = None) -> dict:
    return {"messages": messages, "chosen": chosen, "rejected": rejected, "margin": margin, "calls": None}


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


def pairs(count: int, offset: int = 0) -> list[dict]:
    """Rows with different questions."""
    return [
        {
            "prompt": f"Human: What is {n}+1? Assistant:",
            "chosen": f"It is {n + 1}, as everybody knows.",
            "rejected": f"It is {n + 7}.",
        }
        for n in range(offset, offset + count)
    ]


def read(path: Path, **arguments):
    """The training records of a file and its notes as one text."""
    found = read_records(open_source(str(path)), **arguments)
    return found.train.to_list(), " ".join(readings(found)["train"].notes)


def check_read(folder: Path, rows: list[dict], expected: list[dict], note: str) -> None:
    """Rows give these records, and this note or none."""
    records, notes = read(write_lines(folder / "a.jsonl", rows))
    assert records == expected
    assert note in notes and bool(note) == bool(notes), notes


def check_refused(folder: Path, row: dict, message: str) -> None:
    """A file of one row is refused, with its line."""
    with pytest.raises(UserError, match=f"line 1: .*{message}"):
        read(write_lines(folder / "a.jsonl", [row]))


def run(paths, phase: int, tokenizer, template=None, overview_folder=None, **flags) -> CachedData:
    """prepare_phase with all of the data for the phase; flags: those that are not so."""
    paths = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    given = {
        "data_path": paths,
        "data_split": ",".join("1" if phase == one else "0" for one in (1, 2, 3)),
        "sft_only_data_path": [],
        "column_map": {},
        "seed": 1234,
        "eval_fraction": 0.0,
        "cache_dir": None,
        "rebuild_cache": False,
        "show_examples": 1,
        "max_seq_len": 128,
        "max_prompt_seq_len": flags.get("max_seq_len", 128),
        "max_source_length": None,
        "max_target_length": None,
    }
    template = template or load_template(None, tokenizer)
    return prepare_phase(SimpleNamespace(**given | flags), phase, tokenizer, template, overview_folder)
