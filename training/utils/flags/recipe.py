"""A YAML recipe: sections of flags, and what they say about the models. Imports neither torch nor transformers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError, nearest
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

    def inputs(self, section: str) -> list[str]:
        """Return the output_dir of the other sections that this section reads models from, in the order of the steps."""
        models = {str(value) for key, value in self.sections[section].items() if key.endswith("model_name_or_path")}
        folders = [str(self.sections.get(other, {}).get("output_dir")) for other in STEP_SECTIONS if other != section]
        return [folder for folder in folders if folder in models]

    def model_of(self, model: str) -> str:
        """Return what ``model`` starts from: a folder that a section still has to write counts as that section's own model."""
        seen = set()
        while model not in seen and not Path(model).is_dir():
            seen.add(model)
            for values in self.sections.values():
                start = values.get("model_name_or_path") or values.get("actor_model_name_or_path")
                if str(values.get("output_dir")) == model and start:
                    model = str(start)
                    break
        return model


def load_recipe(path: str) -> dict[str, Any]:
    """Return the content of a YAML recipe: sections of flags, or flags alone.

    A recipe may serve several platforms: shared sections, and under ``platforms`` the flags that each platform changes or
    adds. FOLDER/PLATFORM/MODEL.yaml, where no such file exists, reads FOLDER/MODEL.yaml as PLATFORM does: the platform's
    flags win over the shared ones, and launch.platform is PLATFORM. Raise UserError for a file that cannot be read or has
    another form.
    """
    file, platform = recipe_file(path) or (Path(path), None)
    content = _read_yaml(path, file)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected flags as `name: value`, or the sections {', '.join(SECTIONS)}.")
    platforms = content.pop("platforms", None)
    if platforms is None:
        return _checked_sections(path, content)
    if not isinstance(platforms, dict) or not all(isinstance(changes, dict) for changes in platforms.values()):
        raise UserError(f"{path}: platforms must hold a platform's name with its sections, or {{}} where it changes nothing.")
    if platform not in platforms:
        example = Path(path).parent / next(iter(platforms), "PLATFORM") / Path(path).name
        raise UserError(f"{path} serves the platforms {', '.join(platforms)}; name one of them in the path: --config {example}.")
    shared = _checked_sections(path, content)
    changes = _checked_sections(f"{path}, platforms, {platform}", {**platforms[platform]})
    merged = {key: shared.get(key, {}) | changes.get(key, {}) for key in SECTIONS if key in shared or key in changes}
    return {"launch": {}, **merged} | {"launch": {"platform": platform} | merged.get("launch", {})}


def recipe_file(path: str | Path) -> tuple[Path, str | None] | None:
    """Return the file that a recipe's path stands for, and the platform to read it for; None where there is none."""
    path = Path(path)
    if path.is_file():
        return path, None
    shared = path.parent.parent / path.name
    if path.parent.name and shared.is_file() and path.parent.name in _platforms_of(shared):
        return shared, path.parent.name
    return None


def recipes_of(folder: Path, platform: str) -> list[Path]:
    """Return the paths FOLDER/PLATFORM/MODEL.yaml that load_recipe reads, sorted; not all of them are files of their own."""
    shared = [folder / platform / file.name for file in folder.glob("*.yaml") if platform in _platforms_of(file)]
    return sorted({*shared, *(folder / platform).glob("*.yaml")})


def _platforms_of(file: Path) -> list[str]:
    """Return the platforms that a file of recipes serves; found by their lines, because reading YAML takes a tenth of a second."""
    try:
        _, _, text = file.read_text(encoding="utf-8").partition("\nplatforms:")
    except (OSError, UnicodeDecodeError):
        return []
    return re.findall(r"^  ([\w.-]+):", text, re.MULTILINE)


def _read_yaml(path: str, file: Path) -> Any:
    """Return the content of a YAML file; ``path`` is how the user named it."""
    from yaml_text import parse_yaml  # yaml is imported only where there is some

    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; name an existing YAML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not a UTF-8 text file.") from error
    contents = parse_yaml(text, path)
    if len(contents) > 1:
        raise UserError(f"{path}: {len(contents)} documents, apart by ---; a recipe is one.")
    return contents[0] if contents else None


def _checked_sections(path: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with {} for an empty section. Raise UserError for an unknown section or one that holds no flags."""
    checked = {}
    for key, value in content.items():
        nested = isinstance(value, dict) and key != "columns"
        if key in SECTIONS and value is not None and not nested:
            raise UserError(f"{path}: the section {key} must hold flags as `name: value`.")
        if key not in SECTIONS and (nested or set(SECTIONS) & content.keys()):
            near = nearest(str(key), SECTIONS, cutoff=0.6)
            hint = f"did you mean {near}?" if near else f"sections are {', '.join(SECTIONS)}."
            raise UserError(f"{path}: no section {key}; {hint}")
        checked[key] = {} if key in SECTIONS and value is None else value
    return checked
