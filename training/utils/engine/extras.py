"""Keep what this project knows of an engine in a table of its own, not as attributes of DeepSpeed's object."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


@dataclass
class Extras:
    """Facts of this project that belong to one engine.

    skeleton: the structure of the model, without weights, under ZeRO-3. saturation: the SaturationWatch of a chip that needs
    one. generation_weights: "gathered" or "layerwise", once it was chosen. schedule_steps: the length of the schedule.
    """

    skeleton: nn.Module | None = None
    saturation: Any = None
    generation_weights: str | None = None
    schedule_steps: int = 0


_EXTRAS: WeakKeyDictionary[Any, Extras] = WeakKeyDictionary()


def extras(engine) -> Extras:
    """Return the extras of an engine, or of a plain model; the same object at every call."""
    return _EXTRAS.setdefault(engine, Extras())
