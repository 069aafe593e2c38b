"""Every kind of --data_path gives the same kind of record, and what is wrong is named with its place."""

import csv
import gzip
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from tests.training.utils.data.rows import PAIR_RECORDS, PAIRS, rec, turns, write_lines
from training.utils.data import readers
from training.utils.data.sources import content_key, load_records

# ---------------------------------------------------------------------------------------------------- files


def write_table(path: Path, delimiter: str) -> None:
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
    "table.csv": lambda path: write_table(path, ","),
    "table.tsv": lambda path: write_table(path, "\t"),
    "table.parquet": lambda path: Dataset.from_list(PAIRS).to_parquet(str(path)),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_file(name, packed, load, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    if packed:
        path = path.with_name(name + ".gz")
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert load(path) == {"train": PAIR_RECORDS}


def test_lists_in_csv_cells(load, tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "response", "history"], ["Q1", "A1", ""], ["Q3", "A3", '[["Q2", "A2"]]']])
    expected = [rec(turns("Q1"), "A1"), rec(turns("Q2"), "A2"), rec(turns("Q2", "A2", "Q3"), "A3")]
    assert load(tmp_path / "a.csv")["train"] == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=5),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.integers(1, 40),
)
def test_json_is_read_in_any_chunks(tmp_path_factory, rows, indent, escaped, chunk):
    """A list read through a buffer of a few characters equals json.loads of the whole."""
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=escaped), encoding="utf-8")
    before, readers.CHUNK = readers.CHUNK, chunk
    try:
        assert [row for _, row in readers.read_rows(path)] == rows
    finally:
        readers.CHUNK = before


def test_folders(load, tmp_path):
    held_out = [{"prompt": "Q9", "chosen": "A9", "rejected": "B9"}]
    eval_records = [rec(turns("Q9"), "A9", "B9")]
    Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "one"))
    splits = {"train": Dataset.from_list(PAIRS), "test": Dataset.from_list(held_out)}
    DatasetDict(splits).save_to_disk(str(tmp_path / "two"))
    DatasetDict({**splits, "validation": Dataset.from_list(PAIRS)}).save_to_disk(str(tmp_path / "three"))
    (tmp_path / "files").mkdir()
    write_lines(tmp_path / "files" / "pairs_train.jsonl", PAIRS)
    write_lines(tmp_path / "files" / "pairs-test.json", held_out)
    assert load(tmp_path / "one") == {"train": PAIR_RECORDS}
    assert load(tmp_path / "two") == {"train": PAIR_RECORDS, "eval": eval_records}
    assert load(tmp_path / "three") == {"train": PAIR_RECORDS, "eval": PAIR_RECORDS}  # validation goes before test
    assert load(tmp_path / "files") == {"train": PAIR_RECORDS, "eval": eval_records}
    write_lines(tmp_path / "files" / "pairs_heldout.json", held_out)  # names no split that we know: not for training
    assert load(tmp_path / "files") == {"train": PAIR_RECORDS, "eval": eval_records}
    write_lines(tmp_path / "unnamed" / "a.json", PAIRS[:1])
    write_lines(tmp_path / "unnamed" / "b.json", PAIRS[1:])
    assert load(tmp_path / "unnamed") == {"train": PAIR_RECORDS}
    write_lines(tmp_path / "deep" / "train" / "a.json", PAIRS)
    write_lines(tmp_path / "deep" / "dev" / "a.json", held_out)
    assert load(tmp_path / "deep") == {"train": PAIR_RECORDS, "eval": eval_records}


# ---------------------------------------------------------------------------------------------------- columns


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


def test_columns_leave_sets_without_these_fields_alone(load, tmp_path, caplog):
    caplog.set_level("INFO")
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    assert load(path, columns={"prompt": "question", "response": "answer"}) == {"train": PAIR_RECORDS}
    assert "without the fields of --columns" in caplog.text


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"prompt": "question", "response": "anwser"},
            '--columns names "anwser", which is not there .found: question, answer',
        ),
        ({"promt": "question"}, "--columns promt=…: no such name of ours"),
        ({"response": "answer"}, "do not make a record"),
    ],
)
def test_wrong_columns(columns, message, load, tmp_path):
    with pytest.raises(UserError, match=message):
        load(write_lines(tmp_path / "a.jsonl", [{"question": "Q", "answer": "A"}]), columns=columns)


# ---------------------------------------------------------------------------------------------------- bad input

GOOD = json.dumps(PAIRS[1])
BAD = {
    "empty.jsonl": ("", "empty.jsonl: no records"),
    "blank.json": (" \n\n ", "blank.json: no records"),
    "empty_list.json": ("[]", "empty_list.json: no records"),
    "header.csv": ("prompt,response\n", "header.csv: no records"),
    "comma.jsonl": (f'{GOOD}\n\n{{"prompt": "a" "chosen": "b"}}\n', "comma.jsonl, line 3: invalid JSON"),
    "cut.jsonl": (f'{GOOD}\n{{"prompt": "a", "ch', "cut.jsonl, line 2: invalid JSON"),
    "list.json": (f'[\n{GOOD},\n{GOOD},\n{{"prompt": "a",, }}\n]', "list.json, line 4: invalid JSON in record 3"),
    "no_comma.json": (f"[\n{GOOD}\n{GOOD}\n]", 'no_comma.json, line 3: .*expected "," or "]" after record 1'),
    "open.json": (f"[\n{GOOD},\n{GOOD}\n", "open.json, line 4: the JSON list is not closed"),
    "open_string.json": (f'[{GOOD},\n{{"prompt": "a', "open_string.json, line 2: invalid JSON in record 2"),
    "after.json": (f"[{GOOD}]\n{GOOD}", "after.json, line 2: text after the end"),
    "trailing.json": (f"[{GOOD},\n]", "trailing.json, line 2: invalid JSON"),
    "number.jsonl": (f"{GOOD}\n12\n", "number.jsonl, line 2: a int, expected an object"),
    "lists.json": ("[[1, 2]]", "record 1 .line 1.: a list, expected an object"),
    "words.txt": ("hello", "words.txt: not a data file by its name"),
    "missing.jsonl": (
        f'{GOOD}\n{{"prompt": "a", "chosen": "b"}}\n',
        'missing.jsonl, line 2: no field "rejected" .found: prompt, chosen',
    ),
    "null.json": (
        f'[{GOOD}, {{"prompt": "a", "chosen": "b", "rejected": null}}]',
        r'record 2 .line 1.: no field "rejected" .found: prompt, chosen',
    ),
    "labels.jsonl": ('{"text": "good", "label": 1}\n', "line 1: labelled texts .fields text, label. are no dialogues"),
    "unknown.jsonl": ('{"question": "q", "reply": "r"}\n', "the fields question, reply are no known format.*--columns"),
    "prompt_answer.jsonl": ('{"prompt": "q", "answer": "r"}\n', "the fields prompt, answer are no known format"),
    "only_chosen.jsonl": ('{"chosen": "q"}\n', 'no field "prompt" or "rejected"'),
    "no_dialogue.jsonl": (
        '{"chosen": "a", "rejected": "b"}\n',
        'no field "prompt", and "chosen" is not a whole dialogue',
    ),
    "type.jsonl": ('{"prompt": 5, "response": "b"}\n', 'line 1: field "prompt" is a int, expected a text'),
    "role.jsonl": (
        '{"messages": [{"role": "tool", "content": "x"}]}\n',
        "line 1: .* has the role 'tool', expected one of",
    ),
    "string.jsonl": ('{"messages": "hello"}\n', 'field "messages" is a str, expected a list'),
    "history.jsonl": ('{"prompt": "a", "response": "b", "history": [["x"]]}\n', "not a pair .question, answer"),
    "nan.jsonl": (GOOD[:-1] + ', "margin": NaN}\n', 'field "margin" is nan, expected a finite number'),
    "large.jsonl": (GOOD[:-1] + ', "margin": 1e39}\n', "expected a finite number"),
    "odd_role.jsonl": ('{"messages": [{"role": ["user"], "content": "Q"}]}\n', r"has the role \['user'\]"),
    "mkqa.jsonl": ('{"query": "q", "queries": {"en": "q"}, "answers": ["a"]}\n', 'field "answers" is not of the form'),
    "unanswered.jsonl": ('{"prompt": "Q", "response": null}\n', 'no field "response"'),
    "margin.jsonl": (GOOD[:-1] + ', "margin": "much"}\n', "field \"margin\" is 'much', expected a number"),
    "short.csv": ("prompt,response\na,b\nc\n", "short.csv, line 3: fewer cells than the 2 columns"),
    "long.csv": ("prompt,response\na,b,c\n", "long.csv, line 2: more cells than the 2 columns"),
    "quote.csv": ('prompt,response\na,"b\n', "quote.csv, line 2: invalid CSV"),
    "broken.parquet": ("PAR1 not really", "broken.parquet: not a readable Parquet file"),
    "useless.jsonl": ('{"prompt": "a", "response": ""}\n', "no usable record; left out 1 with an empty answer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name, load, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(tmp_path / name)
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # nothing half-written is left


def test_sets_in_memory_are_told_apart(load, tmp_path, monkeypatch):
    """HF_DATASETS_IN_MEMORY_MAX_SIZE: such a set names no files."""
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 1 << 30)
    for name, rows in (("one", PAIRS), ("two", PAIRS[:1])):
        Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
    assert load(tmp_path / "one") == {"train": PAIR_RECORDS}
    assert load(tmp_path / "two") == {"train": PAIR_RECORDS[:1]}
    assert content_key(str(tmp_path / "one")) == content_key(str(tmp_path / "one"))


def test_bad_bytes(load, tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "问题", "response": "答"}\n'.encode("gb18030"))
    with pytest.raises(UserError, match=r"not UTF-8 text.*iconv"):
        load(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(write_lines(tmp_path / "b", PAIRS * 50).read_bytes())[:-20])
    with pytest.raises(UserError, match=r"damaged or incomplete gzip"):
        load(tmp_path / "b.jsonl.gz")


def test_missing_paths(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "data/pairs_train.jsonl", PAIRS)
    (tmp_path / "nothing").mkdir()
    for path, message in {
        "data/pairs_tran.jsonl": "did you mean data/pairs_train.jsonl",
        "else/where/pairs.jsonl": "the folder else/where does not exist either",
        "../../rm-static-zh": r"download_dataset zwh9029/rm-static-m2m100-zh-jianti --output_dir ../../rm-static-zh",
        "./no/such/folder": "no such file or folder",
        "nothing": "neither a set written by save_to_disk nor data files",
    }.items():
        with pytest.raises(UserError, match=message):
            load(path)
    DatasetDict({"a": Dataset.from_list(PAIRS), "b": Dataset.from_list(PAIRS)}).save_to_disk("odd")
    with pytest.raises(UserError, match=r'no split named "train" .found: a, b'):
        load("odd")


# ---------------------------------------------------------------------------------------------------- cache, memory


def test_cache_follows_the_content(tmp_path):
    cache = str(tmp_path / "cache")
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    first = load_records(str(path), cache_dir=cache)["train"].cache_files
    assert load_records(str(path), cache_dir=cache)["train"].cache_files == first
    copy = write_lines(tmp_path / "copy.jsonl", PAIRS)
    assert load_records(str(copy), cache_dir=cache)["train"].cache_files == first
    before = content_key(str(path))
    write_lines(path, PAIRS[:1])
    assert content_key(str(path)) != before
    assert content_key(str(path)) != content_key(str(path), {"prompt": "chosen"})
    assert len(load_records(str(path), cache_dir=cache)["train"]) == 1


def test_cache_folder_that_cannot_be_written(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(UserError, match=r"cannot be written .*SANBU_CACHE"):
        load_records(str(path), cache_dir=str(path))


def _load_and_count(path: str, cache: str, queue) -> None:
    queue.put(len(load_records(path, cache_dir=cache)["train"]))


def test_two_processes_at_once(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", PAIRS * 500)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_load_and_count, args=(str(path), str(tmp_path / "c"), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [1000, 1000]
    for worker in workers:
        worker.join()
    assert len(list((tmp_path / "c").rglob("train.arrow"))) == 1


def test_what_a_killed_run_left_is_cleared(load, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    left = tmp_path / "cache/records" / f".{content_key(str(path))}.building"
    left.mkdir(parents=True)
    (left / "train.arrow").write_bytes(b"half")
    assert load(path) == {"train": PAIR_RECORDS}
    assert not left.exists()


def test_a_hundred_thousand_pairs_stay_under_a_gigabyte(tmp_path, repository):
    """One JSON list of 120 MB, in a process of its own; measured is the peak of its resident memory."""
    words = "the quick brown fox jumps over the lazy dog while 三步 trains a model " * 6
    with (tmp_path / "pairs.json").open("w", encoding="utf-8") as file:
        for number in range(100_000):
            row = {"prompt": f"{number} {words}", "chosen": f"{words} {number}", "rejected": f"{words[::-1]} {number}"}
            file.write("[\n" if number == 0 else ",\n")
            file.write(json.dumps(row, ensure_ascii=False))
        file.write("\n]")
    code = (
        "import re, sys\n"
        "from training.utils.data.sources import load_records\n"
        "from training.utils.data.splits import select_phase\n"
        "records = load_records(sys.argv[1], cache_dir=sys.argv[2])\n"
        "sizes = [sum(map(len, select_phase(records, phase, data_split='2,4,4', seed=1, eval_fraction=0.05)))"
        " for phase in (1, 2, 3)]\n"
        # not ru_maxrss: that remembers the parent's size from before the exec
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())\n"
        "print(len(records['train']), sum(sizes), int(peak[1]) // 1024)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pairs.json"), str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    records, split, megabytes = map(int, done.stdout.split())
    assert (records, split) == (100_000, 100_000)
    assert 0 < megabytes < 1000, megabytes


# ---------------------------------------------------------------------------------------------------- real data


def rows_of(path: Path) -> list[dict]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode()
    return json.loads(text) if text.lstrip()[0] == "[" else [json.loads(line) for line in text.split("\n") if line]


def test_every_sample_file_loads(load, shared_dir):
    """Record counts against plain counts of the raw files; every record is whole."""
    files = sorted(path for path in (shared_dir / "data").rglob("*.json*") if path.parent.name != "sentiment")
    assert len(files) > 20
    for path in files:
        raw, records = rows_of(path), load(path)["train"]
        if path.name.startswith("moss"):
            expected = sum(turn["from"] == "gpt" for row in raw for turn in row["conversations"])
        elif path.name.startswith("oasst_zh"):
            whole = [[*row["history"], [row["prompt"], row["response"]]] for row in raw]
            expected = len({json.dumps(pairs[: end + 1]) for pairs in whole for end in range(len(pairs))})
        elif path.name.startswith("mkqa"):
            expected = sum(bool(row["answers"]["en"][0].get("text")) for row in raw)
        else:
            expected = len(raw)
        assert len(records) == expected, path
        pairs = path.parent.name.startswith("preference")
        for row in records:
            roles = [turn["role"] for turn in row["messages"] if turn["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], path
            assert all(turn["content"] == turn["content"].strip() != "" for turn in row["messages"]), path
            assert bool(row["chosen"]) == (path.parent.name != "prompts"), path
            assert bool(row["rejected"]) == pairs, path


def test_hh_rlhf_equals_its_rm_static_form(load, shared_dir):
    """The same pairs were published in both forms: whole dialogues, and prompt/chosen/rejected."""
    folder = shared_dir / "data" / "preference_en"
    whole = [
        row
        for name in ("hh_helpful_base", "hh_harmless_base_mild")
        for row in load(folder / f"{name}.jsonl.gz")["train"]
    ]
    static = [row for part in ("train", "test") for row in load(folder / f"rm_static_en_{part}.jsonl.gz")["train"]]
    told = {json.dumps(row, sort_keys=True) for row in whole}
    same = sum(json.dumps(row, sort_keys=True) in told for row in static)
    assert same >= 0.99 * len(static)


def test_labelled_reviews_are_refused(load, shared_dir):
    for path in (shared_dir / "data" / "sentiment").iterdir():
        with pytest.raises(UserError, match="labelled texts"):
            load(path)
