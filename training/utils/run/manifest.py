"""Which folders of checkpoints are whole: the list of their files, with sizes, that is written last. Imports no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError

logger = logging.getLogger("sanbu")

MANIFEST = "checkpoint.json"


def step_name(step: int) -> str:
    """Return the name of a checkpoint's folder; names sort as the steps do."""
    return f"step-{step:08d}"


def whole_checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the checkpoint folders that have a matching manifest, newest first."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_manifest(candidate)
        except UserError as error:
            logger.warning("Passed over: %s", error)
        else:
            yield candidate


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are all there in full size. Raises UserError otherwise."""
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder; name one under output_dir/checkpoints, or use --resume alone.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder} is not a whole checkpoint ({MANIFEST} is missing or cut); resume from an older one.") from error
    for name, size in files:
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{folder} is half-written: {name} is missing or has another size; resume from an older one.")
    return manifest
