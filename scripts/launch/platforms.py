"""The machines of configs/platforms.yaml: how many devices, which backend, which environment. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[2]
PLATFORMS_FILE = ROOT / "configs" / "platforms.yaml"


@dataclass(frozen=True)
class MachineKind:
    """A kind of machine (a platform); the comments at the top of configs/platforms.yaml say what the fields mean."""

    name: str
    title: str
    deployment: str  # cpu | single_gpu | single_node | multi_node
    accelerator: str  # cuda | npu | cpu
    backend: str  # nccl | hccl | gloo
    nodes: int
    devices: int  # of one node
    device_memory_gib: float
    host_memory_gib: float
    dtype: str  # bf16 | fp16 | fp32
    attention: str  # eager | sdpa
    visible_devices: str  # name of the variable; "" where there is none
    kubernetes: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)  # DS_ACCELERATOR included
    env_several_nodes: dict[str, str] = field(default_factory=dict)


@lru_cache(maxsize=1)
def _read() -> dict[str, Any]:
    return yaml.safe_load(PLATFORMS_FILE.read_text(encoding="utf-8"))


def load_platforms() -> dict[str, MachineKind]:
    """Return all platforms by name, in the order of the file. Raise UserError for an entry that is not one."""
    known = {one.name for one in fields(MachineKind)} - {"name"}
    platforms = {}
    for name, entry in _read().items():
        if name == "variables":
            continue
        if different := known ^ entry.keys():
            raise UserError(f"{PLATFORMS_FILE}, {name}: keys that are missing or unknown: {', '.join(sorted(different))}.")
        environments = {
            key: {variable: str(value) for variable, value in entry[key].items()} for key in ("env", "env_several_nodes")
        }
        environments["env"] = {"DS_ACCELERATOR": entry["accelerator"], **environments["env"]}
        platforms[name] = MachineKind(name=name, **{**entry, **environments})
    return platforms


def variable_reasons() -> dict[str, str]:
    """Return why the variables of the platforms are set: name -> half a sentence."""
    return dict(_read()["variables"])


def platform_named(name: str) -> MachineKind:
    """Return the platform of that name. Raise UserError that lists what exists."""
    platforms = load_platforms()
    if name not in platforms:
        raise UserError(f"{name!r} is no platform{did_you_mean(name, platforms)}; there are {', '.join(platforms)}.")
    return platforms[name]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean X?)`` for a near miss, else nothing."""
    near = nearest(str(word), known, 0.6)
    return f" (did you mean {near}?)" if near else ""
