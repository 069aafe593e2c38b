"""Is a step done, and as it is asked for now? For train.py and the pods, which skip what is done."""

import json
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from json_text import parse_json
from training.utils.run.environment import DONE, data_paths, describe_inputs

COMPARED = ("max_steps", "num_train_epochs", "reward_endpoint")  # they may differ in a run that is resumed, not in one that is done


def read_done(folder: Path) -> dict[str, Any] | None:
    """Return what a step wrote into its output folder when it had ended well; None if it has not."""
    try:
        done = parse_json((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return done if isinstance(done, dict) and isinstance(done.get("flags", {}), dict) else None


def differences(args: Any, done: dict[str, Any]) -> str:
    """Return what a finished step was made with that is not asked for now, "" for nothing: flags, data files, models, code.

    Facts that it did not write down are not compared. A flag that is "auto" now was settled by the run.
    """
    asked, flags = json.loads(json.dumps(asdict(args), default=str)), done.get("flags", {})
    names = [one.name for one in fields(args) if one.metadata["resume"] != "free" or one.name in COMPARED]
    changed = [name for name in names if name in flags and asked[name] != "auto"]
    changed = [name for name in changed if as_paths(asked[name]) != as_paths(flags[name])]
    found = [f"--{name} is {shown(asked[name])} now and was {shown(flags[name])}" for name in changed]
    inputs = describe_inputs(args)
    if not {"data_path", "sft_only_data_path"} & set(changed):
        triples = zip(data_paths(args), done.get("data", []), inputs["data"], strict=False)
        found += [f"{path} has another content now" for path, old, new in triples if old and new and old != new]
    made_of = done.get("models", {})
    for role, path in args.models.items():
        known = inputs["models"][role] and made_of.get(role) and not any(name.endswith("model_name_or_path") for name in changed)
        found += [f"{path} has other weights now"] * bool(known and inputs["models"][role] != made_of[role])
    found += ["the program's code is another now"] * (done.get("code", inputs["code"]) != inputs["code"])
    return "; ".join(found)


def done_otherwise(title: str, folder: Path, different: str) -> str:
    """Return the sentence for a step that is done, but not as it is asked for now."""
    return f"{title} in {folder} was done otherwise: {different}."


def as_paths(value: Any) -> Any:
    """Return a flag's value with its texts as absolute paths: ./a.json is a.json."""
    if isinstance(value, list):
        return [as_paths(one) for one in value]
    return Path.cwd() / value if isinstance(value, str) else value


def shown(value: Any) -> str:
    """Return a flag's value as a command line has it."""
    return shlex.join(map(str, value)) if isinstance(value, list) else str(value)
