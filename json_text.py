"""JSON that others wrote."""

from __future__ import annotations

import json
from typing import Any


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these names and values, as object_pairs_hook. Raise ValueError for a name that is there twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the name "{twice}" stands twice in one object; keep one of them')
    return made


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Return the content of a JSON text; options are those of json.loads. Raise ValueError for what is none.

    json.loads has a RecursionError where a text is nested too deep.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deep") from None
