"""The event loop and the thread that runs the model take turns. Both need Python's interpreter lock at every step, and side by
side they spend up to a quarter of their time handing it to each other; a loop that works between two passes disturbs neither.
"""

from __future__ import annotations

import selectors
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 0.005  # seconds that one waits for the other: passes of large models are longer, and leave the lock free meanwhile


class Turns:
    """Whose turn it is. busy: the event loop has something to do. passing: the model's thread has."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.busy, self.passing = True, False

    @contextmanager
    def pass_(self) -> Iterator[None]:
        """Hold the turn of the model's thread, once the event loop has done what came in."""
        with self.changed:
            self.changed.wait_for(lambda: not self.busy, PATIENCE)
            self.passing = True
        try:
            yield
        finally:
            with self.changed:
                self.passing = False
                self.changed.notify()

    def work(self) -> None:
        """Hold the turn of the event loop, once a pass has ended."""
        with self.changed:
            self.changed.wait_for(lambda: not self.passing, PATIENCE)
            self.busy = True

    def rest(self) -> None:
        """Give the turn back: the event loop has nothing to do."""
        with self.changed:
            self.busy = False
            self.changed.notify()


class TurnsSelector(selectors.DefaultSelector):
    """What the event loop waits in; it returns when it is the loop's turn."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.turns = turns

    def select(self, timeout: float | None = None) -> list:
        """Return what is ready, as the selector does, within ``timeout`` seconds."""
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        self.turns.rest()
        events = super().select(timeout)
        self.turns.work()
        return events
