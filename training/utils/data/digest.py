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


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in a folder, in order."""
    return sorted(file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))


def sampled_digest(*files: Path, places: int = 64, length: int = 4096) -> str:
    """Return a hash of the names, the sizes and pieces of the content of files, so many of length bytes in each, evenly spread.

    For weights, of which a training changes nearly every byte: 13 GB take milliseconds. Raise UserError as file_digest.
    """
    state = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            size = path.stat().st_size
            state.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for place in range(places):
                    file.seek(max(size - length, 0) * place // (places - 1))
                    state.update(file.read(length))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return state.hexdigest()
