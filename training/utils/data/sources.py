"""Find out what a --data_path is: a data file, a folder, a named set or a set of the hub. Its rows are read elsewhere."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow

from errors import UserError
from training.utils.data.digest import file_digest
from training.utils.data.named_sets import NamedSet, find_named_set
from training.utils.data.paths import (
    check_local,
    data_files,
    download_folder,
    hub_name,
    hub_trouble,
    is_saved_set,
    own_files,
)
from training.utils.data.readers import Row, data_suffix, read_rows

if TYPE_CHECKING:  # datasets, which imports pandas, takes 0.8 s, and most data is in files
    from datasets import Dataset, DatasetDict

logger = logging.getLogger("sanbu")

EVAL_SPLITS = ("eval", "evaluation", "validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class Table:
    """One file, or one split of a saved set. read: starts a new iterator over (location, row). digest: of its content."""

    label: str
    read: Callable[[], Iterator[Row]]
    digest: str


@dataclass(frozen=True)
class Source:
    """The tables behind a path, by split: "train" and perhaps "eval". named: the named set that says how to read them."""

    splits: dict[str, list[Table]]
    named: NamedSet | None = None

    @property
    def content(self) -> list[Any]:
        """Return all that decides which records come out, as JSON values."""
        digests = {split: [table.digest for table in tables] for split, tables in self.splits.items()}
        return [digests, self.named and self.named.names]


def open_source(path: str) -> Source:
    """Find what a path names. Raise UserError if there is no such thing."""
    named = find_named_set(path)
    local = Path(path).expanduser()
    if local.is_file():
        return Source({"train": [file_table(local)]}, named)
    if local.is_dir():
        return Source(_folder_splits(local), named)
    if named and named.files and not data_suffix(local):  # a file that is meant and missing is an error
        files = own_files(path, named)
        return Source({split: [file_table(file)] for split, file in files.items()}, named)
    check_local(path)
    for downloaded in map(download_folder, (path, *(named.names if named else ()))):
        if downloaded.is_dir():
            logger.info("%s: taken from the folder %s", path, downloaded)
            return Source(_folder_splits(downloaded), named)
    return Source(_saved_splits(load_from_hub(path), path), named)


def file_table(path: Path) -> Table:
    """Return the table of a data file."""
    return Table(str(path), partial(read_rows, path), f"{data_suffix(path)} {file_digest(path)}")


# --- the hub ----------------------------------------------------------------------------------------------------------


def load_from_hub(name: str) -> DatasetDict:
    """Return all splits of a set from the hub or its local cache. name: a named set, ID or ID:CONFIG.

    Raise UserError that says how to fetch the set beforehand, if there is no network.
    """
    from datasets import load_dataset

    hub_id, config = hub_name(name)
    try:
        return load_dataset(hub_id, config)
    except Exception as error:  # whatever the hub client raises becomes one sentence; its own words are kept in it
        cause = error
    if "scripts are no longer supported" in str(cause) or "trust_remote_code" in str(cause):
        logger.info("%s has a loading script, which is not run; reading the hub's Parquet copy of it.", hub_id)
        try:
            return load_dataset(hub_id, config, revision="refs/convert/parquet")
        except Exception as error:  # same reason
            cause = error
    raise UserError(hub_trouble(name, cause)) from cause


# --- folders and splits -----------------------------------------------------------------------------------------------


def _folder_splits(folder: Path) -> dict[str, list[Table]]:
    """Read a folder of save_to_disk (one set or several splits), or one of data files named after splits."""
    if is_saved_set(folder):
        from datasets import load_from_disk

        try:
            saved = load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, pyarrow.ArrowInvalid) as error:
            raise UserError(
                f"{folder}: a folder of save_to_disk that cannot be read ({error}); write it again."
            ) from error
        return _saved_splits(saved if isinstance(saved, dict) else {"train": saved}, str(folder))
    files = data_files(folder)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())
        by_split.setdefault(next((word for word in words if word in ("train", *EVAL_SPLITS)), ""), []).append(file)
    unnamed = by_split.pop("", [])  # for training, unless other files say so of themselves
    if unnamed and by_split.setdefault("train", unnamed) is not unnamed:
        listed = ", ".join(str(file.relative_to(folder)) for file in unnamed)
        logger.info("%s: not used, for other files have train in their names: %s", folder, listed)
    names = _chosen_splits(list(by_split), str(folder))
    return {split: [file_table(file) for file in by_split[name]] for split, name in names.items()}


def _saved_splits(saved: dict[str, Dataset], label: str) -> dict[str, list[Table]]:
    return {
        split: [Table(f"{label} ({name})", partial(_dataset_rows, saved[name]), _dataset_digest(saved[name]))]
        for split, name in _chosen_splits(list(saved), label).items()
    }


def _chosen_splits(names: list[str], label: str) -> dict[str, str]:
    """Return {"train": name of a split, "eval": name of another, if there is one}."""
    train = "train" if "train" in names else next((name for name in names if name.startswith("train")), None)
    if train is None and len(names) == 1:
        train = names[0]
    if train is None:
        raise UserError(
            f'{label}: no split named "train" (found: {", ".join(names)}); save the wanted one by itself and give that.'
        )
    held_out = next((name for name in EVAL_SPLITS if name in names and name != train), None)
    ignored = [name for name in names if name not in (train, held_out)]
    if ignored:
        evaluated = held_out or "a share of it"
        logger.info("%s: training on %s, evaluating on %s, not used: %s", label, train, evaluated, ", ".join(ignored))
    return {"train": train, "eval": held_out} if held_out else {"train": train}


def _dataset_rows(dataset: Dataset) -> Iterator[Row]:
    for number, row in enumerate(dataset, start=1):
        yield f"record {number}", row


def _dataset_digest(dataset: Dataset) -> str:
    files = [Path(file["filename"]) for file in dataset.cache_files]
    # Kept in memory (HF_DATASETS_IN_MEMORY_MAX_SIZE) it names no files, and all sets would be one.
    return file_digest(*files) if files else f"in memory {dataset._fingerprint}"
