"""Folders with the published tokenizers of ChatGLM, as they lie in a checkpoint, and their golden data."""

import json
import shutil
from pathlib import Path
from typing import Any

GENERATIONS = {"chatglm": "chatglm-6b", "chatglm2": "chatglm2-6b", "chatglm3": "chatglm3-6b"}


def tokenizer_folder(folder: Path, shared_dir: Path, version: str) -> Path:
    """The tokenizer's files and the published config.json in ``folder``; ChatGLM3's vocabulary is ChatGLM2's."""
    golden = shared_dir / "golden"
    shutil.copytree(golden / GENERATIONS[version] / "tokenizer", folder, dirs_exist_ok=True)
    shutil.copy(golden / GENERATIONS[version] / "official" / "config.json", folder)
    if version == "chatglm3":
        shutil.copy(golden / "chatglm2-6b" / "tokenizer" / "tokenizer.model", folder)
    return folder


def golden(shared_dir: Path, version: str, name: str) -> dict[str, Any]:
    """The content of <name>_golden.json of a generation."""
    file = shared_dir / "golden" / GENERATIONS[version] / f"{name}_golden.json"
    return json.loads(file.read_text(encoding="utf-8"))


def change_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes one out."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
