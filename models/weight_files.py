"""The files of a checkpoint before anything is loaded: JSON read, weights whole, named rightly, of the kind config.json says.

Only headers are read: of a .safetensors its table, of a .bin the pickles that describe its tensors.
"""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from errors import UserError
from json_text import parse_json

if TYPE_CHECKING:  # torch takes seconds to import, and a wrong folder is told without it
    from torch import Tensor

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PREFIX_FILE = "prefix_only.bin"
OFFICIAL_FILE = "pytorch_model.bin"  # what the original trainer calls it, in its folders checkpoint-N
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_FILES = (PEFT_FILES[1], "adapter_model.bin")
BASE_FIELD = "base_model_name_or_path"
# Sizes in config.json, in the words of all families. Those of OPTIONAL may be null: the family then has a rule for them.
OPTIONAL = ("num_key_value_heads", "head_dim", "n_inner")
SIZES = (
    *("vocab_size", "padded_vocab_size", "hidden_size", "n_embd", "word_embed_proj_dim", "num_hidden_layers", "n_layer"),
    *("num_layers", "num_attention_heads", "n_head", "multi_query_group_num", "kv_channels", "intermediate_size", "ffn_dim"),
    *("inner_hidden_size", "ffn_hidden_size", "max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"),
    *OPTIONAL,
)
# The layers that the int8 and int4 releases of ChatGLM quantise.
QUANTIZED = re.compile(r"\.layers\.\d+\..*\b(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)\.weight$")


def check_weights(folder: Path, path: str | Path, quantization_bit: int | None) -> None:
    """Raise UserError if the weights of the checkpoint ``path`` in ``folder`` are missing, cut, or not what its config says.

    quantization_bit: as config.json has it, None where it has none.
    """
    listing = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if listing is None:
        raise UserError(f"model {path} has no weights (looked for {', '.join(WEIGHTS)}); copy the whole checkpoint.")
    file_of = weight_map(folder / listing) if listing.endswith(".index.json") else {}
    stored = {shard: tensor_names(folder / shard) for shard in dict.fromkeys(file_of.values()) or [listing]}
    absent = sorted(tensor for tensor, shard in file_of.items() if tensor not in stored[shard])
    if absent:
        raise UserError(
            f"{folder / listing} says that {absent[0]} is in {file_of[absent[0]]}, but it is not ({len(absent)} tensors are "
            "missing); index and files are of different checkpoints: copy all of them again."
        )
    check_scales(path, set().union(*stored.values()), quantization_bit)


def load_pickled(file: str | Path, map_location: Any = "cpu", mmap: bool = True) -> Any:
    """Return what torch.save wrote, of tensors and plain values alone; mmap: read tensors on use, where the format allows it.

    Raises UnpicklingError for anything else, and for programs, which torch before 2.6 runs all the same (CVE-2025-32434).
    """
    import torch

    if torch.__version__ < (2, 6) and is_program(file):
        raise UnpicklingError("torch before 2.6 would run what this file holds")
    return torch.load(file, map_location=map_location, mmap=mmap and zipfile.is_zipfile(file), weights_only=True)


def is_program(file: str | Path) -> bool:
    """Return True for what torch.load before 2.6 gives to another reader: a TorchScript archive or a tar file."""
    from torch.serialization import _is_torchscript_zip, _is_zipfile, _open_zipfile_reader

    with Path(file).open("rb") as opened:
        zipped = _is_zipfile(opened)
    if not zipped:
        return tarfile.is_tarfile(file)
    with _open_zipfile_reader(str(file)) as reader:
        return _is_torchscript_zip(reader)


def weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> file, from an index. Raise UserError if the index is broken."""
    content = read_json(index, index.parent).get("weight_map")
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content.values()):
        raise UserError(f'{index} is no index of weights: "weight_map" names no files; copy the checkpoint again.')
    return content


def tensor_names(file: Path) -> set[str]:
    """Return the names of the tensors in a weight file.

    UserError if the file is missing or shorter than its header says, as interrupted downloads leave it.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing, though the index beside it names it; copy the checkpoint again.")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="np") as content:  # "pt" imports torch
                return set(content.keys())
        return set(load_pickled(file, "meta"))
    except Exception as error:  # by format and version: RuntimeError, EOFError, UnpicklingError, SafetensorError, …
        raise UserError(
            f"{file} ({file.stat().st_size} bytes) is truncated, damaged or no file of weights ({first_line(error)}); copy "
            "the checkpoint again."
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's weights; check_weights has found it whole."""
    listing = folder / next(name for name in WEIGHTS if (folder / name).is_file())
    names = set(weight_map(listing).values()) if listing.name.endswith(".index.json") else {listing.name}
    return [folder / name for name in sorted(names)]


def stored_rows(folder: Path, rows: int) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Name, shape and first rows of every tensor of a checkpoint, file by file; check_weights has found it whole."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:
                for name in sorted(content.keys()):
                    part = content.get_slice(name)
                    shape = tuple(part.get_shape())
                    yield name, shape, part[:rows] if shape else content.get_tensor(name)
        else:
            for name, tensor in sorted(load_pickled(file).items()):
                yield name, tuple(tensor.shape), tensor[:rows] if tensor.dim() else tensor


def check_scales(path: str | Path, names: set[str], quantization_bit: int | None) -> None:
    """Raise UserError unless the weights are integers with scales where config.json says so, and floats where it does not."""
    if quantization_bit not in (None, 0, 4, 8):
        raise UserError(
            f"model {path}: config.json says quantization_bit {quantization_bit!r}; 4 and 8 can be read. Copy the "
            "checkpoint again."
        )
    scales = {name for name in names if name.endswith(".weight_scale")}
    if scales and not quantization_bit:
        raise UserError(
            f"model {path} has integer weights ({min(scales)}), but its config.json says no quantization_bit; copy "
            "config.json again."
        )
    if not quantization_bit:
        return
    lacking = sorted(name for name in names if QUANTIZED.search(name) and f"{name}_scale" not in scales)
    if lacking:
        raise UserError(
            f"model {path}: config.json says quantization_bit {quantization_bit}, but {lacking[0]}_scale is not in the "
            f"weights ({len(lacking)} scales are missing): integers mean nothing without their scales. Copy the "
            "checkpoint again; if its weights are floating, set quantization_bit to 0 in config.json."
        )


def base_named_in(folder: Path) -> tuple[Path, str] | None:
    """Return the file that names the base of a folder with nothing but a prefix, and the name; None for any other folder.

    Raises UserError if the file names none.
    """
    if any((folder / name).is_file() for name in WEIGHTS):
        return None
    if (folder / PREFIX_FILE).is_file():
        file = folder / "config.json"
    elif all((folder / name).is_file() for name in PEFT_FILES):
        file = folder / PEFT_FILES[0]
        if read_json(file, folder).get("peft_type") != "PREFIX_TUNING":
            return None
    else:
        return None
    base = read_json(file, folder).get(BASE_FIELD)
    if not isinstance(base, str) or not base:
        raise UserError(
            f'{file} does not say which model this prefix belongs to; add "{BASE_FIELD}": the folder or hub id of the '
            "model that it was trained on."
        )
    return file, base


# --- small things -----------------------------------------------------------------------------------------------------


def read_json(file: Path, path: str | Path) -> dict:
    """Return the object in a JSON file of the checkpoint ``path``; UserError if it is missing or broken."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model {path} has no {file.name}; an interrupted save or download leaves such a folder: make it again."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the checkpoint again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; copy the checkpoint again.")
    return content


def check_sizes(content: dict[str, Any], file: Path) -> None:
    """Raise UserError for a size in config.json that no network has: zero heads, no vocabulary, 10^30 positions."""
    for name in SIZES:
        value = content.get(name, 1)
        right = type(value) is int and 0 < value < 2**31
        if not right and not (value is None and name in OPTIONAL):
            shown = json.dumps(value)[:40]
            raise UserError(f"{file}: {name} is {shown}, no size of a network; correct it, or copy the file again.")
    names = content.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{file}: architectures is {json.dumps(names)[:40]}, no list of names; correct it, or copy the file again.")
    heads, groups = content.get("num_attention_heads"), content.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise UserError(f"{file}: {heads} num_attention_heads cannot share {groups} num_key_value_heads evenly; correct it.")


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, for a sentence of our own."""
    return str(error).strip().split("\n")[0] or type(error).__name__
