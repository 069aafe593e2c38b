"""The models that are known by name, and the config of a name, a folder or a config.json."""

import json
import re
from pathlib import Path
from typing import Any

from errors import UserError, nearest
from json_text import parse_json
from models.checkpoint_folder import told_by_transformers
from models.families import FAMILIES
from models.weight_files import check_sizes
from scripts.launch.platforms import ROOT

DEMO = "output/demo"  # what the demo makes; configs/cpu/demo.yaml reads it


class UnknownModel(UserError):
    """A model that is neither known by name nor here."""


def known_models() -> dict[str, dict[str, Any]]:
    """Return the models of configs/model_shapes.json."""
    return json.loads((ROOT / "configs" / "model_shapes.json").read_text(encoding="utf-8"))


def find_config(model: str) -> dict[str, Any]:
    """Return the content of the config.json of a known model, a folder, a file, or a model of the hub that is downloaded.

    Raise UserError for none of these, and for a config.json that no network has.
    """
    path = Path(model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return read_config(path)
    shapes = known_models()
    wanted = model.lower()
    for name, entry in shapes.items():
        if wanted in (name, *map(str.lower, entry["hub"])):
            return entry["config"]
    if downloaded := downloaded_config(model):
        return read_config(downloaded)
    if Path(model).is_relative_to(DEMO):
        demo = "bash scripts/quickstart.sh, or python -m scripts.demo"
        raise UnknownModel(f"model {model}: no such folder; the demo makes it: {demo}.")
    names = ", ".join(shapes)
    if path.parent != Path() and path.parent.is_dir():
        raise UnknownModel(f"model {model}: no config.json there; name a folder with one, or one of {names}.")
    near = nearest(wanted.rsplit("/", 1)[-1], shapes, 0.5)
    hint = f"did you mean {near}?" if near else f"known are {names}."
    ways = "a folder with config.json opens, and what `hf download ID config.json` fetched"
    raise UnknownModel(f"model {model!r} is neither a folder nor known ({ways}); {hint}")


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json. Raise UserError for one of no supported family, or with sizes that no network has."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a config.json ({error}).") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}.")
    check_sizes(content, path)
    return content


def downloaded_config(model: str) -> Path | None:
    """Return the config.json of a model of the hub from the cache of huggingface_hub; None if it is not there."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found) if isinstance(found, str) else None


def config_of(model: str) -> Any:
    """Return transformers' config of a model. Raises UserError as ``find_config`` does, and for what transformers refuses."""
    content = find_config(model)
    import transformers

    from models.chatglm.registration import AnyChatGLMConfig

    transformers.logging.set_verbosity_error()
    fields = {name: value for name, value in content.items() if name != "model_type"}
    with told_by_transformers(Path(model)):
        if content["model_type"] == "chatglm":
            return AnyChatGLMConfig.from_dict(content)
        return transformers.AutoConfig.for_model(content["model_type"], **fields)
