"""A YAML recipe as it lies on disk: sections of flags. Imports neither torch nor transformers: launchers read it too."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from errors import UserError
from training.utils.flags.steps import STEPS

SECTIONS = ("launch", *(step.section for step in STEPS))


def load_recipe(path: str) -> dict[str, Any]:
    """The content of a YAML recipe. UserError if it cannot be read or has another form than sections of flags."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; name an existing YAML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not a UTF-8 text file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected flags as `name: value`, or the sections {', '.join(SECTIONS)}.")
    for key, value in content.items():
        nested = isinstance(value, dict) and key != "columns"
        if key in SECTIONS and value is None:
            content[key] = {}
        elif key in SECTIONS and not nested:
            raise UserError(f"{path}: the section {key} must hold flags as `name: value`.")
        elif key not in SECTIONS and (nested or set(SECTIONS) & content.keys()):
            near = difflib.get_close_matches(str(key), SECTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(SECTIONS)}."
            raise UserError(f"{path}: no section {key}; {hint}")
    return content
