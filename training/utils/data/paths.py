"""Check that a --data_path is there and holds records, without the libraries that read it, which take seconds to import."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from errors import UserError, nearest, refuse
from training.utils.data.named_sets import NamedSet, find_named_set, similar_name
from training.utils.data.readers import SUFFIXES, data_suffix, looks_local, read_rows
from training.utils.data.rows import Columns, Reading, refuse_unused, row_format

logger = logging.getLogger("sanbu")


def check_sources(paths: Iterable[str], columns: Columns, ask_hub: bool = True) -> None:
    """Raise UserError for data that check_source refuses, and for --columns that no set has the fields of."""
    read = [check_source(path, ask_hub, columns) for path in paths]
    if None not in read:
        refuse_unused(columns, read)


def check_source(path: str, ask_hub: bool = True, columns: Columns | None = None) -> Reading | None:
    """Return how the first record of a file, or of the one file in a folder, is read; None where only the libraries can tell.

    Raise UserError for a file or folder that is missing or empty, for a first record of no known form, and for a set that the
    hub does not give. ask_hub=False: sets of the hub are not looked up.
    """
    named, local = find_named_set(path), Path(path).expanduser()
    if local.is_file():
        return first_reading(local, named, columns)
    if local.is_dir():
        files = [] if is_saved_set(local) else data_files(local)
        return first_reading(files[0], named, columns) if len(files) == 1 else None
    if named and named.files and not data_suffix(local):
        return first_reading(own_files(path, named)["train"], named, columns)
    check_local(path)
    if ask_hub and not any(map(Path.is_dir, map(download_folder, (path, *(named.names if named else ()))))):
        check_hub(path)
    return None


def first_reading(file: Path, named: NamedSet | None, columns: Columns | None) -> Reading:
    """Return how the first record of a file is read. Raise UserError if there is none, or it has no known form."""
    reading = Reading()
    location, row = next(read_rows(file), (None, {}))
    refuse(location is None, f"{file}: no records in it.")
    row_format(row, named, columns, f"{file}, {location}", reading)
    return reading


def check_local(path: str) -> None:
    """Raise UserError for a file or folder that is not there. Hub ids and named sets are not looked up."""
    named, local = find_named_set(path), Path(path).expanduser()
    if looks_local(path) and not local.exists() and not (named and named.files and not data_suffix(local)):
        raise UserError(_missing_file(path, local, named))


def _missing_file(path: str, local: Path, named: NamedSet | None) -> str:
    if named and not named.files and data_suffix(local) is None:
        return (
            f"--data_path {path}: no such folder. To fetch the set it is named after: "
            f"python -m scripts.download_dataset {named.names[0]} --output_dir {path}"
        )
    siblings = [entry.name for entry in local.parent.iterdir()] if local.parent.is_dir() else []
    if near := nearest(local.name, siblings, 0.6):
        return f"--data_path {path}: no such file or folder; did you mean {local.parent / near}?"
    where = "" if local.parent.is_dir() else f" (the folder {local.parent} does not exist either)"
    return f"--data_path {path}: no such file or folder, seen from {Path.cwd()}{where}."


# --- folders ----------------------------------------------------------------------------------------------------------


def is_saved_set(folder: Path) -> bool:
    """Return whether a folder was written by save_to_disk."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def data_files(folder: Path) -> list[Path]:
    """Return the data files in a folder and below. Raise UserError if there are none."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and data_suffix(file) and file.name[0] not in "._"
        and file.name not in ("dataset_info.json", "dataset_infos.json")
    )
    if not files:
        raise UserError(
            f"{folder}: neither a set written by save_to_disk nor data files in it ({', '.join(SUFFIXES)})."
        )
    return files


def download_folder(name: str) -> Path:
    """Return the folder where scripts.download_dataset puts a set, which is looked for before the hub is asked."""
    return Path("datasets") / name.replace(":", "-")


def own_files(path: str, named: NamedSet) -> dict[str, Path]:
    """Return the files of the user's own that a named set stands for, by split; one file is never its own test set.

    Raise UserError if there is none to train on.
    """
    found = {}
    for split, candidates in named.files.items():
        file = next((file for file in map(Path, candidates) if file.is_file()), None)
        if file is not None:
            found[split] = file
        elif split == "train":
            raise UserError(
                f'--data_path {path}: a local set; put its records, a JSON list of {{"prompt", "chosen", "rejected"}}, '
                f"into {' or '.join(candidates)} of the current folder {Path.cwd()}, or give the path of the file itself."
            )
        else:
            logger.info("%s: no %s, so a share of the set is held out (--eval_fraction).", path, candidates[0])
    return found


# --- the hub ----------------------------------------------------------------------------------------------------------


def hub_name(name: str) -> tuple[str, str | None]:
    """Return the id on the hub and the configuration that a name stands for: a named set, ID or ID:CONFIG."""
    hub_id, _, config = name.partition(":")
    named = find_named_set(name)
    if named and name.lower() in map(str.lower, named.names):  # not somebody else's set of the same last name
        return named.hub_id, named.config
    return hub_id, config or None


def check_hub(path: str) -> None:
    """Raise UserError if the hub cannot be reached or has no such set, and no cache of its may be on the disk."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    hub_id, _ = hub_name(path)
    owner = hub_id.rpartition("/")[0]
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    downloaded = Path(constants.HF_HUB_CACHE, f"datasets--{hub_id.replace('/', '--')}")
    if downloaded.is_dir() or any(prepared.glob(f"{owner}___*" if owner else "*")):
        return
    try:
        HfApi().dataset_info(hub_id, timeout=10)
    except RepositoryNotFoundError:
        raise UserError(hub_trouble(path, FileNotFoundError("or none that this account may see"))) from None
    except HfHubHTTPError:  # the hub is there: what it gives shows when it is read
        return
    except Exception as error:  # of the hub's client, by version: httpx', requests', ConnectionError
        raise UserError(hub_trouble(path, ConnectionError(str(error)))) from error


def hub_trouble(name: str, error: Exception) -> str:
    """Return the sentence for a set that the hub did not give."""
    near = None if find_named_set(name) else similar_name(name)
    hint = f" Did you mean {near}?" if near else ""
    cause = " ".join(str(error).split())[:300]
    if isinstance(error, FileNotFoundError):
        return f"{name}: no file or folder of this name, and no public data set on the hub ({cause}).{hint}"
    if isinstance(error, ConnectionError) or "connect" in cause.lower() or "offline" in cause.lower():
        meant = near or name
        return (
            f"{name}: no file or folder of this name, and the hub cannot be reached.{hint} On a machine with network "
            f"run: python -m scripts.download_dataset {meant}, then copy the folder {download_folder(meant)} to the "
            "same place here."
        )
    return f"{name}: the set on the hub cannot be read ({cause}); ID:CONFIG chooses a configuration.{hint}"
