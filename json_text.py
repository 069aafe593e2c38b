"""JSON that others wrote."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Return the content of a JSON text; options are those of json.loads. Raise ValueError for what is none.

    json.loads has a RecursionError where a text is nested too deep.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deep") from None
