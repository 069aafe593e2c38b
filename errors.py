"""The one exception that means: the input is wrong, not the program; and how a command line ends on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any


class UserError(Exception):
    """A wrong input, told in one sentence: which file, line or flag, what was found, what was expected, what to do.

    Entry points print it as ``error: <sentence>`` and exit with code 2; no traceback is shown.
    """


def refuse(wrong: object, sentence: str) -> None:
    """Raise UserError with the sentence if something is wrong."""
    if wrong:
        raise UserError(sentence)


def told(main: Callable[..., Any]) -> Callable[..., Any]:
    """main, the body of a command line, with a UserError told on stderr and 2 returned for it."""

    @wraps(main)
    def ending(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2

    return ending
