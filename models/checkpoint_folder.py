"""A checkpoint's folder before anything is loaded: where it is, and the sentences for what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path

from errors import UserError
from models.adapters.prefix import (
    BASE_FIELD,
    base_named_in,
)
from models.families import FAMILIES
from models.files import read_json
from models.weight_files import WEIGHTS, check_weights


def resolve_checkpoint(path: str | Path) -> Path:
    """A folder, or the id of a model on the hub -> the folder with its files. UserError if there is none."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"model {path} is a file; name the folder that holds its config.json and weights.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise UserError(f"model folder {path} does not exist; name a folder with config.json and weights, or a hub id.")
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
    try:
        found = Path(snapshot_download(str(path), allow_patterns=files))
        if not any((found / name).exists() for name in WEIGHTS[:2]):
            found = Path(snapshot_download(str(path), allow_patterns=[*files, "*.bin"]))
    except Exception as error:  # the hub's client raises its own, requests', httpx' and OSError, by version
        raise UserError(
            f"model {path} is no folder here, and the hub did not give it ({type(error).__name__}); where there is "
            f"network, run `hf download {path} --local-dir FOLDER` and pass FOLDER, or correct the name."
        ) from error
    return found


def check_checkpoint(path: str | Path) -> Path:
    """The folder with the weights of a checkpoint that can be loaded; UserError says what is missing. Reads no weights,
    only their headers. For a folder with nothing but a prefix it is the folder of the model that the prefix belongs to.
    """
    folder = resolve_checkpoint(path)
    config = read_json(folder / "config.json", path)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"model {path} is of type {model_type!r}, which is not supported; supported: {', '.join(FAMILIES)}."
        )
    named = base_named_in(folder)
    if named is not None:
        file, base = named
        try:
            whole = resolve_checkpoint(base)
            if base_named_in(whole) is not None:
                raise UserError("it holds a prefix itself, not a model")
            return check_checkpoint(whole)
        except UserError as error:
            raise UserError(
                f'{file}: "{BASE_FIELD}" names {base}, which does not open: {str(error).rstrip(".")}. Put the folder '
                "there, or correct that field."
            ) from error
    check_weights(folder, path, config.get("quantization_bit"))
    return folder
