"""Short passes of the model run in the thread of the event loop, when nothing has come in. In a thread of their own both would
need Python's interpreter lock at every step and find the processor's caches cold at every change.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable

PATIENCE = 0.005  # seconds after which a pass begins though something comes in all the time


class TurnsSelector(selectors.DefaultSelector):
    """What the event loop waits in. pass_here: runs a pass in this thread, if one is due here; returns whether it did."""

    def __init__(self, pass_here: Callable[[], bool]) -> None:
        super().__init__()
        self.pass_here, self.begun = pass_here, time.monotonic()  # when the loop's turn began

    def select(self, timeout: float | None = None) -> list:
        """Return what is ready, as the selector does, within ``timeout`` seconds; or run a pass where the loop would wait."""
        events = super().select(0)
        busy = bool(events) or (timeout is not None and timeout <= 0)
        if busy and time.monotonic() - self.begun < PATIENCE:
            return events
        if not self.pass_here() and not busy:
            events = super().select(timeout)
        self.begun = time.monotonic()
        return events
