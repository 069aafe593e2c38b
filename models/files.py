"""Small things about the files of a checkpoint, and the sentences for what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

from errors import UserError


def read_json(file: Path, path: str | Path) -> dict:
    """The object in a JSON file of the checkpoint ``path``; UserError if it is missing or broken."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model {path} has no {file.name}; an interrupted save or download leaves such a folder: make it again."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the checkpoint again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; copy the checkpoint again.")
    return content


def first_line(error: Exception) -> str:
    """The first line of an error's text, for a sentence of our own."""
    return str(error).strip().split("\n")[0] or type(error).__name__
