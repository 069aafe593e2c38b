"""Continuous batching: passes of the model, one after another, give all answers in work one more token each. A question joins
while others are answered, and leaves when its answer ends; what it is answered does not depend on the others.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inference.chatbot import Sampling
from inference.engine import DROP_SHARE, Batch, Rules, read
from inference.few_rows import packed_weights
from inference.prompt_cache import PromptCache
from inference.sampling import StopStrings, draw, penalised, uniform_numbers
from inference.served import ServedModel
from models.heads import base_model

logger = logging.getLogger("sanbu")

# Tokens of prompts read in one pass, padding included: answers in work wait meanwhile, and its activations need memory.
PREFILL_TOKENS = 4096
LENT_TOKENS = 512  # the same where passes are lent: all else that the thread does waits, too
# Where decoder.py does not read prompts in the pass of the answers in work, let questions in once they are this share of those,
# or after so many steps: to read prompts costs them a pass.
# Demo model, 16 clients, answers of 9 tokens, answers a CPU second: at once 46 and 52, at 1/4 54 and 66, at 1/2 54 and 57, at 1 52.
JOIN_SHARE, JOIN_STEPS = 0.25, 4
IDLE_STEPS = 2  # that many rows without an answer are kept for: to drop them, and then to join others, copies all keys and values
PROMPT_CACHE = 2**28  # bytes


class Busy(Exception):
    """The queue is full."""


class Stopping(Exception):
    """The scheduler takes no more questions."""


class NotFinite(Exception):
    """The model's logits are no finite numbers."""


@dataclass(eq=False)
class Answer:
    """One answer that is asked for, and what there is of it.

    prompt: token ids. adapter: the LoRA adapter that answers, None for the model as it was loaded. presence, frequency: lower
    the logits of tokens that the answer holds, by a constant and by their count. top: how many of the likeliest tokens are
    noted at each step beside the drawn one; None notes nothing. on_token: called in the scheduler's thread after each token.

    tokens, the one that stopped it included. log_probs: of each token, and (token, log-probability) of the likeliest, at
    temperature 1. finish: "stop", or "length" where max_new_tokens cut it off. first: time.monotonic() of the first token.
    future: has the answer itself as its result; to cancel it gives up the place.
    """

    prompt: Sequence[int]
    sampling: Sampling
    adapter: str | None = None
    presence: float = 0.0
    frequency: float = 0.0
    top: int | None = None
    on_token: Callable[[Answer], None] | None = None
    tokens: list[int] = field(default_factory=list)
    log_probs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    finish: str | None = None
    first: float | None = None
    future: Future[Answer] = field(default_factory=Future)

    def __post_init__(self) -> None:
        longest = self.sampling.max_new_tokens
        self.uniform = [] if self.sampling.greedy else uniform_numbers([self.sampling.seed], 1, longest)[0].tolist()
        self.stop_strings: StopStrings | None = None
        self.plain = False  # the likeliest token is taken, and nothing noted


class Scheduler:
    """Answers questions in a thread of its own; submit() may be called from any thread. With ``lent`` set before a first question,
    passes run in the one thread that submits instead, whenever it calls pass_here().

    max_batch: answers in work at a time. max_queue: answers that may wait for a place. longest: of any answer, in tokens.
    prompt_cache: bytes of keys and values of earlier dialogues that are kept.
    """

    def __init__(self, served: ServedModel, max_batch: int, max_queue: int, longest: int, prompt_cache: int = PROMPT_CACHE) -> None:
        self.served, self.max_batch, self.max_queue = served, max_batch, max_queue
        self.rules = Rules(longest, (), served.tokenizer.pad_token_id)
        self.stops = frozenset(served.stop_token_ids)
        # Rust tokenizers refuse a second thread while a setting changes ("Already borrowed"), and encoding changes settings.
        self.tokenizer = copy.deepcopy(served.tokenizer)
        self.prompts = PromptCache(prompt_cache)
        self.waiting: deque[Answer] = deque()
        self.groups: list[_Group] = []
        self.wake = threading.Condition()
        self.held = 0  # steps in a row at which a waiting question was not let in
        self.stopping = False
        self.lent = self.passing = False
        self.told: Callable[[], None] = lambda: None  # called after each pass, when answers have tokens or ended
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Return True while the thread runs."""
        return self.thread.is_alive()

    @property
    def in_work(self) -> int:
        """Return how many answers are in work."""
        return sum(group.live for group in self.groups)

    def submit(self, answers: Sequence[Answer]) -> None:
        """Put answers, all or none, into the queue. Raises Busy if it is full, Stopping after stop()."""
        for answer in answers:
            answer.plain = answer.sampling.greedy and answer.top is None and not changes_logits(answer)
            if answer.sampling.stop_strings:
                answer.stop_strings = StopStrings(answer.sampling.stop_strings, self.tokenizer)
        with self.wake:
            if self.stopping:
                raise Stopping
            free = self.max_batch - self.in_work
            if len(self.waiting) + len(answers) > self.max_queue + max(free, 0):
                raise Busy
            self.waiting.extend(answers)
            if not self.lent:
                self.wake.notify()

    def stop(self, wait: bool = False) -> None:
        """Refuse what waits and all that is still to come; answer what is in work. wait: return when that is done."""
        with self.wake:
            self.stopping = True
            refused, self.waiting = self.waiting, deque()
            self.wake.notify()
        for answer in refused:
            _fail(answer, Stopping())
        self.told()
        if wait:
            self.thread.join()

    # --- passes -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with packed_weights(base_model(self.served.model)):
            while True:
                with self.wake:
                    self.wake.wait_for(lambda: (self.due and not self.lent) or (self.stopping and not (self.due or self.passing)))
                    if not self.due:
                        return
                self._pass()

    @property
    def due(self) -> bool:
        """Return True if there is something to answer."""
        return bool(self.waiting or self.groups)

    def pass_here(self) -> bool:
        """Run a pass in this thread, if one is due and passes are lent; returns whether it did."""
        if not self.lent or not self.due:
            return False
        self._pass()
        return True

    @torch.inference_mode()
    def _pass(self) -> None:
        """Read the last tokens of all answers, and prompts of new ones, and draw the next tokens."""
        joining: list[Answer] = []
        self.passing = True
        try:
            joining = self._next()
            self._read(_Group(self, joining) if joining else None)
            for group in self.groups:
                group.draw()
            self.groups = [group for group in self.groups if group.live]
        except Exception as error:  # out of memory, a driver: these questions are lost, the next ones may be answered
            logger.exception("answers were lost")
            lost = [answer for group in self.groups for answer in group.answers if answer is not None]
            self.groups = []
            for answer in {*lost, *joining}:
                _fail(answer, error)
        self.passing = False
        if self.stopping:
            with self.wake:
                self.wake.notify()
        self.told()

    def _next(self) -> list[Answer]:
        """Take the answers from the queue, in its order, that there is room for; all of one adapter."""
        taken: list[Answer] = []
        in_work = self.in_work
        room = self.max_batch - in_work
        waits = bool(self.waiting) and room > 0
        direct = bool(self.groups) and self.groups[0].batch.direct  # prompts are read in the pass of those in work
        if not direct and min(len(self.waiting), room) < JOIN_SHARE * in_work and self.held < JOIN_STEPS:
            self.held += waits
            return taken
        self.held, most = 0, LENT_TOKENS if self.lent else PREFILL_TOKENS
        with self.wake:
            while self.waiting and len(taken) < room:
                answer = self.waiting[0]
                width = max(len(one.prompt) for one in (*taken, answer))
                if taken and (answer.adapter != taken[0].adapter or width * (len(taken) + 1) > most):
                    break
                self.waiting.popleft()
                if not answer.future.cancelled():
                    taken.append(answer)
        return taken

    def _read(self, new: _Group | None) -> None:
        """Read the last tokens of all answers in work, and the prompts of new ones, which join those with the same adapter."""
        old = [group for group in self.groups if new and group.adapter == new.adapter and group.batch.replaces][:1]
        if new is not None and not old:
            self.groups = [*self.groups, new]
        for group in self.groups:
            self.served.use(group.adapter)
            if group not in old:
                read(group.batch)
            elif new.batch.one_unread and group.places_for(new):
                group.take_in(new)  # first: the pass needs no more rows than it has
                read(group.batch)
            else:
                read(group.batch, new.batch)
                group.take_in(new)


class _Group:
    """Answers in work that share the network's passes: the rows of a batch. A row whose answer ended holds None."""

    def __init__(self, scheduler: Scheduler, answers: list[Answer]) -> None:
        """Lay out the prompts, equal ones once."""
        self.scheduler, self.adapter = scheduler, answers[0].adapter
        prompts = [tuple(answer.prompt) for answer in answers]
        distinct = list(dict.fromkeys(prompts))
        order = sorted(range(len(answers)), key=lambda row: distinct.index(prompts[row]))
        asked = [distinct.index(prompts[row]) for row in order]
        self.answers: list[Answer | None] = [answers[row] for row in order]
        known = [scheduler.prompts.find(self.adapter or "", prompt) for prompt in distinct]
        self.batch = Batch(scheduler.served.model, scheduler.rules, distinct, asked, order, known)
        self.idle = 0  # steps in a row with many rows whose answers ended

    @property
    def live(self) -> int:
        """Return how many answers are in work."""
        return sum(answer is not None for answer in self.answers)

    def places_for(self, other: _Group) -> list[int]:
        """Return rows that have ended, one for each row of a group; none if it does not fit."""
        places = [row for row, answer in enumerate(self.answers) if answer is None][: len(other.answers)]
        fits = len(places) == len(other.answers) and other.batch.mask.shape[1] <= self.batch.mask.shape[1]
        return places if fits else []

    def take_in(self, other: _Group) -> None:
        """Give rows that have ended to a group, or else put its rows, which are read, below."""
        places = self.places_for(other)
        if places:
            self.batch.done = self.ended()
            together = places[-1] - places[0] == len(places) - 1  # as one row is: a slice is copied several times as fast
            rows = slice(places[0], places[-1] + 1) if together else torch.tensor(places, device=self.batch.mask.device)
            self.batch.replace(rows, other.batch)
            for place, answer in zip(places, other.answers, strict=True):
                self.answers[place] = answer
            return
        if self.live < len(self.answers):
            self.drop()
        self.batch.join(other.batch)
        self.answers += other.answers

    def ended(self) -> Tensor:
        """Return which rows have no answer in work, [batch] bool."""
        return torch.tensor([answer is None for answer in self.answers], device=self.batch.done.device)

    def drop(self) -> None:
        """Take the rows out that have ended."""
        self.batch.done = self.ended()
        self.batch.drop()
        self.answers, self.idle = [answer for answer in self.answers if answer is not None], 0

    def draw(self) -> None:
        """Draw a token for each answer, for read() to take."""
        self.leave()
        if not self.live:
            return
        drawing = {row: answer for row, answer in enumerate(self.answers) if answer is not None}
        self.batch.tokens = self.draw_tokens(drawing)
        for row, token in enumerate(self.batch.tokens.tolist()):
            self.add(row, token)
        if not self.live:
            return
        many = len(self.answers) - self.live >= DROP_SHARE * len(self.answers)
        self.idle = self.idle + 1 if many and not self.scheduler.waiting else 0
        if self.idle > IDLE_STEPS:
            self.drop()
        lengths = torch.tensor([len(answer.tokens) if answer else 1 for answer in self.answers], device=self.batch.tokens.device)
        self.batch.go_on(lengths)

    def leave(self) -> None:
        """Free the rows of answers that nobody waits for any more."""
        for row, answer in enumerate(self.answers):
            if answer is not None and answer.future.cancelled():
                self.answers[row] = None

    def draw_tokens(self, drawing: dict[int, Answer]) -> Tensor:
        """Return the next token of these rows in [batch]; note log-probabilities where they are asked for."""
        logits = self.batch.logits.float()
        special = {row: answer for row, answer in drawing.items() if not answer.plain}
        self.note = {row: logits[row] for row, answer in special.items() if answer.top is not None}
        if any(map(changes_logits, special.values())):
            logits = logits.clone()
        kinds: dict[tuple, list[int]] = {}
        for row, answer in special.items():
            if changes_logits(answer):
                change_logits(logits[row], answer)
            if not answer.sampling.greedy:
                sampling = answer.sampling
                kinds.setdefault((sampling.temperature, sampling.top_p, sampling.top_k), []).append(row)
        tokens = logits.argmax(dim=-1)
        for (temperature, top_p, top_k), rows in kinds.items():
            scores = (logits[rows] / temperature).log_softmax(dim=-1)
            uniform = [self.answers[row].uniform[len(self.answers[row].tokens)] for row in rows]
            tokens[rows] = draw(scores, torch.tensor(uniform, device=scores.device), top_p, top_k)[0]
        finite = logits.gather(1, tokens[:, None]).isfinite().squeeze(1)
        for row in () if finite.all() else [row for row in drawing if not finite[row]]:
            _fail(drawing[row], NotFinite())
            self.answers[row] = None
        return tokens

    def add(self, row: int, token: int) -> None:
        """Append a token to the answer of a row; an answer that is complete leaves."""
        answer = self.answers[row]
        if answer is None:
            return
        answer.first = answer.first or time.monotonic()
        if row in self.note:
            scores = self.note[row].log_softmax(dim=-1)
            best = scores.topk(answer.top) if answer.top else None
            likeliest = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else []
            answer.log_probs.append((float(scores[token]), likeliest))
        answer.tokens.append(token)
        if token in self.scheduler.stops or (answer.stop_strings and answer.stop_strings.met(answer.tokens)):
            answer.finish = "stop"
        elif len(answer.tokens) == answer.sampling.max_new_tokens:
            answer.finish = "length"
        if answer.on_token is not None:
            answer.on_token(answer)
        if answer.finish:
            self.answers[row] = None
            if self.batch.shares:
                said = (*answer.prompt, *answer.tokens[:-1])  # the last one was not read
                states = partial(self.batch.cache.states, row, len(said))
                self.scheduler.prompts.keep(self.adapter or "", said, states)
            _resolve(answer, partial(answer.future.set_result, answer))


def changes_logits(answer: Answer) -> bool:
    """Return True if a penalty applies to the answer."""
    return answer.sampling.repetition_penalty != 1.0 or bool(answer.presence or answer.frequency)


def change_logits(logits: Tensor, answer: Answer) -> None:
    """Apply the answer's penalties to its logits [vocab], in place."""
    if answer.sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*answer.prompt, *answer.tokens}), device=logits.device)
        logits[seen] = penalised(logits[seen], torch.tensor(True), answer.sampling.repetition_penalty)
    if answer.tokens and (answer.presence or answer.frequency):
        said, counts = torch.tensor(answer.tokens, device=logits.device).unique(return_counts=True)
        logits[said] -= answer.presence + answer.frequency * counts


def _resolve(answer: Answer, resolve: Callable[[], Any]) -> None:
    """Resolve the answer's future, unless it was cancelled."""
    if answer.future.set_running_or_notify_cancel():
        resolve()


def _fail(answer: Answer, error: Exception) -> None:
    if not answer.future.done():
        _resolve(answer, partial(answer.future.set_exception, error))
