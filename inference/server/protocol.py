"""What requests may hold, and what is answered: OpenAI's chat completions, completions and models, and scores."""

from __future__ import annotations

import json
import math
import random
import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from errors import nearest
from inference.chatbot import Sampling

MOST = 128  # answers to a question, as OpenAI's
SEED = 2**63 - 1
Item = TypeVar("Item")
Text = Annotated[str, Field(min_length=1, max_length=256)]
Some = Annotated[list[Item], Field(min_length=1)]
NO_EFFECT = (  # fields of OpenAI's that say nothing about the answer
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "reasoning_effort", "verbosity", "prediction", "moderation",
)  # fmt: skip


class Refusal(Exception):
    """A request that gets no answer: the HTTP status and OpenAI's form of an error."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        usual = "invalid_request_error" if status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, usual)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Form(BaseModel):
    """JSON whose types are as written: no text for a number, no unknown names."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Loose(Form):
    """The same, for parts to which clients add names of their own."""

    model_config = ConfigDict(extra="ignore")


class TextPart(Loose):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Call(Loose):
    """A name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Loose):
    """A tool that the assistant called."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Call


class Message(Loose):
    """A message of a dialogue."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def has_content(self) -> Message:
        """Refuse a message without content, but for a call."""
        if self.content is None and not self.tool_calls:
            raise ValueError('a message has no "content"')
        return self

    def plain(self) -> dict[str, Any]:
        """Return the message as templates read it."""
        content = "\n".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.role == "tool":
            message |= {"tool_call_id": self.tool_call_id or "", "name": self.name or ""}
        return message


class Function(Loose):
    """What the assistant may call."""

    name: str = Field(min_length=1)
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)


class Tool(Loose):
    """A tool."""

    type: Literal["function"]
    function: Function


class StreamOptions(Loose):
    """Settings of a stream."""

    include_usage: bool = False


class ResponseFormat(Loose):
    """Only text is written freely; a schema would have to be enforced."""

    type: Literal["text"]


class Question(Form):
    """What chat completions and completions share. top_k and repetition_penalty are not OpenAI's."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    n: int = Field(1, ge=1, le=MOST)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-SEED, le=SEED)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        """A null means the default; names that have no effect here are left out."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None and name not in NO_EFFECT}

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_at_end(self) -> bool:
        """Return True if a stream is to end with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, number: int, max_new_tokens: int) -> Sampling:
        """Return the settings of answer ``number`` to the question."""
        seed = random.getrandbits(62) if self.seed is None else (self.seed + number) % SEED
        return Sampling(
            max_new_tokens, self.temperature or 1.0, self.top_p, self.top_k, self.temperature == 0, seed,
            self.repetition_penalty, self.stops,
        )  # fmt: skip


class ChatQuestion(Question):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["auto", "none"] = "auto"
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def agrees(self) -> ChatQuestion:
        """Refuse settings that need another one, and a dialogue in which nobody asks."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError('"top_logprobs" needs "logprobs": true')
        if self.messages[-1].role not in ("user", "tool"):
            raise ValueError("the last message must be a user's, or what a tool returned")
        return self

    @property
    def longest(self) -> int | None:
        """Return how many tokens are asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """Return how many of the likeliest tokens are asked for; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextQuestion(Question):
    """The body of /v1/completions."""

    prompt: str | Some[str] | Some[int] | Some[Some[int]]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    best_of: Literal[1] = 1

    @property
    def longest(self) -> int | None:
        """Return how many tokens are asked for; 16 is OpenAI's default."""
        return self.max_tokens or 16

    @property
    def top(self) -> int | None:
        """Return how many of the likeliest tokens are asked for."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, texts or tokens."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


class ScoreQuestion(Form):
    """The body of /v1/score. A prompt is a dialogue, a question, or text as the template writes it (step 3 sends that).

    ended: false for an answer that was cut off, which has no end token; all ended unless it is given.
    """

    model: str | None = None
    prompts: list[str | list[Message]] = Field(max_length=100_000)
    answers: list[str]
    ended: list[bool] | None = None

    @model_validator(mode="after")
    def agrees(self) -> ScoreQuestion:
        """Refuse lists of different lengths."""
        if self.ended is not None and len(self.ended) != len(self.answers):
            raise ValueError(f'{len(self.answers)} "answers" and {len(self.ended)} "ended"; there must be one an answer')
        if len(self.prompts) != len(self.answers):
            raise ValueError(f'{len(self.prompts)} "prompts" and {len(self.answers)} "answers"; there must be one answer a prompt')
        return self


def read(form: type[BaseModel], body: bytes) -> Any:
    """Return a request's body as a form. Raises Refusal that names the first field that is wrong."""
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise Refusal(400, f"the body is no JSON: {first['ctx']['error']}.", code="invalid_json")
    place = ".".join(str(part) for part in first["loc"] if not str(part)[:1].isupper() and "[" not in str(part))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        near = nearest(str(first["loc"][-1]), form.model_fields)
        message = f"there is no such field{f'; did you mean {near}?' if near else ' here'}"
    raise Refusal(400, f"{place}: {message}." if place else f"{message}.", param=place or None, code="invalid_value")


# --- what is answered -------------------------------------------------------------------------------------------------


class Reply:
    """The frame of an answer: its id, the model and the time, in the form of chat completions or of completions."""

    def __init__(self, chat: bool, model: str) -> None:
        self.chat, self.model, self.created = chat, model, int(time.time())
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{random.getrandbits(128):032x}"

    def frame(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a whole answer or a piece of one."""
        frame = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return frame if usage is None else frame | {"usage": usage}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """Return the answer to a request without stream."""
        return self.frame("chat.completion" if self.chat else "text_completion", choices, usage)

    def piece(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        """Return an event of a stream."""
        return event(self.frame("chat.completion.chunk" if self.chat else "text_completion", choices, usage))


def event(content: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def usage(prompts: int, answers: int) -> dict[str, int]:
    """Return the numbers of tokens."""
    return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}


def chat_logprobs(rows: list[tuple[str, float, list[tuple[str, float]]]]) -> dict[str, Any]:
    """Return log-probabilities as chat completions have them. rows: text, log-probability and likeliest of each token."""

    def entry(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": bounded(value), "bytes": list(text.encode())}

    return {
        "content": [
            entry(text, value) | {"top_logprobs": [entry(*one) for one in likeliest]} for text, value, likeliest in rows
        ],
        "refusal": None,
    }


def text_logprobs(rows: list[tuple[str, float, list[tuple[str, float]]]], offset: int = 0) -> dict[str, Any]:
    """Return log-probabilities as completions have them; offset: where the first token stands in the text."""
    offsets = [offset]
    for text, _, _ in rows[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": [text for text, _, _ in rows],
        "token_logprobs": [bounded(value) for _, value, _ in rows],
        "top_logprobs": [{text: bounded(value) for text, value in likeliest} for _, _, likeliest in rows],
        "text_offset": offsets[: len(rows)],
    }


def bounded(value: float) -> float:
    """Return a log-probability that JSON can hold; OpenAI's smallest is -9999."""
    return value if math.isfinite(value) else -9999.0
