"""A model with the threads that answer and encode, and what all requests share."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from errors import nearest
from inference.scheduler import PROMPT_CACHE, Answer, Busy, Scheduler, Stopping
from inference.scores import Scorer, Scoring
from inference.served import ServedModel
from inference.server.protocol import Question, Refusal

SHORT = 1024  # bytes of a request: encoding them takes 1 ms at most, as long as to wake another thread and be woken by it
# Weights: one core takes 5 ms for a pass over the next tokens of 16 short answers, 18 ms behind 900 tokens each, and 80 ms for one
# that reads 512 more.
SMALL = 2**22
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


@dataclass(frozen=True)
class Limits:
    """Settings of a server. max_batch, max_queue: answers in work and waiting. max_new_tokens: of an answer. timeout: seconds
    of a request. max_body: bytes of one. log_text: also write prompts and answers into the log. prompt_cache: bytes of keys and
    values of earlier dialogues.
    """

    max_batch: int = 16
    max_queue: int = 256
    max_new_tokens: int = 512
    timeout: float = 300.0
    max_body: int = 2**20
    log_text: bool = False
    prompt_cache: int = PROMPT_CACHE


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        add = {"registry": self.registry}
        self.requests = Counter("sanbu_requests", "requests by path and status", ["path", "status"], **add)
        self.seconds = Histogram("sanbu_request_seconds", "time of a request", ["path"], buckets=SECONDS, **add)
        self.first = Histogram("sanbu_first_token_seconds", "time to the first token", buckets=SECONDS, **add)
        self.prompt_tokens = Counter("sanbu_prompt_tokens", "tokens of prompts", **add)
        self.answer_tokens = Counter("sanbu_answer_tokens", "tokens of answers", **add)
        self.in_work = Gauge("sanbu_answers_in_work", "answers that get tokens", **add)
        self.waiting = Gauge("sanbu_answers_waiting", "answers in the queue", **add)


class Service:
    """A model with its threads. ending: True once the server takes no more requests. in_work: requests that are being answered."""

    def __init__(self, served: ServedModel, limits: Limits) -> None:
        self.served, self.limits, self.metrics, self.begun = served, limits, Metrics(), int(time.time())
        self.longest = min(limits.max_new_tokens, served.longest)
        self.ending, self.in_work = False, 0
        self.worker: Scheduler | Scorer
        if served.scores:
            self.worker = Scorer(served, limits.max_batch, limits.max_queue)
        else:
            self.worker = Scheduler(served, limits.max_batch, limits.max_queue, self.longest, limits.prompt_cache)
            self.worker.lent = passes_are_short(served.model)
        self.calls: deque[Callable[[], None]] = deque()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread: int | None = None  # the loop's
        self.worker.told = self.wake
        # Encoding changes settings of a tokenizer, so that each has one thread: the event loop's decodes, too.
        self.encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.decoder = copy.deepcopy(served.tokenizer)
        self.here = replace(served, tokenizer=self.decoder)
        self.metrics.in_work.set_function(lambda: self.worker.in_work)
        self.metrics.waiting.set_function(lambda: len(self.worker.waiting))

    async def encode(self, size: int, function: Callable, *words: Any) -> Any:
        """Run a function that encodes for a request of so many bytes; its first argument is the model."""
        if size <= SHORT:
            return function(self.here, *words)
        return await asyncio.get_running_loop().run_in_executor(self.encoder, function, self.served, *words)

    def known(self, model: str | None) -> None:
        """Raise Refusal unless "model" names one that is served; None is the model itself."""
        names = self.served.names
        if model is not None and model not in names:
            near = nearest(model, names)
            hint = f"did you mean {near}?" if near else f"there is {', '.join(names)}."
            raise Refusal(404, f"model: {model[:100]!r} is not served here; {hint}", code="model_not_found", param="model")

    def adapter(self, question: Question) -> str | None:
        """Return the adapter that answers a question; None for the model itself. Raises Refusal for one that none can answer."""
        self.known(question.model)
        if self.served.scores:
            problem = f"{self.served.name} is a reward model, which does not talk; ask /v1/score, or another server."
            raise Refusal(400, problem, param="model")
        if (question.longest or 1) > self.limits.max_new_tokens:
            raise Refusal(400, f"max_tokens: this server writes {self.limits.max_new_tokens} at most.", param="max_tokens")
        return question.model if question.model in self.served.adapters else None

    def tell(self, call: Callable[[], None], about: Answer | Future) -> None:
        """Have the event loop make a call, together with the others of the pass, as each waking costs; from any thread. about: what
        has a new token, or the future of what has ended. Clients who wait for the first token, or may ask again, are told first.
        """
        if isinstance(about, Future) or len(about.tokens) == 1:
            self.calls.appendleft(call)
        else:
            self.calls.append(call)

    def wake(self) -> None:
        """Let the event loop make the calls; whoever runs a pass, after it."""
        with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            if threading.get_ident() == self.thread:
                self.deliver()
            elif self.calls and self.loop is not None:
                self.loop.call_soon_threadsafe(self.deliver)

    def pass_here(self) -> bool:
        """Run a pass in the event loop's thread, if it is to run there; returns whether it did."""
        return isinstance(self.worker, Scheduler) and self.worker.pass_here()

    def deliver(self) -> None:
        """Make all calls."""
        with suppress(IndexError):
            while True:
                self.calls.popleft()()

    def submit(self, requests: Sequence[Answer] | Sequence[Scoring]) -> None:
        """Put requests into the queue, all or none. Raises Refusal."""
        most = self.limits.max_batch + self.limits.max_queue
        if len(requests) > most:
            raise Refusal(400, f"{len(requests)} answers are asked for at once; this server takes {most} at most.", param="n")
        self.loop, self.thread = asyncio.get_running_loop(), threading.get_ident()
        try:
            self.worker.submit(requests)
        except Busy:
            wait = 1 + len(self.worker.waiting) // self.limits.max_batch
            problem = "too many questions wait already; ask again later."
            raise Refusal(429, problem, code="queue_full", Retry_After=str(wait)) from None
        except Stopping:
            raise stopping() from None

    def end(self) -> None:
        """Answer what is in work, refuse what waits and all that is still to come."""
        self.ending = True
        self.worker.stop()

    def close(self) -> None:
        """End the threads."""
        self.end()
        self.encoder.shutdown(wait=False)


def passes_are_short(model: Any) -> bool:
    """Return True for a network whose passes are no longer than a few requests, so that the event loop had better run them."""
    weights = list(model.parameters())
    return weights[0].device.type == "cpu" and sum(weight.numel() for weight in weights) <= SMALL


def stopping() -> Refusal:
    """Return what is said while the server ends."""
    return Refusal(503, "the server is stopping; ask another one, or later.", Retry_After="5", Connection="close")
