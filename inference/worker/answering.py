"""A worker claims as many questions as it has places free, keeps their leases, and writes the answers back."""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy import Engine

from errors import UserError, refuse
from inference.worker.table import Claim, claim, finish, patient, renew, storable

logger = logging.getLogger("sanbu")


@dataclass(frozen=True)
class Settings:
    """Settings of a worker. max_batch: answers in work at a time. lease: seconds after which the questions of a killed worker
    come back. tries: claims after which a question has failed. turns: of the session that are its history. poll: seconds
    between looks at the table. retry: seconds for a database that does not answer. kind: bot_type and sub_type to keep to.
    """

    max_batch: int = 16
    lease: float = 60.0
    tries: int = 3
    turns: int = 3
    poll: float = 0.5
    retry: float = 60.0
    kind: dict[str, str] = field(default_factory=dict)


class Worker:
    """Answers questions of a database.

    answer: called in up to max_batch threads at a time. A UserError of it is why the question fails; after any other error
    the question goes back to the table. held: questions in work. lost: errors of the latter kind since the last answer.
    """

    def __init__(self, engine: Engine, answer: Callable[[Claim], str], settings: Settings) -> None:
        self.engine, self.answer, self.settings = engine, answer, settings
        self.name = f"{socket.gethostname()[:80]}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.held: dict[Future[str], Claim] = {}
        self.lost, self.renewed = 0, time.monotonic()

    def run(self, stop: threading.Event) -> None:
        """Answer until ``stop`` is set, and then those in work. UserError if the database stays away, or answers fail on and on."""
        settings = self.settings
        with ThreadPoolExecutor(settings.max_batch, thread_name_prefix="question") as pool:
            while self.held or not stop.is_set():
                room = 0 if stop.is_set() else settings.max_batch - len(self.held)
                if room:
                    for one in self.patient(
                        claim, self.name, room, lease=settings.lease, tries=settings.tries, turns=settings.turns, kind=settings.kind
                    ):
                        self.held[pool.submit(self.answer, one)] = one
                if self.held:
                    wait(self.held, timeout=settings.poll, return_when=FIRST_COMPLETED)
                    self.write_back()
                else:
                    stop.wait(settings.poll)

    def patient(self, function: Callable[..., Any], *words: Any, **options: Any) -> Any:
        """Call a function of the table until the database answers."""
        return patient(partial(function, self.engine, *words, **options), self.engine, self.settings.retry)

    def write_back(self) -> None:
        """Write what is answered, all in one transaction, and hold the rest for another lease where it is time."""
        ended = [(self.held.pop(future), future) for future in list(self.held) if future.done()]
        outcomes = [(one, self.outcome(one, future)) for one, future in ended]
        missed = self.patient(finish, self.name, outcomes) if outcomes else []
        for one, values in outcomes:
            told = "not written: another worker has taken it" if one in missed else values["status"]
            logger.info("question %d session=%s attempt=%d %s", one.id, one.session, one.attempt, told)
        if self.held and time.monotonic() - self.renewed > self.settings.lease / 3:
            self.renewed = time.monotonic()
            self.patient(renew, self.name, list(self.held.values()), self.settings.lease)
        # A driver that fails fails always: such a worker would use up the tries of every question there is.
        refuse(self.lost >= 2 * self.settings.max_batch, f"The last {self.lost} answers failed; the log says why.")

    def outcome(self, one: Claim, future: Future[str]) -> dict[str, Any]:
        """Return what is written of a question that ended."""
        try:
            text = storable(future.result())
        except UserError as error:
            return {"status": "failed", "error": str(error)}
        except Exception as error:
            logger.exception("question %d", one.id)
            self.lost += 1
            status = "pending" if one.attempt < self.settings.tries else "failed"
            return {"status": status, "error": storable(f"{type(error).__name__}: {error}")[:1000]}
        self.lost = 0
        return {"status": "done", "answer": text, "error": None}
