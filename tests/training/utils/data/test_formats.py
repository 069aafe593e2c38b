"""Every format of rows becomes the records that it says, and the examples of the docs are such rows."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.utils.data.rows import HH, HH_TURNS, rec, turns, write_lines
from training.utils.data import named_sets
from training.utils.data.named_sets import NAMED_SETS
from training.utils.data.names import OUR_NAMES
from training.utils.data.turns import split_turns

pytestmark = pytest.mark.fast

A_OR_B = {"chosen": "A", "rejected": "B"}
A_OR_B_AFTER_HI = {"chosen": turns("Hi", "A"), "rejected": turns("Hi", "B")}
COLUMNS = {"role": ["user", "assistant"], "content": ["Hi", "A"]}
TWO_TURNS = [rec(turns("Q1"), "A1"), rec(turns("Q1", "A1", "Q2"), "A2")]
TWO_TURNS_WITH_SYSTEM = [rec(turns("system: S", "Q1"), "A1"), rec(turns("system: S", "Q1", "A1", "Q2"), "A2")]


def a_or_b(*contents):
    return [rec(turns(*contents), "A", "B")]


def said(*turns_, role="role", content="content"):
    """Turns as (role, content) under other names."""
    return [{role: one, content: text} for one, text in turns_]


FORMATS = {
    "pairs, hh prompt": ({"prompt": HH, "response": " A", "chosen": " A", "rejected": " B"}, [rec(HH_TURNS, "A", "B")]),
    "pairs, one line": ({"prompt": " Human: Hi there Assistant:"} | A_OR_B, a_or_b("Hi there")),
    "pairs, line breaks": (
        {"prompt": "Human: Hi\nAssistant: Hello.\nHuman: Who?\nAssistant:"} | A_OR_B,
        a_or_b("Hi", "Hello.", "Who?"),
    ),
    "pairs, no marks": (
        {"prompt": "What is an Assistant: a job?", "margin": 0.5} | A_OR_B,
        [rec(turns("What is an Assistant: a job?"), "A", "B", 0.5)],
    ),
    "pairs, system text before the marks": (
        {"prompt": "Be kind.\n\nHuman: Hi\n\nAssistant:"} | A_OR_B,
        a_or_b("system: Be kind.", "Hi"),
    ),
    "pairs, the open Assistant: is missing": ({"prompt": "\n\nHuman: Hi"} | A_OR_B, a_or_b("Hi")),
    **{
        f"pairs, line breaks without an open {assistant}:": (
            {"prompt": f"{user}: Hi\n{assistant}: Hello.\n{user}: Who?\nYou?"} | A_OR_B,
            a_or_b("Hi", "Hello.", "Who?\nYou?"),
        )
        for user, assistant in (("Human", "Assistant"), ("User", "AI"), ("问", "答"))
    },
    "pairs of messages": ({"prompt": turns("Hi")} | A_OR_B_AFTER_HI, a_or_b("Hi")),
    "pairs with the chosen dialogue once more, as messages": (
        {"prompt": "Hi", "messages": turns("Hi", "A")} | A_OR_B_AFTER_HI,
        a_or_b("Hi"),
    ),
    "pairs after messages, with a prompt beside": (
        {"prompt": "Hi", "messages": turns("Q1", "A1", "Hi")} | A_OR_B,
        a_or_b("Q1", "A1", "Hi"),
    ),
    "pairs of messages in columns": (
        {"prompt": "Hi", "chosen": COLUMNS, "rejected": {"role": ["assistant"], "content": ["B"]}},
        a_or_b("Hi"),
    ),
    "SQuAD": (
        {"id": "1", "context": "T.", "question": "Q", "answers": {"text": ["A", "A", "B"], "answer_start": [0, 0, 1]}},
        [rec(turns("Q\nT."), "A")],
    ),
    "whole dialogues": ({"chosen": HH + " A", "rejected": HH + " B"}, [rec(HH_TURNS, "A", "B")]),
    "whole dialogues as messages": (A_OR_B_AFTER_HI, a_or_b("Hi")),
    "whole dialogues in columns": (
        {"chosen": COLUMNS, "rejected": COLUMNS | {"content": ["Hi", "B"]}},
        a_or_b("Hi"),
    ),
    "null in the columns of another format": (
        {"messages": turns("Q", "A"), "prompt": None, "chosen": None, "rejected": None},
        [rec(turns("Q"), "A")],
    ),
    "context": (
        {
            "context": said(("human", "Hi"), ("assistant", "Yo"), ("human", "?"), content="text"),
            "chosen": {"role": "assistant", "text": "A"},
            "rejected": {"role": "assistant", "text": "B"},
        },
        a_or_b("Hi", "Yo", "?"),
    ),
    "ShareGPT ranking": (
        {
            "conversations": said(("system", "S"), ("human", "Hi"), role="from", content="value"),
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
        },
        a_or_b("system: S", "Hi"),
    ),
    "instruction ranking": ({"instruction": "Add", "input": "1+1"} | A_OR_B, a_or_b("Add\n1+1")),
    "ranked outputs": (
        {"instruction": "Q2", "input": "", "output": ["best", "good", "worst"], "history": [["Q1", "A1"]]},
        [rec(turns("Q1", "A1", "Q2"), "best", "worst")],
    ),
    "alpaca": ({"instruction": "Add", "input": "1+1", "output": "2"}, [rec(turns("Add\n1+1"), "2")]),
    "an answer beside a rejected one": ({"query": "Hi", "response": "A", "rejected_response": "B"}, a_or_b("Hi")),
    "output beside a rejected one": ({"instruction": "Add", "input": "1+1", "output": "A", "rejected": "B"}, a_or_b("Add\n1+1")),
    "conversations beside a rejected answer": (
        {"conversations": turns("Hi", "A"), "rejected": {"role": "assistant", "content": "B"}},
        a_or_b("Hi"),
    ),
    "context of a pair": ({"instruction": "Add", "context": "1+1"} | A_OR_B, a_or_b("Add\n1+1")),
    "input below a prompt": ({"prompt": "Add", "input": "1+1", "response": "2"}, [rec(turns("Add\n1+1"), "2")]),
    "messages and their answer": ({"messages": turns("Q1", "A1", "Q2"), "response": "A2"}, TWO_TURNS),
    "messages and their answer again": ({"messages": turns("Q1", "A1", "Q2", "A2"), "output": " A2"}, TWO_TURNS),
    "conversations and their answer": ({"conversations": turns("Q"), "chosen": "A"}, [rec(turns("Q"), "A")]),
    "dolly": ({"instruction": "Add", "context": "1+1", "response": "2", "category": "qa"}, [rec(turns("Add\n1+1"), "2")]),
    "whole dialogues under longer names": (
        {"chosen_messages": A_OR_B_AFTER_HI["chosen"], "rejected_messages": A_OR_B_AFTER_HI["rejected"]},
        a_or_b("Hi"),
    ),
    "system_prompt": ({"system_prompt": "S", "prompt": "Q", "response": "A"}, [rec(turns("system: S", "Q"), "A")]),
    "alpaca with history and system": (
        {"instruction": "Q2", "input": "", "output": "A2", "history": [["Q1", "A1"]], "system": "S"},
        TWO_TURNS_WITH_SYSTEM,
    ),
    "prompt and response": ({"prompt": "Q", "response": "A"}, [rec(turns("Q"), "A")]),
    "ChatGLM history": ({"prompt": "Q2", "response": "A2", "history": [["Q1", "A1"]]}, TWO_TURNS),
    "ChatGLM history and an open Assistant:": (
        {"prompt": "Human: Q2\n\nAssistant:", "response": "A2", "history": [["Q1", "A1"]]},
        TWO_TURNS,
    ),
    "prompt and chosen": ({"prompt": "Q", "chosen": "A"}, [rec(turns("Q"), "A")]),
    "messages": ({"messages": turns("system: S", "Q1", "A1", "Q2", "A2")}, TWO_TURNS_WITH_SYSTEM),
    "messages that end with a question": ({"messages": turns("Q1", "A1", "Q2")}, [rec(turns("Q1"), "A1")]),
    "messages without an answer": ({"messages": turns("Q1")}, [rec(turns("Q1"), "")]),
    "conversations that open with the assistant": (
        {"conversations": said(("gpt", "Welcome"), ("human", "Q"), ("gpt", "A"), role="from", content="value")},
        [rec(turns("Q"), "A")],
    ),
    "two questions in a row": ({"messages": [*turns("Q1"), *turns("Q2", "A")]}, [rec(turns("Q1\n\nQ2"), "A")]),
    "ADGEN": ({"content": "类型#裤", "summary": "宽松的阔腿裤"}, [rec(turns("类型#裤"), "宽松的阔腿裤")]),
    "prompt only": ({"prompt": "Q", "category": "x", "turns": ["Q", "R"]}, [rec(turns("Q"), "")]),
    "prompt only, hh": ({"prompt": HH}, [rec(HH_TURNS, "")]),
    "half an emoji": ({"prompt": "cut \ud83d", "response": "whole \U0001f600"}, [rec(turns("cut \ufffd"), "whole 😀")]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format(name, load, tmp_path):
    row, expected = FORMATS[name]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    assert load(path) == {"train": expected}


def test_lists_in_csv_cells(load, tmp_path):
    (tmp_path / "a.csv").write_text('prompt,response,history\nQ1,A1,\nQ3,A3,"[[""Q2"", ""A2""]]"\n')
    expected = [rec(turns("Q1"), "A1"), rec(turns("Q2"), "A2"), rec(turns("Q2", "A2", "Q3"), "A3")]
    assert load(tmp_path / "a.csv")["train"] == expected


def test_turns_of_a_history_count_once(load, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [
        {"prompt": "Q1", "response": "A1"},  # the first row may have no history
        {"prompt": "Q2", "response": "A2", "history": [["Q1", "A1"]]},
        {"prompt": "Q3", "response": "A3", "history": [["Q1", "A1"], ["Q2", "A2"]]},
    ]
    expected = [*TWO_TURNS, rec(turns("Q1", "A1", "Q2", "A2", "Q3"), "A3")]
    for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        records = load(write_lines(tmp_path / name, order))["train"]
        assert sorted(records, key=lambda row: len(row["messages"])) == expected
        assert "3 records; left out 3 with a turn of a history that is there already" in caplog.text
        caplog.clear()
    renamed = [{"q": row["prompt"], "a": row["response"], "past": row.get("history", [])} for row in rows]
    columns = {"prompt": "q", "response": "a", "history": "past"}
    assert load(write_lines(tmp_path / "c.jsonl", renamed), columns=columns)["train"] == expected
    repeated = load(write_lines(tmp_path / "d.jsonl", rows[:1] * 3))["train"]
    assert repeated == expected[:1] * 3  # nobody's history: repeated on purpose


AFTER_AN_EMPTY_ANSWER = {"prompt": "Q2", "response": "A2", "history": [["Q1", ""]]}
GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}
USELESS = {
    "empty turns": (
        [{"messages": turns("Q1", "A1", "Q2", "A2")}],
        [{"messages": turns("Q1", "A1", "", "A2")}, {"messages": turns("Q1", "", "Q2", "A2")}],
        "left out 2 with an empty turn",
    ),
    "an empty turn of a history": ([{"prompt": "Q", "response": "A"}], [AFTER_AN_EMPTY_ANSWER], "1 with an empty turn"),
    "empty answers": ([GOOD], [GOOD | {"chosen": "  "}, GOOD | {"rejected": ""}], "2 with an empty answer"),
    "no question": ([GOOD], [GOOD | {"prompt": ""}], "1 with no question"),
    "dialogues that differ before the last answer": (
        [{"chosen": HH + " A", "rejected": HH + " B"}],
        [{"chosen": HH + " A", "rejected": HH.replace("Hello.", "Bye.") + " B"}],
        "1 with two dialogues that differ before the last answer",
    ),
    "a dialogue without an answer": (
        [{"chosen": HH + " A", "rejected": HH + " B"}],
        [{"chosen": HH, "rejected": HH + " B"}],
        "1 with a dialogue that does not end with an answer",
    ),
}


@pytest.mark.parametrize("name", USELESS)
def test_useless_rows_are_left_out_and_counted(name, load, tmp_path, caplog):
    caplog.set_level("INFO")
    good, useless, note = USELESS[name]
    expected = load(write_lines(tmp_path / "good.jsonl", good))
    assert load(write_lines(tmp_path / "all.jsonl", good + useless)) == expected
    assert note in caplog.text


MARKS = [("User", "Bot"), ("user", "assistant"), ("human", "ai"), ("问题", "回答"), ("USER", "ASSISTANT")]


@pytest.mark.parametrize("end", ["", "\n{}:"])
@pytest.mark.parametrize("user, assistant", MARKS)
def test_marks_of_a_dialogue(user, assistant, end):
    text = f"{user}: Hi\n{assistant}: Yo\n{user}: Who?{end.format(assistant)}"
    assert split_turns(text) == turns("Hi", "Yo", "Who?", "")
    assert split_turns(f"{user}：Hi\n{assistant}：") == turns("Hi", "")


TEXTS = ["user: the one who asks", "Each user: a name\nassistant: none\nuser: x", "问题：什么是“回答：”？"]
TEXTS += [
    "username: x\nassistant:", "user: a assistant: b user: c",
    "阅读文章。\n\n问题：作者是谁？\n回答：", "问题：一加一？\n回答：二",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_are_no_dialogue(text):
    assert split_turns(text) is None


WORDS = st.text(st.characters(codec="utf-8", exclude_characters=":："), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=6))
def test_marked_text_gives_its_turns_back(contents):
    contents = contents if len(contents) % 2 else contents[:-1]
    marks = ("\n\nHuman: ", "\n\nAssistant: ")
    text = "".join(marks[i % 2] + content for i, content in enumerate(contents))
    assert split_turns(text + "\n\nAssistant:") == turns(*contents, "")
    assert split_turns(text + "\n\nAssistant: yes", answered=True) == turns(*contents, "yes")


# --- docs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["en/own-data.md", "zh/own-data.md"])
def test_examples_of_the_docs_load(name, load, tmp_path, repository):
    """Every two-line example is read, and every named set and name for --columns is listed."""
    page = (repository / "docs" / name).read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 14
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
