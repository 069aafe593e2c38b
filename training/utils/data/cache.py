"""Keep prepared data on disk: Arrow files in folders named by a hash of everything that makes their content.

A folder cannot go stale, for its name covers data, settings and code. One process builds it under a file lock and moves it
into place at once; the others wait and open it, memory-mapped. It is checked when it is opened, and built again if damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import torch.distributed as dist
from filelock import FileLock

from errors import UserError
from json_text import parse_json
from training.utils.data.arrow_rows import ArrowRows, read_arrow
from training.utils.data.digest import file_digest

logger = logging.getLogger("sanbu")

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class CachedData:
    """A finished folder: its data sets by name, what its builder told about them, a hash of the files."""

    datasets: dict[str, ArrowRows]
    report: Any
    fingerprint: str
    folder: Path

    @property
    def train(self) -> ArrowRows:
        """Return the data to train on."""
        return self.datasets["train"]

    @property
    def eval(self) -> ArrowRows:
        """Return the held-out data."""
        return self.datasets["eval"]


def cached(
    kind: str,
    content: Sequence[Any],
    names: Sequence[str],
    build: Callable[[Path], Any],
    cache_dir: str | None = None,
    rebuild_id: str | None = None,
) -> CachedData:
    """Open the folder of the cache for this content; where there is none, one process builds it.

    kind: "records" or "tokens". content: all that decides what is in the folder, as JSON values; the code is added here.
    build: writes NAME.arrow for each of names into the folder it is given and returns what is to be kept about them, as
    JSON values. rebuild_id: see new_rebuild_id; a folder that was not built under this id is built again.
    """
    folder = cache_folder(cache_dir) / kind / digest(*content, code_digest())
    found = _open(folder) if rebuild_id is None else None
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{folder}.lock"):
            found = _open(folder, rebuild_id)  # whoever comes second finds the work done
            if found is None:
                _build(folder, names, build, rebuild_id)
                found = _open(folder)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be used ({error}); name another with --cache_dir or SANBU_CACHE."
        ) from error
    if found is None:
        raise UserError(f"{folder} reads back differently from what was written; the disk is at fault (--cache_dir).")
    return found


def cache_folder(cache_dir: str | None = None) -> Path:
    """Return the argument, else SANBU_CACHE, else $XDG_CACHE_HOME/sanbu, else ~/.cache/sanbu."""
    chosen = cache_dir or os.environ.get("SANBU_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sanbu"


def new_rebuild_id() -> str:
    """Return a name for one --rebuild_cache, the same in all processes of a torch.distributed job, so that they build once."""
    made = [uuid.uuid4().hex]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(made, src=0)
    return made[0]


# --- what a folder's name is made of ----------------------------------------------------------------------------------


def digest(*values: Any) -> str:
    """Return a hash of JSON values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def code_files() -> list[Path]:
    """Return the files between a data file and its tokens: this folder, the templates, ChatGLM's folder."""
    models = Path(__file__).parents[3] / "models"
    templates = [models / name for name in ("templates.py", "tool_calls.py")]
    return sorted([*Path(__file__).parent.glob("*.py"), *templates, *models.glob("chatglm/*.py")])


def code_digest() -> str:
    """Return a hash of code_files. A version number would be simpler, but whoever changes a format forgets to raise it."""
    return file_digest(*code_files())


# --- a folder ---------------------------------------------------------------------------------------------------------


def _build(folder: Path, names: Sequence[str], build: Callable[[Path], Any], rebuild_id: str | None) -> None:
    """Make a new folder, then move it into place. The caller holds the lock."""
    building, old = (folder.with_name(f".{folder.name}.{name}") for name in ("building", "old"))
    for left in (building, old):  # by a killed run
        shutil.rmtree(left, ignore_errors=True)
    building.mkdir(mode=0o700)
    try:
        report = build(building)
        files = {f"{name}.arrow": file_digest(building / f"{name}.arrow") for name in names}
        manifest = {"report": report, "files": files, "rebuild_id": rebuild_id}
        (building / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=2), encoding="utf-8")
        if folder.exists():  # damaged, or not wanted; a process that has it open keeps its files
            folder.replace(old)
        building.replace(folder)
    finally:
        for left in (building, old):
            shutil.rmtree(left, ignore_errors=True)


def _open(folder: Path, rebuild_id: str | None = None) -> CachedData | None:
    """Return the data of a finished folder; None if there is none, it is damaged or was not built under rebuild_id."""
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        if rebuild_id is not None and manifest["rebuild_id"] != rebuild_id:
            return None
        files = manifest["files"]
        for name, expected in files.items():
            if file_digest(folder / name) != expected:
                raise ValueError(f"{name} is not what was written")
        opened = {Path(name).stem: read_arrow(folder / name) for name in files}
        fingerprint = hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest()
        return CachedData(opened, manifest["report"], fingerprint, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError, pyarrow.ArrowException) as error:
        if folder.exists():
            logger.warning("The cache %s is damaged (%s): building it again.", folder, error)
        return None
