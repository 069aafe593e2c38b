"""Every format of rows becomes the records that it says, and the examples of the docs are such rows."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.utils.data.rows import HH, HH_TURNS, rec, turns, write_lines
from training.utils.data import named_sets
from training.utils.data.formats import OUR_NAMES, split_turns
from training.utils.data.named_sets import NAMED_SETS

# ---------------------------------------------------------------------------------------------------- formats

COLUMNS = {"role": ["user", "assistant"], "content": ["Hi", "A"]}
FORMATS = {
    "pairs, hh prompt": (
        {"prompt": HH, "response": " A.", "chosen": " A.", "rejected": " B."},
        [rec(HH_TURNS, "A.", "B.")],
    ),
    "pairs, one line": (
        {"prompt": " Human: Hi there Assistant:", "chosen": "A", "rejected": "B"},
        [rec(turns("Hi there"), "A", "B")],
    ),
    "pairs, line breaks": (
        {"prompt": "Human: Hi\nAssistant: Hello.\nHuman: Who?\nAssistant:", "chosen": "A", "rejected": "B"},
        [rec(turns("Hi", "Hello.", "Who?"), "A", "B")],
    ),
    "pairs, no marks": (
        {"prompt": "What is an Assistant: a job?", "chosen": "A", "rejected": "B", "margin": 0.5},
        [rec(turns("What is an Assistant: a job?"), "A", "B", 0.5)],
    ),
    "pairs, system text before the marks": (
        {"prompt": "Be kind.\n\nHuman: Hi\n\nAssistant:", "chosen": "A", "rejected": "B"},
        [rec(turns("system: Be kind.", "Hi"), "A", "B")],
    ),
    "pairs, the open Assistant: is missing": (
        {"prompt": "\n\nHuman: Hi", "chosen": "A", "rejected": "B"},
        [rec(turns("Hi"), "A", "B")],
    ),
    "pairs of messages": (
        {"prompt": turns("Hi"), "chosen": turns("Hi", "A"), "rejected": turns("Hi", "B")},
        [rec(turns("Hi"), "A", "B")],
    ),
    "pairs with the chosen dialogue once more, as messages": (
        {"prompt": "Hi", "chosen": turns("Hi", "A"), "rejected": turns("Hi", "B"), "messages": turns("Hi", "A")},
        [rec(turns("Hi"), "A", "B")],
    ),
    "pairs after messages, with a prompt beside": (
        {"prompt": "Hi", "chosen": "A", "rejected": "B", "messages": turns("Q1", "A1", "Hi")},
        [rec(turns("Q1", "A1", "Hi"), "A", "B")],
    ),
    "pairs of messages in columns": (
        {"prompt": "Hi", "chosen": COLUMNS, "rejected": {"role": ["assistant"], "content": ["B"]}},
        [rec(turns("Hi"), "A", "B")],
    ),
    "whole dialogues in columns": (
        {"chosen": COLUMNS, "rejected": {"role": ["user", "assistant"], "content": ["Hi", "B"]}},
        [rec(turns("Hi"), "A", "B")],
    ),
    "null in the columns of another format": (
        {"messages": turns("Q", "A"), "prompt": None, "chosen": None, "rejected": None},
        [rec(turns("Q"), "A")],
    ),
    "whole dialogues": ({"chosen": HH + " A.", "rejected": HH + " B."}, [rec(HH_TURNS, "A.", "B.")]),
    "whole dialogues as messages": (
        {"chosen": turns("Hi", "A"), "rejected": turns("Hi", "B")},
        [rec(turns("Hi"), "A", "B")],
    ),
    "context": (
        {
            "context": [
                {"role": "human", "text": "Hi"},
                {"role": "assistant", "text": "Yo"},
                {"role": "human", "text": "?"},
            ],
            "chosen": {"role": "assistant", "text": "A"},
            "rejected": {"role": "assistant", "text": "B"},
        },
        [rec(turns("Hi", "Yo", "?"), "A", "B")],
    ),
    "ShareGPT ranking": (
        {
            "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
        },
        [rec(turns("system: S", "Hi"), "A", "B")],
    ),
    "instruction ranking": (
        {"instruction": "Add", "input": "1+1", "chosen": "2", "rejected": "3"},
        [rec(turns("Add\n1+1"), "2", "3")],
    ),
    "ranked outputs": (
        {"instruction": "Q2", "input": "", "output": ["best", "good", "worst"], "history": [["Q1", "A1"]]},
        [rec(turns("Q1", "A1", "Q2"), "best", "worst")],
    ),
    "alpaca": ({"instruction": "Add", "input": "1+1", "output": "2"}, [rec(turns("Add\n1+1"), "2")]),
    "alpaca with history and system": (
        {"instruction": "Q2", "input": "", "output": "A2", "history": [["Q1", "A1"]], "system": "S"},
        [rec(turns("system: S", "Q1"), "A1"), rec(turns("system: S", "Q1", "A1", "Q2"), "A2")],
    ),
    "prompt and response": ({"prompt": "Q", "response": "A"}, [rec(turns("Q"), "A")]),
    "ChatGLM history": (
        {"prompt": "Q2", "response": "A2", "history": [["Q1", "A1"]]},
        [rec(turns("Q1"), "A1"), rec(turns("Q1", "A1", "Q2"), "A2")],
    ),
    "ChatGLM history and an open Assistant:": (
        {"prompt": "Human: Q2\n\nAssistant:", "response": "A2", "history": [["Q1", "A1"]]},
        [rec(turns("Q1"), "A1"), rec(turns("Q1", "A1", "Q2"), "A2")],
    ),
    "prompt and chosen": ({"prompt": "Q", "chosen": "A"}, [rec(turns("Q"), "A")]),
    "messages": (
        {"messages": turns("system: S", "Q1", "A1", "Q2", "A2")},
        [rec(turns("system: S", "Q1"), "A1"), rec(turns("system: S", "Q1", "A1", "Q2"), "A2")],
    ),
    "messages that end with a question": ({"messages": turns("Q1", "A1", "Q2")}, [rec(turns("Q1"), "A1")]),
    "messages without an answer": ({"messages": turns("Q1")}, [rec(turns("Q1"), "")]),
    "conversations that open with the assistant": (
        {
            "conversations": [
                {"from": "gpt", "value": "Welcome"},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
            ]
        },
        [rec(turns("Q"), "A")],
    ),
    "two questions in a row": (
        {"messages": [*turns("Q1"), *turns("Q2", "A")]},
        [rec(turns("Q1\n\nQ2"), "A")],
    ),
    "ADGEN": ({"content": "类型#裤", "summary": "宽松的阔腿裤"}, [rec(turns("类型#裤"), "宽松的阔腿裤")]),
    "prompt only": ({"prompt": "Q", "category": "x", "turns": ["Q", "R"]}, [rec(turns("Q"), "")]),
    "prompt only, hh": ({"prompt": HH}, [rec(HH_TURNS, "")]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format(name, load, tmp_path):
    row, expected = FORMATS[name]
    assert load(write_lines(tmp_path / "a.jsonl", [row])) == {"train": expected}


def test_turns_of_a_history_count_once(load, tmp_path):
    rows = [
        {"prompt": "Q1", "response": "A1", "history": []},
        {"prompt": "Q2", "response": "A2", "history": [["Q1", "A1"]]},
        {"prompt": "Q3", "response": "A3", "history": [["Q1", "A1"], ["Q2", "A2"]]},
    ]
    expected = [
        rec(turns("Q1"), "A1"),
        rec(turns("Q1", "A1", "Q2"), "A2"),
        rec(turns("Q1", "A1", "Q2", "A2", "Q3"), "A3"),
    ]
    assert load(write_lines(tmp_path / "a.jsonl", rows))["train"] == expected
    backwards = load(write_lines(tmp_path / "b.jsonl", rows[::-1]))["train"]
    assert sorted(backwards, key=lambda row: len(row["messages"])) == expected
    renamed = [{"q": row["prompt"], "a": row["response"], "past": row["history"]} for row in rows]
    columns = {"prompt": "q", "response": "a", "history": "past"}
    assert load(write_lines(tmp_path / "c.jsonl", renamed), columns=columns)["train"] == expected


def test_turns_of_a_history_count_once_also_where_the_first_row_has_none(load, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [
        {"prompt": "Q1", "response": "A1"},
        {"prompt": "Q2", "response": "A2", "history": [["Q1", "A1"]]},
    ]
    expected = [rec(turns("Q1"), "A1"), rec(turns("Q1", "A1", "Q2"), "A2")]
    for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        assert load(write_lines(tmp_path / name, order))["train"] == expected
        assert "2 records; left out 1 with a turn of a history that is there already" in caplog.text
        caplog.clear()
    repeated = load(write_lines(tmp_path / "c.jsonl", rows[:1] * 3))["train"]
    assert repeated == expected[:1] * 3  # nobody's history: repeated on purpose


def test_an_empty_turn_does_not_fuse_its_neighbours(load, tmp_path, caplog):
    caplog.set_level("INFO")
    good = {"messages": turns("Q1", "A1", "Q2", "A2")}
    rows = [good, {"messages": turns("Q1", "A1", "", "A2")}, {"messages": turns("Q1", "", "Q2", "A2")}]
    expected = [rec(turns("Q1"), "A1"), rec(turns("Q1", "A1", "Q2"), "A2")]
    assert load(write_lines(tmp_path / "a.jsonl", rows))["train"] == expected
    assert "2 records; left out 2 with an empty turn" in caplog.text
    rows = [{"prompt": "Q", "response": "A"}, {"prompt": "Q2", "response": "A2", "history": [["Q1", ""]]}]
    assert load(write_lines(tmp_path / "b.jsonl", rows))["train"] == [rec(turns("Q"), "A")]


def test_useless_records_are_left_out(load, tmp_path, caplog):
    caplog.set_level("INFO")
    good = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    rows = [good, {**good, "chosen": "  "}, {**good, "rejected": ""}, {**good, "prompt": ""}]
    assert load(write_lines(tmp_path / "a.jsonl", rows))["train"] == [rec(turns("Q"), "A", "B")]
    assert "2 with an empty answer" in caplog.text and "1 with no question" in caplog.text
    dialogues = [
        {"chosen": HH + " A.", "rejected": HH.replace("Hello.", "Bye.") + " B."},  # differ before the last answer
        {"chosen": HH, "rejected": HH + " B."},  # no answer
        {"chosen": HH + " A.", "rejected": HH + " B."},
    ]
    assert load(write_lines(tmp_path / "b.jsonl", dialogues))["train"] == [rec(HH_TURNS, "A.", "B.")]


WORDS = st.text(st.characters(codec="utf-8", exclude_characters=":："), min_size=1).map(str.strip).filter(bool)


@given(st.lists(WORDS, min_size=1, max_size=6))
def test_marked_text_gives_its_turns_back(contents):
    contents = contents if len(contents) % 2 else contents[:-1]
    marks = ("\n\nHuman: ", "\n\nAssistant: ")
    text = "".join(marks[i % 2] + content for i, content in enumerate(contents))
    assert split_turns(text + "\n\nAssistant:") == turns(*contents, "")
    assert split_turns(text + "\n\nAssistant: yes", answered=True) == turns(*contents, "yes")


def test_half_an_emoji_does_not_stop_the_reading(load, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "cut \\ud83d", "response": "whole \\ud83d\\ude00"}\n')
    assert load(tmp_path / "a.jsonl")["train"] == [rec(turns("cut \ufffd"), "whole 😀")]


# ---------------------------------------------------------------------------------------------------- docs


@pytest.mark.parametrize("name", ["en/own-data.md", "zh/own-data.md"])
def test_examples_of_the_docs_load(name, load, tmp_path, repository):
    """Every two-line example is read, and every named set and name for --columns is listed."""
    page = (repository / "docs" / name).read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 11
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(example, encoding="utf-8")
        assert len(example.splitlines()) == 2
        assert len(load(path)["train"]) >= 2
    assert all(named.names[0] in page for named in NAMED_SETS)
    assert all(ours in page for ours in OUR_NAMES)


def test_new_named_set_of_the_docs(load, tmp_path, monkeypatch, repository):
    """The recipe of docs/en/own-data.md for a new named set, run as it stands there."""
    page = (repository / "docs" / "en/own-data.md").read_text(encoding="utf-8")
    function, row = re.search(r"```python\n(def .*?)\n\n(NamedSet.*?),\n```", page, flags=re.DOTALL).groups()
    names = dict(vars(named_sets))
    exec(function, names)
    monkeypatch.setattr(named_sets, "NAMED_SETS", (eval(row, names),))
    rows = [{"title": "Q", "replies": ["A", "A2"], "spam": "B"}, {"title": "Q", "replies": [], "spam": "B"}]
    assert load(write_lines(tmp_path / "new-set.jsonl", rows))["train"] == [rec(turns("Q"), "A", "B")]
