"""Hashes of files. Imports nothing heavy: train.py compares data with them before torch is needed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from errors import UserError


def file_digest(*files: Path) -> str:
    """Return a hash of the content of files, one behind the other. Raise UserError for one that cannot be read."""
    state = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    state.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return state.hexdigest()
