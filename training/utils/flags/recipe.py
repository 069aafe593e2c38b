"""A YAML recipe: sections of flags, and what they say about the models. Imports neither torch nor transformers."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from steps import SECTIONS as STEP_SECTIONS

SECTIONS = ("launch", *STEP_SECTIONS)


@dataclass(frozen=True)
class Recipe:
    """The sections of a recipe file. A section that the file lacks is not in ``sections``."""

    path: str
    sections: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: str) -> Recipe:
        """Read a recipe with at least one step's section. Raise UserError for a file that is none."""
        content = load_recipe(path)
        if not set(STEP_SECTIONS) & content.keys():
            raise UserError(f"{path}: no section of a step; expected launch and {', '.join(STEP_SECTIONS)} with flags.")
        return cls(path, content)

    @property
    def launch(self) -> dict[str, Any]:
        """The launch section; empty where there is none."""
        return self.sections.get("launch", {})

    def output(self, section: str) -> str:
        """Return the section's output_dir. Raise UserError if the section or the flag is missing."""
        if section not in self.sections:
            raise UserError(f"{self.path} has no section {section}; choose another step, or add the section.")
        folder = self.sections[section].get("output_dir")
        if not folder:
            raise UserError(
                f"{self.path}, {section}: no output_dir; the steps of a recipe find each other's models by it, so give one."
            )
        return str(folder)

    def needs(self, section: str) -> tuple[str, ...]:
        """Return the other sections whose output_dir this section reads models from, in the order of the steps."""
        models = {str(value) for key, value in self.sections[section].items() if key.endswith("model_name_or_path")}
        return tuple(
            other
            for other in STEP_SECTIONS
            if other != section and str(self.sections.get(other, {}).get("output_dir")) in models
        )

    def model_of(self, model: str) -> str:
        """Return what ``model`` starts from: a folder that a section still has to write counts as that section's own model."""
        seen = set()
        while model not in seen and not Path(model).is_dir():
            seen.add(model)
            for values in self.sections.values():
                if str(values.get("output_dir")) == model and values.get("model_name_or_path"):
                    model = str(values["model_name_or_path"])
                    break
        return model


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
