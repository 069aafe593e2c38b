"""What scripts.download_dataset writes is what --data_path then finds, without asking the hub."""

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from scripts import download_dataset
from scripts.download_dataset import download, main
from training.utils.data.records import load_records

ROW = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " A", "rejected": " B"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one set of two splits; returns what it was asked for."""
    saved = DatasetDict({"train": Dataset.from_list([ROW, ROW]), "test": Dataset.from_list([ROW])})
    saved.save_to_disk(str(tmp_path / "hub"))
    asked = []

    def load(hub_id, config=None):
        asked.append((hub_id, config))
        return load_from_disk(str(tmp_path / "hub"))

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(download_dataset, "check_hub", lambda name: None)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return asked


def test_download_then_train_without_network(hub, monkeypatch, tmp_path, capsys):
    main(["Dahoas/rm-static"])
    assert hub == [("Dahoas/rm-static", None)]
    assert (
        "datasets/Dahoas/rm-static: train 2, test 1 records. Use it with --data_path Dahoas/rm-static"
        in capsys.readouterr().out
    )

    def no_network(*_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    for path in ("Dahoas/rm-static", "rm-static", "datasets/Dahoas/rm-static", "./datasets/Dahoas/rm-static"):
        found = load_records(path, cache_dir=str(tmp_path / "cache"))
        assert {part: len(rows) for part, rows in found.items()} == {"train": 2, "eval": 1}


def test_configuration_and_named_set(hub, tmp_path, capsys):
    main(["openai/gsm8k:main"])
    main(["mkqa-Chinese", "--output-dir", "elsewhere/mkqa-Chinese"])
    assert hub == [("openai/gsm8k", "main"), ("apple/mkqa", None)]
    assert len(load_records("openai/gsm8k:main", cache_dir=str(tmp_path / "cache"))["train"]) == 2
    assert "--data_path elsewhere/mkqa-Chinese" in capsys.readouterr().out


def test_a_folder_is_never_overwritten(hub, capsys):
    assert main(["a/b"]) == 0
    assert main(["a/b"]) == 2
    assert "error: datasets/a/b: already there" in capsys.readouterr().err
    assert len(hub) == 1  # told before the download


def test_an_interrupted_save_leaves_nothing(hub, monkeypatch, tmp_path):
    def full(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(DatasetDict, "save_to_disk", full)
    with pytest.raises(KeyboardInterrupt):
        download("a/b")
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    monkeypatch.undo()


def test_no_network(monkeypatch, tmp_path, capsys):
    """The real client, offline: exit code 2 and one line."""
    monkeypatch.chdir(tmp_path)
    assert main(["nobody-here/no-such-set"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: nobody-here/no-such-set: ") and "\n" not in error
