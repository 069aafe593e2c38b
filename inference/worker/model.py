"""Answers of a model to claimed questions, by the continuous batching of the server."""

import threading
from concurrent.futures import TimeoutError
from dataclasses import replace

from errors import UserError
from inference.chatbot import Sampling
from inference.scheduler import Answer, NotFinite, Scheduler
from inference.served import ServedModel
from inference.server.prompts import AnswerText, chat_prompt
from inference.server.protocol import Message, Refusal
from inference.worker.table import Claim


class ModelAnswers:
    """Answers questions; called from several threads, whose answers share the model's passes.

    system: a message at the start of every dialogue. timeout: seconds for an answer.
    """

    def __init__(self, served: ServedModel, sampling: Sampling, system: str | None, max_batch: int, timeout: float) -> None:
        self.served, self.sampling, self.timeout = served, sampling, timeout
        self.system = [{"role": "system", "content": system}] if system else []
        self.scheduler = Scheduler(served, max_batch, max_batch, min(sampling.max_new_tokens, served.longest))
        self.tokenizing = threading.Lock()  # encoding changes settings of a tokenizer

    def __call__(self, one: Claim) -> str:
        """Return the answer to a question. UserError for one that cannot be answered."""
        messages = [*self.system, *one.history, {"role": "user", "content": one.question}]
        try:
            with self.tokenizing:
                prompt, _ = chat_prompt(self.served, [Message(**message) for message in messages], [], self.sampling.max_new_tokens)
                longest = min(self.sampling.max_new_tokens, self.served.longest - len(prompt))
                asked = Answer(prompt, replace(self.sampling, max_new_tokens=longest, seed=self.sampling.seed + one.id))
                self.scheduler.submit([asked])
        except Refusal as refusal:
            raise UserError(str(refusal)) from refusal
        try:
            asked.future.result(self.timeout)
        except TimeoutError:
            asked.future.cancel()
            raise UserError(f"there was no answer within {self.timeout:g} s (--timeout).") from None
        except NotFinite:
            raise UserError("the model's logits are no finite numbers; try --dtype fp32, or another checkpoint.") from None
        with self.tokenizing:
            return AnswerText(self.served.template, self.served.tokenizer, self.sampling.stop_strings, True).whole(asked.tokens)
