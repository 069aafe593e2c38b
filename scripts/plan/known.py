"""The models that are known by name, and the config of a name, a folder or a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from errors import UserError, nearest
from models.families import FAMILIES
from scripts.launch.platforms import ROOT

DEMO = "output/demo"  # what the demo makes; configs/cpu/demo.yaml reads it


class UnknownModel(UserError):
    """A model that is neither known by name nor here."""


def known_models() -> dict[str, dict[str, Any]]:
    """Return the models of configs/model_shapes.json."""
    return json.loads((ROOT / "configs" / "model_shapes.json").read_text(encoding="utf-8"))


def find_config(model: str) -> dict[str, Any]:
    """Return the content of the config.json of a known model, a folder or a file. Raise UserError for none of these."""
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: not a config.json ({error}).") from error
        kind = content.get("model_type") if isinstance(content, dict) else None
        if kind not in FAMILIES:
            raise UserError(f"{path}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}.")
        return content
    shapes = known_models()
    wanted = model.lower()
    for name, entry in shapes.items():
        if wanted in (name, *map(str.lower, entry["hub"])):
            return entry["config"]
    if Path(model).is_relative_to(DEMO):
        demo = "bash scripts/quickstart.sh, or python -m scripts.demo"
        raise UnknownModel(f"model {model}: no such folder; the demo makes it: {demo}.")
    if path.parent != Path() and path.parent.is_dir():
        raise UnknownModel(f"model {model}: no config.json there; name a folder with one, or one of {', '.join(shapes)}.")
    near = nearest(wanted.rsplit("/", 1)[-1], shapes, 0.5)
    hint = f" Did you mean {near}?" if near else ""
    raise UnknownModel(f"model {model!r} is neither a folder nor known; known are {', '.join(shapes)}.{hint}")


def config_of(model: str) -> Any:
    """Return transformers' config of a model. Raises UserError as ``find_config`` does."""
    content = find_config(model)
    import transformers

    from models.chatglm.configuration import chatglm_config_class

    transformers.logging.set_verbosity_error()
    fields = {name: value for name, value in content.items() if name != "model_type"}
    if content["model_type"] == "chatglm":
        return chatglm_config_class(content)(**fields)
    return transformers.AutoConfig.for_model(content["model_type"], **fields)
