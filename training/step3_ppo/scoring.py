"""The sources of an answer's reward: the reward model, Python functions, HTTP endpoints, or a weighted sum of them.

Order everywhere - flags, weights, columns of Experience.source_scores, the log: reward model, functions, endpoints.
docs/en/rewards.md says the same to the reader who writes a function or a server.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import numbers
import queue
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from errors import UserError
from json_text import parse_json
from training.step3_ppo.experience import Experience

logger = logging.getLogger("sanbu")

MODEL = "model"  # the reward model's name in the log
LARGEST = torch.finfo(torch.float32).max
LONGEST_PAUSE = 60.0  # seconds
LONGEST_ANSWER = 16 << 20  # bytes; 100,000 scores have 2 MiB
BUSY = (408, 425, 429)  # a server that may answer later, as all of 5xx; any other 4xx will say the same again


class RewardError(UserError):
    """A source gave no usable scores. All processes raise it together, so that a checkpoint can be written."""


class Unreachable(Exception):
    """An endpoint that did not answer this time."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it turns the POST into a GET of another page, whose scores nobody asked for."""

    def redirect_request(self, *_: Any) -> None:
        """Follow no redirection; urllib raises HTTPError then."""


NO_REDIRECTS = urllib.request.build_opener(NoRedirect)


# --- sources ----------------------------------------------------------------------------------------------------------


class RewardFunction:
    """--reward_function file.py:name. The function in the file has this contract:

        def name(prompts: list[str], answers: list[str]) -> list[float]

    prompts: each prompt as the template wrote it, without special tokens; answers: the decoded answer to each, without its
    end token. It returns one finite number an answer, larger for better: a list, a tuple, an array or a tensor. They are
    taken as they are - what the reward model's statistics normalise is its own scores only - and the weighted sum of all
    sources is cut by --clip_reward_value. Every process calls it with its share of a rollout.
    """

    def __init__(self, spec: str) -> None:
        """Run the file. Raises UserError if it, or the name in it, is missing or broken."""
        file, _, self.name = spec.rpartition(":")
        self.label = f"--reward_function {spec}"
        self.file = Path(file).expanduser().resolve()
        module_name = f"reward_function_{self.file.stem}"
        try:
            module_spec = importlib.util.spec_from_file_location(module_name, self.file)
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_name] = module  # dataclasses and pickle look a module up by its name
            module_spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.label}: the file cannot be run ({self._complaint(error)}); correct it.") from error
        self.function = getattr(module, self.name, None)
        if not callable(self.function):
            problem = "no such name" if self.function is None else f"a {type(self.function).__name__}"
            raise UserError(f"{self.label}: {problem} in the file; expected a function {self.name}(prompts, answers).")

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], _ended: Sequence[bool] = ()) -> list[float]:
        """Return one finite float an answer. Raises RewardError that names the sample. Functions are not told what was cut off."""
        try:
            scores = self.function(list(prompts), list(answers))
        except (Exception, SystemExit) as error:  # one that ends its process would leave the others waiting
            where = self._culprit(prompts, answers)
            raise RewardError(f"{self.label} raised {self._complaint(error)} {where}; correct the function.") from error
        return checked_scores(scores, prompts, answers, self.label)

    def _culprit(self, prompts: Sequence[str], answers: Sequence[str]) -> str:
        """Name the first sample that the function cannot take alone."""
        for prompt, answer in zip(prompts, answers, strict=True):
            try:
                self.function([prompt], [answer])
            except (Exception, SystemExit):
                return f"on {sample(prompt, answer)}"
        return f"on {len(answers)} answers together, though on none of them alone; the first is {sample(prompts[0], answers[0])}"

    def _complaint(self, error: BaseException) -> str:
        """Return kind and text of an error, and the line of the user's file that it comes from."""
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.file)]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f", line {line}" if line else ""
        return f"{type(error).__name__}: {shortened(str(error), 200)}{where}"


class RewardEndpoint:
    """--reward_endpoint URL: POST {"prompts": [...], "answers": [...], "ended": [...]} as JSON, answered by {"scores": [...]}.

    ended is false where --max_answer_seq_len cut the answer off. One request for a process's share of a rollout. No answer
    within timeout seconds, a lost connection and a busy server (HTTP 5xx, 408, 425, 429) are tried again, so many times,
    after 1, 2, 4, ... seconds; anything else wrong ends the run.
    """

    def __init__(self, url: str, timeout: float, retries: int, pause: Callable[[float], None] = time.sleep) -> None:
        self.name = "endpoint"
        self.label = f"--reward_endpoint {url}"
        self.url, self.timeout, self.retries, self.pause = url, timeout, retries, pause

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool] = ()) -> list[float]:
        """Return one finite float an answer. Raises RewardError when all attempts failed or the answer is not usable.

        ended: whether each answer came to its end; nothing for True everywhere.
        """
        ended = list(ended) or [True] * len(answers)
        body = json.dumps({"prompts": list(prompts), "answers": list(answers), "ended": ended}).encode()
        for attempt in range(self.retries + 1):
            try:
                return checked_scores(self._scores(self._post(body)), prompts, answers, self.label)
            except Unreachable as error:
                reason = error
            if attempt < self.retries:
                seconds = min(2.0**attempt, LONGEST_PAUSE)
                logger.warning("%s: %s; once more in %g s.", self.label, reason, seconds)
                self.pause(seconds)
        raise RewardError(
            f"{self.label}: {reason}, at {self.retries + 1} attempts; see that the server runs and answers within "
            f"--reward_timeout {self.timeout:g} s."
        )

    def _post(self, body: bytes) -> bytes:
        """Return _ask(body) within timeout seconds. A socket's own timeout starts anew with each byte that drips in."""
        outcome: queue.Queue = queue.Queue()

        def ask() -> None:
            try:
                outcome.put((self._ask(body), None))
            except Exception as error:
                outcome.put((None, error))

        threading.Thread(target=ask, name="reward endpoint", daemon=True).start()
        try:
            content, error = outcome.get(timeout=self.timeout)
        except queue.Empty:
            raise Unreachable("no answer in time") from None
        if error:
            raise error
        return content

    def _ask(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, data=body, headers={"Content-Type": "application/json"})
        try:
            with NO_REDIRECTS.open(request, timeout=self.timeout) as response:
                content = response.read(LONGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            if error.code >= 500 or error.code in BUSY:
                raise Unreachable(f"HTTP {error.code} {error.reason}") from error
            if 300 <= error.code < 400:
                place = error.headers.get("Location", "nowhere")
                raise RewardError(
                    f"{self.label} sends on to {place} (HTTP {error.code}), which nobody asked for; give the address that answers."
                ) from error
            try:
                excerpt = shortened(error.read(500).decode("utf-8", "replace"), 200)
            except (OSError, HTTPException):  # the connection broke while it explained itself
                excerpt = ""
            raise RewardError(
                f"{self.label} refused the request: HTTP {error.code} {error.reason} {excerpt!r}; it must take a POST of "
                'JSON {"prompts": [...], "answers": [...]}.'
            ) from error
        except UnicodeError as error:  # a host or a path that cannot be written as an address
            raise RewardError(f"{self.label}: no address that can be asked ({error}); write it in ASCII.") from error
        except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            raise Unreachable("no answer in time" if late else f"no answer ({reason or type(error).__name__})") from error
        if len(content) > LONGEST_ANSWER:
            raise RewardError(f"{self.label} answered more than {LONGEST_ANSWER >> 20} MiB; expected one number an answer.")
        return content

    def _scores(self, content: bytes) -> Any:
        try:
            return parse_json(content)["scores"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            excerpt = shortened(content[:500].decode("utf-8", "replace"), 200)
            raise RewardError(f'{self.label} answered {excerpt!r}; expected JSON {{"scores": [...]}}.') from error


def checked_scores(returned: Any, prompts: Sequence[str], answers: Sequence[str], label: str) -> list[float]:
    """Return the scores of a source as floats. Raises RewardError that names the sample if they are not usable."""
    returned = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(returned, (list, tuple)):
        raise RewardError(f"{label} returned a {type(returned).__name__}; expected a list with one number an answer.")
    if len(returned) != len(answers):
        raise RewardError(
            f"{label} returned {len(returned)} scores for {len(answers)} answers, of which the first is "
            f"{sample(prompts[0], answers[0])}; it must return one an answer."
        )
    scores = []
    for value, prompt, answer in zip(returned, prompts, answers, strict=True):
        value = value.tolist() if hasattr(value, "tolist") else value  # a tensor or array of one number
        usable = isinstance(value, numbers.Real) and abs(value) <= LARGEST  # false for NaN and infinity
        if not usable:
            excerpt = shortened(repr(value), 60)
            raise RewardError(f"{label} returned {excerpt} for {sample(prompt, answer)}; expected a finite number.")
        scores.append(float(value))
    return scores


def sample(prompt: str, answer: str) -> str:
    """Quote a prompt and its answer, short enough for a sentence."""
    return f"the prompt {shortened(prompt.strip())!r} with the answer {shortened(answer)!r}"


def shortened(text: str, width: int = 80) -> str:
    """Return the text, or its two ends."""
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"


# --- all sources together ---------------------------------------------------------------------------------------------


class Rewards:
    """The sources of a run with their weights. Made before any model is loaded; the reward model itself stays with the engine.

    names, weights: of all sources in their order. outside: functions and endpoints. with_model: the reward model is the
    first source.
    """

    def __init__(self, args) -> None:
        """Raise UserError for a function that cannot be loaded; checks.py has looked at the rest."""
        self.with_model: bool = args.reward_model
        self.outside: list[RewardFunction | RewardEndpoint] = [
            *map(RewardFunction, args.reward_function),
            *(RewardEndpoint(url, args.reward_timeout, args.reward_retries) for url in args.reward_endpoint),
        ]
        names = [MODEL] * self.with_model + [source.name for source in self.outside]
        self.names = [
            name if names.index(name) == number else f"{name}_{names[: number + 1].count(name)}"
            for number, name in enumerate(names)
        ]
        self.weights = args.reward_weight_list or [1.0] * len(names)

    @property
    def model_alone(self) -> bool:
        """The reward model is all there is: scores stay in its own unit, and are normalised where they become rewards."""
        return self.with_model and self.names == [MODEL] and self.weights == [1.0]

    def total(self, scores: Tensor, mean: float, std: float) -> Tensor:
        """Return the weighted sum of scores [rows, sources] as the sources gave them; of the reward model alone its column.

        mean and std are the reward model's own and apply to its column only. -> [rows].
        """
        if self.model_alone:
            return scores[:, 0]
        if self.with_model:
            scores = torch.cat([(scores[:, :1] - mean) / std, scores[:, 1:]], dim=1)
        return scores @ torch.tensor(self.weights, dtype=scores.dtype, device=scores.device)

    def metrics(self, experience: Experience) -> dict[str, float]:
        """Return the mean of every source, for the log; nothing where there is only one."""
        if len(self.names) < 2:
            return {}
        columns = zip(self.names, experience.source_scores.T, strict=True)
        return {f"score_{name}": float(scores.mean()) for name, scores in columns}

    def ask_outside(self, prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool], world_size: int) -> Tensor:
        """Return the scores of functions and endpoints, [rows, sources outside], on the host. ended: no answer that was cut off.

        All processes call it, each with its rows, perhaps none. Raises RewardError, on all together, if a source fails.
        """
        failure, columns = None, []
        try:
            columns = [source(prompts, answers, ended) for source in self.outside] if answers else []
        except RewardError as error:
            failure = error
        raise_together(failure, world_size)
        return torch.tensor(columns).T if columns else torch.zeros(0, len(self.outside))


def raise_together(failure: RewardError | None, world_size: int) -> None:
    """Raise on every process what went wrong on any of them: one that went on alone would wait for the others for ever."""
    if world_size > 1:
        failures: list[str | None] = [None] * world_size
        dist.all_gather_object(failures, None if failure is None else str(failure))
        message = next((text for text in failures if text), None)
        if failure is None and message:
            raise RewardError(message)
    if failure is not None:
        raise failure


@contextmanager
def kept_on_failure(save: Callable[[int], None], done: int):
    """Save a checkpoint after the given number of finished rollouts if a source of reward fails meanwhile."""
    try:
        yield
    except RewardError as error:
        if done == 0:
            raise
        save(done)
        raise RewardError(f"{error} The checkpoint after rollout {done} is kept: --resume continues from it.") from error
