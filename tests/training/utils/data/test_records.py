"""Rows become records of one form; what is wrong is named with its file and line, what is of no use is counted."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from errors import UserError
from tests.training.utils.data.rows import PAIR_RECORDS, PAIRS, rec, turns, write_lines
from training.utils.data.records import check_columns_used, load_records, read_records, readings
from training.utils.data.sources import open_source
from training.utils.data.suggested import suggested_columns

GOOD = json.dumps(PAIRS[1])


@pytest.mark.fast
def test_columns(load, tmp_path):
    rows = [
        {"question": {"text": "Q"}, "answers": [{"text": "A"}, {"text": "B"}], "text": "x", "label": 1, "past": None}
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    mapped = load(path, columns={"prompt": "question.text", "chosen": "answers.0.text", "rejected": "answers.1.text"})
    assert mapped == {"train": [rec(turns("Q"), "A", "B")]}
    mapped = load(path, columns={"prompt": "question.text", "response": "answers.1.text", "history": "past"})
    assert mapped == {"train": [rec(turns("Q"), "B")]}
    assert load(path, columns={"prompt": "text"}) == {"train": [rec(turns("x"), "")]}


@pytest.mark.fast
def test_columns_leave_sets_without_these_fields_alone(load, tmp_path):
    """Unless no set has them."""
    path, columns = write_lines(tmp_path / "a.jsonl", PAIRS), {"prompt": "question", "response": "answer"}
    read = read_records(open_source(str(path)), columns=columns)
    assert read.train.to_list() == PAIR_RECORDS
    assert "without the fields of --columns" in readings(read)["train"].notes[0]
    other = write_lines(tmp_path / "b.jsonl", [{"question": "Q", "answer": "A"}])
    check_columns_used([read, read_records(open_source(str(other)), columns=columns)], columns)
    with pytest.raises(UserError, match="no data set has these fields"):
        load(path, columns=columns)


DIALOGUE = turns("Q", "A")
RANKED = [{"answer": "A", "rank": 1}, {"answer": "B", "rank": 2}]
SUGGESTED = [
    ({"id": "0", "data": ["Q", "A"]}, "messages=data"),
    ({"user": "Q", "assistant": "A"}, "prompt=user,response=assistant"),
    ({"question": "Q", "answers": RANKED}, "prompt=question,response=answers"),
    ({"query": "Q", "references": ["A", "B"]}, ""),
    ({"prompt": "Q", "response_a": "A", "response_b": "B", "winner": "model_b"}, ""),
    ({"question": "Q", "answer_1": "A", "answer_2": "B", "label": 1}, ""),
    ({"question_id": 81, "turns": ["Q", "And?"]}, ""),
    ({"dialog": DIALOGUE, "id": "7"}, "messages=dialog"),
    ({"talk": json.dumps(DIALOGUE)}, "messages=talk"),
    ({"talk": [{"human": "Q", "assistant": "A"}]}, "messages=talk"),
    ({"data": [{"prompt": "Q", "response": "A"}]}, ""),
    ({"question_id": "x1", "conversation_a": DIALOGUE, "conversation_b": DIALOGUE, "winner": "model_b"}, ""),
    ({"question_id": "x1", "query_text": "Q?", "winner": "model_b"}, ""),
    ({"context": "C", "question": "Q?", "answers": {"text": ["A"], "answer_start": [5]}}, ""),
    ({"question": "Q?", "choices": ["x", "y"], "answer": "B"}, ""),
    ({"question": "Q?", "A": "x", "B": "y", "answer": "B"}, ""),
    ({"question": "Q?", "hint": "H", "answer": "yes."}, "prompt=question,response=answer"),
]


@pytest.mark.fast
@pytest.mark.parametrize("row, columns", SUGGESTED)
def test_columns_are_suggested_only_where_they_train_texts(row, columns, load, tmp_path):
    assert suggested_columns(row) == columns
    if columns:
        path = write_lines(tmp_path / "a.jsonl", [row])
        (record,) = load(path, columns=dict(pair.split("=") for pair in columns.split(",")))["train"]
        assert record["messages"][0]["content"].startswith("Q") and record["chosen"] in ("A", "yes.")


WRONG_COLUMNS = [
    ({"prompt": "question", "response": "anwser"}, '"anwser", which is not there .found: question, answer'),
    ({"promt": "question"}, "--columns promt=…: no such name of ours"),
    ({"response": "answer"}, "do not make a record"),
]


@pytest.mark.fast
@pytest.mark.parametrize("columns, message", WRONG_COLUMNS)
def test_wrong_columns(columns, message, load, tmp_path):
    with pytest.raises(UserError, match=message):
        load(write_lines(tmp_path / "a.jsonl", [{"question": "Q", "answer": "A"}]), columns=columns)


BAD = {
    "empty.jsonl": ("", "empty.jsonl: no records"),
    "blank.json": (" \n\n ", "blank.json: no records"),
    "empty_list.json": ("[]", "empty_list.json: no records"),
    "empty_wrapper.json": ('{"version": "1", "data": []}', 'no records in it: the list "data" is empty'),
    "header.csv": ("prompt,response\n", "header.csv: no records"),
    "missing.jsonl": (f'{GOOD}\n{{"prompt": "a", "chosen": "b"}}\n', 'line 2: no field "rejected" .found: prompt, chosen'),
    "null.json": (f'[{GOOD}, {{"prompt": "a", "chosen": "b", "rejected": null}}]', r'record 2 .line 1.: field "rejected" is null'),
    "labels.jsonl": ('{"text": "good", "label": 1}\n', "line 1: labelled texts .fields text, label. are no dialogues"),
    "no_fields.jsonl": ("{}\n", "line 1: an empty record, {}; remove it"),
    "unknown.jsonl": ('{"ask": "q", "told": "r"}\n', "the fields ask, told are no known format.*--columns"),
    "suggested.jsonl": ('{"request": "q", "solution": "r", "type": "t"}\n', "--columns prompt=request,response=solution .docs"),
    "suggested_pair.jsonl": ('{"question": "q", "response_j": "r", "response_k": "s"}\n', "chosen=response_j,rejected=response_k "),
    "nothing_to_suggest.jsonl": ('{"toy_a": "q", "toy_b": "r", "toy_c": "s"}\n', "with --columns, or write it in one of these"),
    "many_fields.json": (json.dumps({f"f{n}": {} for n in range(99)}), "the fields f0, f1, f2, f3, f4, f5, f6, f7, … are no known"),
    "no_role.jsonl": ('{"messages": [{"said": "x", "by": "y"}]}\n', '"messages" has a message without "role" .found: said, by.'),
    "prompt_answer.jsonl": ('{"prompt": "q", "answer": "r", "text": "t"}\n', "the fields prompt, answer, text are no known format"),
    "choices.jsonl": ('{"question": "q", "A": "r", "B": "s", "answer": "A"}\n', "the fields question, A, B, answer are no known"),
    "no_header.csv": ("What is 1+1?,Two\nWhat is 2+2?,Four\n", r"read like texts .What is 1\+1\?, Two.; put a line with the"),
    "several_worse.jsonl": ('{"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}\n', "text, and a record for each pair"),
    "tree.jsonl": ('{"message_id": "1", "parent_id": null, "text": "q", "role": "prompter"}\n', "a message of a tree"),
    "whole_tree.jsonl": ('{"prompt": {"text": "q", "role": "prompter", "replies": []}}\n', '"prompt" is a tree of messages'),
    "marked_text.jsonl": ('{"text": "<|user|>q<|assistant|>r", "id": "7"}\n', "write its turns as messages; --columns prompt=text"),
    "unordered.jsonl": (
        '{"prompt": "q", "response": [{"text": "a", "votes": 1}, {"text": "b", "votes": 2}]}\n',
        r'list of 2 answers \(with text, votes\), and nothing is known to say .* call the field that does "score"',
    ),
    "arena.jsonl": (
        json.dumps({"winner": "tie", "conversation_a": turns("Q", "A"), "conversation_b": turns("Q", "B")}) + "\n",
        "say which is which: write the better one of conversation_a and conversation_b as chosen, .* leave out ties",
    ),
    "only_chosen.jsonl": ('{"chosen": "q"}\n', 'no field "prompt" or "rejected"'),
    "no_dialogue.jsonl": ('{"chosen": "a", "rejected": "b"}\n', 'names another one., and "chosen" is not a whole dialogue'),
    "type.jsonl": ('{"prompt": 5, "response": "b"}\n', 'line 1: field "prompt" is a int, expected a text'),
    "role.jsonl": ('{"messages": [{"role": "critic", "content": "x"}]}\n', "line 1: .* the role 'critic', expected one of"),
    "odd_role.jsonl": ('{"messages": [{"role": ["user"], "content": "Q"}]}\n', r"has the role \['user'\]"),
    "string.jsonl": ('{"messages": "hello"}\n', 'field "messages" is a str, expected a list'),
    "history.jsonl": ('{"prompt": "a", "response": "b", "history": [["x"]]}\n', "not a pair .question, answer"),
    "mkqa.jsonl": ('{"query": "q", "queries": {"en": "q"}, "answers": ["a"]}\n', 'field "answers" is not of the form'),
    "unanswered.jsonl": ('{"prompt": "Q", "response": null}\n', 'field "response" is null'),
    "margin.jsonl": (GOOD[:-1] + ', "margin": "much"}\n', "field \"margin\" is 'much', expected a number"),
    "nan.jsonl": (GOOD[:-1] + ', "margin": NaN}\n', 'field "margin" is nan, expected a finite number'),
    "large.jsonl": (GOOD[:-1] + ', "margin": 1e39}\n', "expected a finite number"),
    "useless.jsonl": ('{"prompt": "a", "response": ""}\n', "no usable record; left out 1 with an empty answer"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD)
def test_bad_records(name, load, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(tmp_path / name)
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # nothing half-written is left


@pytest.mark.fast
def test_notes_of_a_copy_do_not_name_the_first_file(tmp_path):
    rows = [*PAIRS, PAIRS[0] | {"chosen": "", "id": 1}]
    for folder, file in (("one", "a.jsonl"), ("two", "b.jsonl")):
        write_lines(tmp_path / folder / file, rows)
        (reading,) = readings(read_records(open_source(str(tmp_path / folder / file)))).values()
        assert reading.notes == ["2 records; left out 1 with an empty answer (first: line 3)"]
    write_lines(tmp_path / "two/c.jsonl", rows)
    (reading,) = readings(read_records(open_source(str(tmp_path / "two")))).values()
    assert reading.notes == ["4 records; left out 2 with an empty answer (2 answers; first: b.jsonl, line 3)"]


@pytest.mark.fast
def test_the_cache_follows_the_content_not_the_name(tmp_path):
    def files(path, **columns):
        return read_records(open_source(str(path)), columns).folder

    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    first = files(path)
    assert files(path) == files(write_lines(tmp_path / "copy.jsonl", PAIRS)) == first
    assert files(path, prompt="chosen") != first
    assert files(write_lines(path, PAIRS[:1])) != first
    assert len(load_records(str(path))["train"]) == 1


def test_memory_does_not_grow_with_the_data(tmp_path):
    words = "the quick brown fox jumps over the lazy dog while 三步 trains a model " * 6
    sizes, peaks = [], []
    for count in (2_000, 8_000):
        rows = [{"prompt": f"{n} {words}", "chosen": f"{words} {n}", "rejected": f"{words[::-1]}"} for n in range(count)]
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps(rows, ensure_ascii=False))
        sizes.append(path.stat().st_size)
        del rows
        tracemalloc.start()
        assert len(load_records(str(path))["train"]) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 0.5 * (sizes[1] - sizes[0])


# --- real data --------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode()
    return json.loads(text) if text.lstrip()[0] == "[" else [json.loads(line) for line in text.split("\n") if line]


def expected_count(path: Path, raw: list[dict]) -> int:
    """Number of records, counted from the raw rows."""
    if path.name.startswith("moss"):
        return sum(turn["from"] == "gpt" for row in raw for turn in row["conversations"])
    if path.name.startswith("oasst_zh"):
        whole = [[*row["history"], [row["prompt"], row["response"]]] for row in raw]
        return len({json.dumps(dialogue[: end + 1]) for dialogue in whole for end in range(len(dialogue))})
    if path.name.startswith("mkqa"):
        return sum(bool(row["answers"]["en"][0].get("text")) for row in raw)
    return len(raw)


def test_every_sample_file_loads(load, shared_dir):
    files = sorted(path for path in (shared_dir / "data").rglob("*.json*") if path.parent.name != "sentiment")
    assert len(files) > 20
    records = {path: load(path)["train"] for path in files}
    for path in files:
        assert len(records[path]) == expected_count(path, rows_of(path)), path
        for row in records[path]:
            roles = [turn["role"] for turn in row["messages"] if turn["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], path
            assert all(turn["content"] == turn["content"].strip() != "" for turn in row["messages"]), path
            assert bool(row["chosen"]) == (path.parent.name != "prompts"), path
            assert bool(row["rejected"]) == path.parent.name.startswith("preference"), path

    # The same pairs were published in both forms: whole dialogues, and prompt/chosen/rejected.
    def pairs_of(*names):
        folder = shared_dir / "data/preference_en"
        return [json.dumps(row, sort_keys=True) for name in names for row in records[folder / f"{name}.jsonl.gz"]]

    whole, static = set(pairs_of("hh_helpful_base", "hh_harmless_base_mild")), pairs_of("rm_static_en_train", "rm_static_en_test")
    assert sum(row in whole for row in static) >= 0.99 * len(static)
    for path in (shared_dir / "data/sentiment").iterdir():
        with pytest.raises(UserError, match="labelled texts"):
            load(path)
