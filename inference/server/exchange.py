"""One question and its answers: JSON when all are complete, or server-sent events while they are written."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from inference.scheduler import Answer, NotFinite, Stopping
from inference.scores import Scoring
from inference.server.prompts import AnswerText, token_rows
from inference.server.protocol import ChatQuestion, Question, Refusal, Reply, chat_logprobs, event, text_logprobs, usage
from inference.server.service import Service, stopping
from models.tool_calls import read_calls


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
        self.changed: asyncio.Queue[int] = asyncio.Queue()
        loop = asyncio.get_running_loop()
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
                    answer.on_token = lambda _, number=number: loop.call_soon_threadsafe(self.changed.put_nowait, number)
                    answer.future.add_done_callback(answer.on_token)
                self.answers.append(answer)
        template = service.served.template
        self.texts = [AnswerText(template, service.decoder, question.stops, self.chat) for _ in self.answers]
        self.notes.update(model=self.reply.model, prompt=sum(map(len, prompts)))
        service.submit(self.answers)

    async def response(self) -> Response:
        """Return the answer to the request."""
        if self.question.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # or nginx collects the pieces
            return StreamingResponse(self.events(), media_type="text/event-stream", headers=headers)
        await finished(self.request, self.answers, self.service.limits.timeout)
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

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the pieces of all answers as they are written. An error that comes late is the last event."""
        told, living = [0] * len(self.answers), set(range(len(self.answers)))
        deadline = self.begin + self.service.limits.timeout
        try:
            if self.chat:
                for number in sorted(living):
                    yield self.piece(number, {"role": "assistant", "content": ""})
            while living:
                number = await asyncio.wait_for(self.changed.get(), max(0.0, deadline - time.monotonic()))
                if number not in living:
                    continue
                answer = self.answers[number]
                over = answer.future.done()
                if over:
                    answer.future.result()
                    living.remove(number)
                tokens = list(answer.tokens)
                if self.tools and not over:  # a call is sent whole
                    continue
                for piece in self.pieces(number, tokens, told[number], over):
                    yield piece
                    told[number] = len(tokens)
            if self.question.usage_at_end:
                yield self.reply.piece([], self.usage())
        except Exception as error:  # whatever the model raised
            yield event(problem(error, self.service.limits.timeout).body)
        finally:
            for answer in self.answers:
                answer.future.cancel()
            self.note()
        yield b"data: [DONE]\n\n"

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


async def finished(request: Request, work: Sequence[Answer] | Sequence[Scoring], timeout: float) -> list[Any]:
    """Return the results of all work. Raises Refusal after ``timeout`` seconds, or if the client has gone; the work ends then."""
    done = asyncio.gather(*(asyncio.wrap_future(one.future) for one in work))
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({done, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        if gone.done():
            request.scope["notes"]["ended"] = "client-gone"
            raise Refusal(499, "the client closed the connection.")
        raise asyncio.TimeoutError
    except Exception as error:  # whatever the model raised
        raise (error if isinstance(error, Refusal) else problem(error, timeout)) from error
    finally:
        gone.cancel()
        done.cancel()
        for one in work:
            one.future.cancel()


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
