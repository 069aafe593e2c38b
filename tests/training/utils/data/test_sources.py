"""A --data_path is a file, a folder, a local set or a set of the hub; what is missing is named with what to do."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from errors import UserError
from tests.training.utils.data.rows import PAIR_RECORDS, PAIRS, rec, turns, write_lines
from training.utils.data import sources

pytestmark = pytest.mark.fast

HELD_OUT = [{"prompt": "Q9", "chosen": "A9", "rejected": "B9"}]
EVAL_RECORDS = [rec(turns("Q9"), "A9", "B9")]


def test_folders(load, tmp_path):
    Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "one"))
    splits = {"train": Dataset.from_list(PAIRS), "test": Dataset.from_list(HELD_OUT)}
    DatasetDict(splits).save_to_disk(str(tmp_path / "two"))
    DatasetDict({**splits, "validation": Dataset.from_list(PAIRS)}).save_to_disk(str(tmp_path / "three"))
    for name, rows in {
        "files/pairs_train.jsonl": PAIRS,
        "files/pairs-test.json": HELD_OUT,
        "files/pairs_heldout.json": HELD_OUT,  # names no split that we know: not for training
        "unnamed/a.json": PAIRS[:1],
        "unnamed/b.json": PAIRS[1:],
        "deep/train/a.json": PAIRS,
        "deep/dev/a.json": HELD_OUT,
    }.items():
        write_lines(tmp_path / name, rows)
    both = {"train": PAIR_RECORDS, "eval": EVAL_RECORDS}
    for name, expected in {
        "one": {"train": PAIR_RECORDS},
        "two": both,
        "three": {"train": PAIR_RECORDS, "eval": PAIR_RECORDS},  # validation goes before test
        "files": both,
        "unnamed": {"train": PAIR_RECORDS},
        "deep": both,
    }.items():
        assert load(tmp_path / name) == expected, name


def test_sets_in_memory_are_told_apart(load, tmp_path, monkeypatch):
    """HF_DATASETS_IN_MEMORY_MAX_SIZE: such a set names no files."""
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 1 << 30)
    for name, rows in (("one", PAIRS), ("two", PAIRS[:1])):
        Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
    assert load(tmp_path / "one") == {"train": PAIR_RECORDS}
    assert load(tmp_path / "two") == {"train": PAIR_RECORDS[:1]}
    one, again = (sources.open_source(str(tmp_path / "one")).content for _ in range(2))
    assert one == again


def test_missing_paths(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "data/pairs_train.jsonl", PAIRS)
    (tmp_path / "nothing").mkdir()
    DatasetDict({"a": Dataset.from_list(PAIRS), "b": Dataset.from_list(PAIRS)}).save_to_disk("odd")
    for path, message in {
        "data/pairs_tran.jsonl": "did you mean data/pairs_train.jsonl",
        "else/where/pairs.jsonl": "the folder else/where does not exist either",
        "../../rm-static-zh": r"download_dataset zwh9029/rm-static-m2m100-zh-jianti --output_dir ../../rm-static-zh",
        "./no/such/folder": "no such file or folder",
        "nothing": "neither a set written by save_to_disk nor data files",
        "odd": r'no split named "train" .found: a, b',
        "local/jsonfile": r"data/train\.json",
        "Smart/Q_A": r"Smart/Q_A\.json",
        "x/local/jsonfile.json": "no such file or folder",
        "x/Smart/Q_A.json": "no such file or folder",
    }.items():
        with pytest.raises(UserError, match=message):
            load(path)


def test_local_sets_and_files_of_their_names(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/train.json", "data/Smart/Q_A.json"):
        write_lines(tmp_path / name, PAIRS)
    for name in ("local/jsonfile", "Smart/Q_A"):
        assert load(name) == {"train": PAIR_RECORDS}  # one file is never its own test set
        named = write_lines(tmp_path / "x" / f"{name}.json", PAIRS[:1])
        assert load(named) == {"train": PAIR_RECORDS[:1]}
    (tmp_path / "data/eval.json").write_text(json.dumps(PAIRS[:1]))
    assert load("local/jsonfile") == {"train": PAIR_RECORDS, "eval": PAIR_RECORDS[:1]}


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What the hub answers: hub.answer is a set or an error, hub.asked the arguments of the calls."""
    monkeypatch.chdir(tmp_path)

    class Hub:
        asked = ()
        answer = ConnectionError("offline")

        def __call__(self, hub_id, config=None, revision=None):
            self.asked += ((hub_id, config, revision),)
            answer = self.answer(revision) if callable(self.answer) else self.answer
            if isinstance(answer, Exception):
                raise answer
            return answer

    hub = Hub()
    monkeypatch.setattr("datasets.load_dataset", hub)
    return hub


TROUBLE = [
    ("Dahoas/rm-static", ConnectionError("x"), r"cannot be reached.*download_dataset Dahoas/rm-static, .*datasets/Dahoas/rm-st"),
    ("mkqa-Chinese", ConnectionError("x"), r"cannot be reached.*download_dataset mkqa-Chinese, .*datasets/mkqa-Chinese"),
    ("some/thing", ConnectionError("x"), r"cannot be reached.*download_dataset some/thing, .*datasets/some/thing"),
    ("stanfordnlp/SPH", ConnectionError("x"), "Did you mean stanfordnlp/SHP"),
    ("a/b", FileNotFoundError("Dataset 'a/b' doesn't exist"), "no public data set on the hub"),
    ("a/b", ValueError("Config name is missing, one of ['main', 'socratic']"), r"'main', 'socratic'.*ID:CONFIG"),
]


@pytest.mark.parametrize("name, error, message", TROUBLE)
def test_hub_troubles(name, error, message, hub, load):
    hub.answer = error
    with pytest.raises(UserError, match=message):
        load(name)


def test_the_installed_client_without_network(load, tmp_path, monkeypatch):
    """The exception that it raises offline is understood (HF_HUB_OFFLINE is set for all tests)."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be reached"):
        load("nobody-here/no-such-set")


def test_configurations_and_loading_scripts(hub, load, tmp_path):
    Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "saved"))
    saved = DatasetDict({"train": Dataset.load_from_disk(str(tmp_path / "saved"))})
    refused = RuntimeError("Dataset scripts are no longer supported, but found b.py")
    hub.answer = lambda revision: saved if revision else refused
    assert load("a/b:main") == {"train": PAIR_RECORDS}
    assert hub.asked == (("a/b", "main", None), ("a/b", "main", "refs/convert/parquet"))


def test_another_owner_is_not_taken_for_the_known_set(hub, load):
    with pytest.raises(UserError):
        load("somebody/rm-static")
    assert hub.asked == (("somebody/rm-static", None, None),)
