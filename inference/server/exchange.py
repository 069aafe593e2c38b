"""One question and its answers: JSON when all are complete, or server-sent events while they are written."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from inference.scheduler import Answer, NotFinite, Stopping
from inference.scores import Scoring
from inference.server.limits import gone
from inference.server.prompts import AnswerText, token_rows
from inference.server.protocol import ChatQuestion, Question, Refusal, Reply, chat_logprobs, event, text_logprobs, usage
from inference.server.service import Service, stopping
from models.tool_calls import read_calls

STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
STREAM += [(b"x-accel-buffering", b"no")]  # or nginx collects the pieces


class Exchange:
    """A question, its prompts, and answers to each of them in turn."""

    def __init__(
        self, service: Service, request: Request, question: Question, adapter: str | None, prompts: Sequence[list[int]],
        tools: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Ask. Raises Refusal if there is no place in the queue."""
        self.service, self.request, self.question, self.prompts, self.tools = service, request, question, prompts, tools
        self.begin, self.notes = time.monotonic(), request.scope["notes"]
        self.chat = isinstance(question, ChatQuestion)
        self.reply = Reply(self.chat, question.model or service.served.name)
        self.changed = asyncio.Event()
        longest = min(question.longest or service.longest, service.longest)
        self.answers: list[Answer] = []
        for prompt in prompts:
            for _ in range(question.n):
                number = len(self.answers)
                sampling = question.sampling(number, min(longest, service.served.longest - len(prompt)))
                answer = Answer(
                    prompt, sampling, adapter, question.presence_penalty, question.frequency_penalty, question.top,
                )  # fmt: skip
                if question.stream:
                    answer.on_token = partial(service.tell, self.changed.set)
                    answer.future.add_done_callback(answer.on_token)
                self.answers.append(answer)
        template = service.served.template
        self.texts = [AnswerText(template, service.decoder, question.stops, self.chat) for _ in self.answers]
        self.notes.update(model=self.reply.model, prompt=sum(map(len, prompts)))
        service.submit(self.answers)

    async def response(self) -> Any:
        """Return the answer to the request, an ASGI application."""
        if self.question.stream:
            return self.stream
        await finished(self.service, self.request, self.answers)
        self.note()
        choices = [self.choice(number) for number in range(len(self.answers))]
        return JSONResponse(self.reply.whole(choices, self.usage()))

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens."""
        return usage(sum(map(len, self.prompts)), sum(len(answer.tokens) for answer in self.answers))

    def note(self) -> None:
        """Write down what the log and the metrics show of this request."""
        metrics, tokens = self.service.metrics, self.usage()
        metrics.prompt_tokens.inc(tokens["prompt_tokens"])
        metrics.answer_tokens.inc(tokens["completion_tokens"])
        first = min((answer.first for answer in self.answers if answer.first), default=None)
        self.notes["answer"] = tokens["completion_tokens"]
        if first is not None:
            metrics.first.observe(first - self.begin)
            self.notes["first"] = f"{first - self.begin:.3f}s"
        self.notes["finish"] = ",".join(sorted({answer.finish or "cut" for answer in self.answers}))
        if self.service.limits.log_text:
            asked = [self.service.decoder.decode(prompt) for prompt in self.prompts]
            said = [text.whole(answer.tokens) for text, answer in zip(self.texts, self.answers, strict=True)]
            self.notes["text"] = json.dumps([asked, said], ensure_ascii=False)

    def logprobs(self, number: int, first: int = 0, offset: int = 0) -> dict[str, Any] | None:
        """Return the log-probabilities of an answer's tokens from ``first`` on, if they are asked for."""
        if self.question.top is None:
            return None
        stops = self.service.served.template.stop_token_ids
        rows = token_rows(self.service.decoder, self.answers[number], first, stops)
        return chat_logprobs(rows) if self.chat else text_logprobs(rows, offset)

    def choice(self, number: int) -> dict[str, Any]:
        """Return a complete answer."""
        answer = self.answers[number]
        said = self.said(number)
        body = {"message": {"role": "assistant", **said}} if self.chat else {"text": said["content"]}
        finish = "tool_calls" if "tool_calls" in said else answer.finish
        return {"index": number, **body, "logprobs": self.logprobs(number), "finish_reason": finish}

    def said(self, number: int) -> dict[str, Any]:
        """Return the text of a complete answer, and the calls of tools in it."""
        text = self.texts[number].whole(self.answers[number].tokens)
        content, calls = read_calls(text, self.tools) if self.tools else (text, [])
        if not calls:
            return {"content": text}
        made = [
            {"id": f"call_{self.reply.id[-24:]}{number}{place}", "type": "function", "function": call}
            for place, call in enumerate(calls)
        ]
        return {"content": content or None, "tool_calls": made}

    async def stream(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Send the pieces of all answers as they are written. An error that comes late is the last event."""

        async def put(events: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": events, "more_body": more})

        told, timeout = dict.fromkeys(range(len(self.answers)), 0), self.service.limits.timeout
        try:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM})
            events = b"".join(self.piece(number, {"role": "assistant", "content": ""}) for number in told) if self.chat else b""
            with watching(self.request, self.changed, self.begin + timeout) as check:
                while told:
                    if events:
                        await put(events)
                    await self.changed.wait()
                    self.changed.clear()
                    check()
                    events = b"".join(self.news(told))
            if self.question.usage_at_end:
                events += self.reply.piece([], self.usage())
        except Exception as error:  # whatever the model raised
            events = event(problem(error, timeout).body)
        finally:
            for answer in self.answers:
                answer.future.cancel()
            self.note()
        await put(events + b"data: [DONE]\n\n", False)

    def news(self, told: dict[int, int]) -> Iterator[bytes]:
        """Return the events for what is new of all answers. told: how many tokens of each were told; complete ones leave it."""
        for number in list(told):
            answer = self.answers[number]
            over, tokens = answer.future.done(), list(answer.tokens)
            if over:
                answer.future.result()
            elif self.tools or len(tokens) == told[number]:  # a call is sent whole
                continue
            events = self.pieces(number, tokens, told[number], over)
            if events:  # else its log-probabilities are told with the next ones
                told[number] = len(tokens)
            if over:
                del told[number]
            yield from events

    def pieces(self, number: int, tokens: list[int], told: int, over: bool) -> list[bytes]:
        """Return the events for new tokens of an answer; over: with the one that says why it ended."""
        events, finish = [], self.answers[number].finish
        if self.tools:
            said = self.said(number)
            if "tool_calls" in said:
                finish = "tool_calls"
                said["tool_calls"] = [{"index": place} | call for place, call in enumerate(said["tool_calls"])]
            events.append(self.piece(number, said, self.logprobs(number)))
        else:
            offset = len(self.texts[number].shown)
            text = self.texts[number].piece(tokens, over)
            if text or (over and self.question.top is not None and told < len(tokens)):
                events.append(self.piece(number, {"content": text}, self.logprobs(number, told, offset)))
        return [*events, self.piece(number, {}, finish=finish)] if over else events

    def piece(
        self, number: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> bytes:
        """Return an event with something new of one answer."""
        body = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return self.reply.piece([{"index": number, **body, "logprobs": logprobs, "finish_reason": finish}])


async def finished(service: Service, request: Request, work: Sequence[Answer] | Sequence[Scoring]) -> list[Any]:
    """Return the results of all work. Raises Refusal when the time is over, or if the client has gone; the work ends then."""
    changed, timeout = asyncio.Event(), service.limits.timeout
    for one in work:
        one.future.add_done_callback(partial(service.tell, changed.set))
    try:
        with watching(request, changed, time.monotonic() + timeout) as check:
            while not all(one.future.done() for one in work):
                await changed.wait()
                changed.clear()
                check()
        return [one.future.result() for one in work]
    except Exception as error:  # whatever the model raised
        raise (error if isinstance(error, Refusal) else problem(error, timeout)) from error
    finally:
        for one in work:
            one.future.cancel()


@contextmanager
def watching(request: Request, changed: asyncio.Event, end: float) -> Iterator[Callable[[], None]]:
    """Set ``changed`` also when the client has gone, or at time.monotonic() ``end``. Gives a function that raises then: Refusal,
    or asyncio.TimeoutError.
    """
    loop = asyncio.get_running_loop()
    timer = loop.call_later(end - time.monotonic(), changed.set)
    left = loop.create_task(disconnected(request))
    left.add_done_callback(lambda _: changed.set())

    def check() -> None:
        if left.done():
            raise gone(request)
        if time.monotonic() >= end:
            raise asyncio.TimeoutError

    try:
        yield check
    finally:
        timer.cancel()
        left.cancel()


async def disconnected(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def problem(error: Exception, timeout: float) -> Refusal:
    """Return what is said where an answer could not be completed."""
    if isinstance(error, Stopping):
        return stopping()
    if isinstance(error, asyncio.TimeoutError):
        return Refusal(504, f"there is no complete answer after {timeout:g} s, which is what this server gives a request.")
    if isinstance(error, NotFinite):
        return Refusal(500, "the model's logits are no finite numbers; start the server with --dtype fp32, or another model.")
    return Refusal(500, "the model failed on this request; the server's log says why.")
