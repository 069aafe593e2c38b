"""The models that are known by name, and the config of a name, a folder or a config.json."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.launch.platforms import ROOT


class UnknownModel(UserError):
    """A model that is neither known by name nor here."""


def known_models() -> dict[str, dict[str, Any]]:
    """Return the models of configs/model_shapes.json."""
    return json.loads((ROOT / "configs" / "model_shapes.json").read_text(encoding="utf-8"))


def config_of(model: str) -> Any:
    """Return the config of a known model, a folder or a config.json. Raise UserError for none of these, with a near name."""
    from models.families import FAMILIES

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
        return config_from(content)
    shapes = known_models()
    wanted = model.lower()
    for name, entry in shapes.items():
        if wanted in (name, *map(str.lower, entry["hub"])):
            return config_from(entry["config"])
    if path.parent != Path() and path.parent.is_dir():
        raise UnknownModel(f"model {model}: no config.json there; name a folder with one, or one of {', '.join(shapes)}.")
    near = difflib.get_close_matches(wanted.rsplit("/", 1)[-1], shapes, 1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UnknownModel(f"model {model!r} is neither a folder nor known; known are {', '.join(shapes)}.{hint}")


def config_from(content: dict[str, Any]) -> Any:
    """Return the config with the fields of a config.json."""
    import transformers

    import models  # noqa: F401  (registers ChatGLM)
    from models.chatglm.configuration import chatglm_config_class

    transformers.logging.set_verbosity_error()
    fields = {name: value for name, value in content.items() if name != "model_type"}
    if content["model_type"] == "chatglm":
        return chatglm_config_class(content)(**fields)
    return transformers.AutoConfig.for_model(content["model_type"], **fields)
