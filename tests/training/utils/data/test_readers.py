"""Every kind of file gives the same rows, and what is wrong is named with its line."""

import csv
import gzip
import json

import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from tests.training.utils.data.rows import PAIRS, write_lines
from training.utils.data import readers
from training.utils.data.readers import read_rows

pytestmark = pytest.mark.fast


def write_table(path, delimiter):
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # with the byte order mark that Excel writes
        writer = csv.DictWriter(file, list(PAIRS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(PAIRS)


WRITERS = {
    "list.json": lambda path: path.write_text(json.dumps(PAIRS)),
    "pretty.json": lambda path: path.write_text(json.dumps(PAIRS, indent=4, ensure_ascii=False), encoding="utf-8"),
    "lines.json": lambda path: write_lines(path, PAIRS),
    "objects.json": lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in PAIRS)),
    "blank_lines.jsonl": lambda path: path.write_text("\n" + "\n\n".join(map(json.dumps, PAIRS))),
    "windows.jsonl": lambda path: path.write_bytes("\r\n".join(map(json.dumps, PAIRS)).encode("utf-8-sig")),
    "list.jsonl": lambda path: path.write_text(json.dumps(PAIRS)),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": "1.1", "data": PAIRS})),
    "pretty_wrapped.json": lambda path: path.write_text(json.dumps({"train": PAIRS}, indent=1)),
    "server.json": lambda path: path.write_text(
        json.dumps({"features": [{"name": "prompt"}], "rows": [{"row_idx": 0, "row": row} for row in PAIRS], "partial": False})
    ),
    "table.csv": lambda path: write_table(path, ","),
    "table.tsv": lambda path: write_table(path, "\t"),
    "table.parquet": lambda path: Dataset.from_list(PAIRS).to_parquet(str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_packed_or_not(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    packed = path.with_name(name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        assert [row for _, row in read_rows(file)] == PAIRS


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q"}]},
        {"prompt": "Q", "references": [{"url": "x"}]},
        {"train": [{"prompt": "Q"}], "test": [{"prompt": "R"}]},
    ],
)
def test_an_object_that_is_a_record_or_holds_several_lists_is_one_row(tmp_path, row):
    file = tmp_path / "one.json"
    file.write_text(json.dumps(row))
    assert [row for _, row in read_rows(file)] == [row]
    write_lines(file, [{"data": PAIRS}, {"data": PAIRS}])
    assert [row for _, row in read_rows(file)] == [{"data": PAIRS}] * 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=5),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.integers(1, 40),
)
def test_json_is_read_in_any_chunks(tmp_path_factory, rows, indent, escaped, chunk):
    """A list read through a window of a few characters equals json.loads of the whole."""
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=escaped), encoding="utf-8")
    before, readers.CHUNK = readers.CHUNK, chunk
    try:
        assert [row for _, row in read_rows(path)] == rows
    finally:
        readers.CHUNK = before


def test_rows_come_with_their_place(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(PAIRS, indent=1))
    assert [location for location, _ in read_rows(path)] == ["record 1 (line 2)", "record 2 (line 7)"]
    write_lines(path, PAIRS)
    assert [location for location, _ in read_rows(path)] == ["line 1", "line 2"]


DIALOGUE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
LINE = json.dumps(DIALOGUE)
SAME = {
    "semicolons.csv": "prompt;response\nQ;a, b\n",
    "tabs.csv": "prompt\tresponse\nQ\ta, b\n",
    "commas.csv": 'prompt,response\nQ,"a, b"\n',
}


@pytest.mark.parametrize("name", SAME)
def test_a_csv_has_the_delimiter_of_its_first_line(name, tmp_path):
    (tmp_path / name).write_text(SAME[name])
    assert list(read_rows(tmp_path / name)) == [("line 2", {"prompt": "Q", "response": "a, b"})]


@pytest.mark.parametrize(
    "content, name",
    [(f"{LINE}\n{LINE}\n", "a.jsonl"), (f"{LINE}\n\n{LINE}", "a.json"), (f"[{LINE},\n{LINE}]", "a.json")],
)
def test_lists_of_messages_are_dialogues(content, name, tmp_path):
    (tmp_path / name).write_text(content)
    assert [row for _, row in read_rows(tmp_path / name)] == [{"messages": DIALOGUE}] * 2


def test_lists_of_texts_are_dialogues(tmp_path):
    (tmp_path / "a.json").write_text('[["Q", "A"], ["Q", "A", "R"]]')
    assert [row for _, row in read_rows(tmp_path / "a.json")] == [{"messages": ["Q", "A"]}, {"messages": ["Q", "A", "R"]}]


def test_numbers_that_only_python_writes_are_read(tmp_path):
    """What ijson refuses: NaN in a field that nobody needs, identifiers above 64 bits."""
    path = tmp_path / "a.json"
    path.write_text('[{"score": NaN, "id": 123456789012345678901234567890}]')
    ((_, row),) = read_rows(path)
    assert row["score"] != row["score"] and row["id"] == 123456789012345678901234567890


GOOD = json.dumps(PAIRS[1])
BAD = {
    "comma.jsonl": (f'{GOOD}\n\n{{"prompt": "a" "chosen": "b"}}\n', "comma.jsonl, line 3: invalid JSON"),
    "cut.jsonl": (f'{GOOD}\n{{"prompt": "a", "ch', "cut.jsonl, line 2: invalid JSON"),
    "value.jsonl": ('{"prompt": "a", "chosen": \n', r"value.jsonl, line 1: invalid JSON .Expecting value, column 27"),
    "list.json": (f'[\n{GOOD},\n{GOOD},\n{{"prompt": "a",, }}\n]', "list.json, line 4: invalid JSON in record 3"),
    "no_comma.json": (f"[\n{GOOD}\n{GOOD}\n]", 'no_comma.json, line 3: .*expected "," or "]" after record 1'),
    "open.json": (f"[\n{GOOD},\n{GOOD}\n", "open.json, line 4: the JSON list is not closed"),
    "open_comma.json": (f"[\n{GOOD},\n", "open_comma.json, line 3: the JSON list is not closed"),
    "open_string.json": (f'[{GOOD},\n{{"prompt": "a', "open_string.json, line 2: invalid JSON in record 2"),
    "after.json": (f"[{GOOD}]\n{GOOD}", "after.json, line 2: text after the end"),
    "trailing.json": (f"[{GOOD},\n]", "trailing.json, line 2: invalid JSON"),
    "number.jsonl": (f"{GOOD}\n12\n", "number.jsonl, line 2: a int, expected an object"),
    "lists.json": ("[[1, 2]]", "record 1 .line 1.: a list, expected an object"),
    "words.txt": ("hello", "words.txt: not a data file by its name"),
    "short.csv": ("prompt,response\na,b\nc\n", "short.csv, line 3: fewer cells than the 2 columns"),
    "long.csv": ("prompt,response\na,b,c\n", "long.csv, line 2: more cells than the 2 columns"),
    "quote.csv": ('prompt,response\na,"b\n', "quote.csv, line 2: invalid CSV"),
    "twice.csv": ("prompt,response,prompt\na,b,c\n", 'twice.csv, line 1: two columns are called "prompt"; rename'),
    "twice.jsonl": (f'{GOOD}\n{{"prompt": "a", "prompt": "b"}}\n', 'line 2: invalid JSON .the name "prompt" stands twice'),
    "twice_inside.json": (f'[{GOOD},\n{{"a": {{"b": 1, "b": 2}}}}]', 'line 2: invalid JSON in record 2 .the name "b" stands'),
    "cut.json": (
        '{"rows": [{"row_idx": 0, "row": {"prompt": "Q", "response": "A"}, "truncated_cells": ["response"]}]}',
        "cut.json, record 1: the data server cut its texts",
    ),
    "broken.parquet": ("PAR1 not really", "broken.parquet: not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / name))


def test_a_wrapper_that_is_not_read_whole_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_RECORD", 100)
    monkeypatch.setattr(readers, "CHUNK", 50)
    (tmp_path / "a.json").write_text(json.dumps({"data": PAIRS * 20}, indent=1))
    with pytest.raises(UserError, match=r"record 1 is longer than 0 MB; if it holds .* write these one a line"):
        list(read_rows(tmp_path / "a.json"))


TURNED = [
    {"prompt": ["Q", "R"], "response": ["A", "B"]},
    {"prompt": {"0": "Q", "1": "R"}, "response": {"0": "A", "1": "B"}},
    {"a7": PAIRS[0], "b8": PAIRS[1]},
    {"messages": [DIALOGUE, DIALOGUE]},
]


@pytest.mark.parametrize("table", TURNED)
def test_an_object_of_columns_or_of_records_by_key_is_told(table, tmp_path):
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(table, indent=indent))
        with pytest.raises(UserError, match=r"a\.json: an object of columns, or of records by their keys; write one"):
            list(read_rows(tmp_path / "a.json"))


@pytest.mark.parametrize("record", [{"messages": DIALOGUE}, {"conversations": ["Q", "A"]}, {"prompt": {"text": "Q"}}, {"data": []}])
def test_a_single_record_is_no_table_of_columns(record, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert [row for _, row in read_rows(tmp_path / "a.json")] == [record]


ARTICLE, ANSWERED = {"title": "T", "paragraphs": [{"context": "C"}]}, {"question": "Q", "answers": [{"text": "A"}]}


@pytest.mark.parametrize("record", [ARTICLE, ANSWERED])
def test_a_record_with_a_list_of_objects_is_no_wrapper(record, tmp_path):
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(record, indent=indent))
        assert [row for _, row in read_rows(tmp_path / "a.json")] == [record]


def test_two_parquet_columns_of_one_name(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match='two columns are called "prompt"'):
        list(read_rows(tmp_path / "a.parquet"))


def test_columns_without_a_name_are_numbered(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,,\nQ,,x\n")
    assert [row for _, row in read_rows(tmp_path / "a.csv")] == [{"prompt": "Q", "column 2": "", "column 3": "x"}]


def test_bad_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "问题", "response": "答"}\n'.encode("gb18030"))
    with pytest.raises(UserError, match=r"not UTF-8 text.*iconv"):
        list(read_rows(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(write_lines(tmp_path / "b", PAIRS * 50).read_bytes())[:-20])
    with pytest.raises(UserError, match=r"damaged or incomplete gzip"):
        list(read_rows(tmp_path / "b.jsonl.gz"))
