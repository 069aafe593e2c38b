"""Check that a --data_path is there, without the libraries that read it, which take seconds to import."""

from __future__ import annotations

from pathlib import Path

from errors import UserError, nearest
from training.utils.data.named_sets import NamedSet, find_named_set
from training.utils.data.readers import data_suffix, looks_local


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
