"""Small things about the files of a checkpoint, and the sentences for what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

from errors import UserError

SCALAR = "ForSequenceClassification"  # how the name of a reward model's or critic's class ends


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


def architecture(folder: Path, path: str | Path) -> str:
    """The class of network that the config.json in a folder, named path by the user, says it was saved by: LlamaForCausalLM,
    …; "no architecture named" if none. A name on SCALAR gives scores.
    """
    names = read_json(folder / "config.json", path).get("architectures") or ["no architecture named"]
    return str(names[0])


def first_line(error: Exception) -> str:
    """The first line of an error's text, for a sentence of our own."""
    return str(error).strip().split("\n")[0] or type(error).__name__
