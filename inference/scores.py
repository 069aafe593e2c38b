"""Scores of a reward model, one request after another in a thread that owns the model."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from inference.scheduler import Busy, Stopping
from inference.served import ServedModel
from models.heads import TokenScores, at_last_token


@dataclass(eq=False)
class Scoring:
    """Rows of token ids to score. normalised: in units of the spread that step 2 measured, from its mean.

    future: has the scores as its result.
    """

    rows: Sequence[Sequence[int]]
    normalised: bool = False
    future: Future[list[float]] = field(default_factory=Future)


class Scorer:
    """Scores dialogues; submit() may be called from any thread. max_batch: rows in a pass. max_queue: requests that may wait."""

    def __init__(self, served: ServedModel, max_batch: int, max_queue: int) -> None:
        self.served, self.max_batch, self.max_queue = served, max_batch, max_queue
        self.network = TokenScores(served.model)
        self.waiting: list[Scoring] = []
        self.in_work = 0
        self.stopping = False
        self.told: Callable[[], None] = lambda: None  # called when requests have ended
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")

    @property
    def alive(self) -> bool:
        """Return True while it scores."""
        return not self.stopping

    def submit(self, requests: Sequence[Scoring]) -> None:
        """Put requests into the queue. Raises Busy if it is full, Stopping after stop()."""
        if self.stopping:
            raise Stopping
        if len(self.waiting) + len(requests) > self.max_queue + 1 - bool(self.in_work):
            raise Busy
        for request in requests:
            self.waiting.append(request)
            self.thread.submit(self._answer, request)

    def stop(self) -> None:
        """Take no more requests; those that wait are cancelled."""
        self.stopping = True
        self.thread.shutdown(wait=False, cancel_futures=True)
        for request in self.waiting:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(Stopping())
        self.told()

    def _answer(self, request: Scoring) -> None:
        self.waiting.remove(request)
        if not request.future.set_running_or_notify_cancel():
            return
        self.in_work = len(request.rows)
        try:
            request.future.set_result(self.scores(request.rows, request.normalised))
        except Exception as error:  # out of memory, a driver: the next request may be answered
            request.future.set_exception(error)
        finally:
            self.in_work = 0
            self.told()

    @torch.inference_mode()
    def scores(self, rows: Sequence[Sequence[int]], normalised: bool) -> list[float]:
        """Return the score of each row at its last token; rows of like length are scored together."""
        device, pad = next(self.served.model.parameters()).device, self.served.tokenizer.pad_token_id
        scores = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for begin in range(0, len(order), self.max_batch):
            places = order[begin : begin + self.max_batch]
            width = max(len(rows[place]) for place in places)
            ids = torch.tensor([[*rows[place], *[pad] * (width - len(rows[place]))] for place in places], device=device)
            lengths = torch.tensor([len(rows[place]) for place in places], device=device)
            mask = (torch.arange(width, device=device) < lengths[:, None]).long()
            scores[places] = at_last_token(self.network(ids, mask), mask).cpu()
        config = self.served.model.config
        if normalised and getattr(config, "reward_std", None):
            scores = (scores - config.reward_mean) / config.reward_std
        return scores.tolist()
