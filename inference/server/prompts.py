"""From a request to the tokens that the model reads, and from the tokens of an answer back to what is sent."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from errors import UserError
from inference.served import ServedModel
from inference.server.protocol import Message, Refusal
from inference.streaming import CORRECTED, UNFINISHED
from models.tool_calls import check_tools, encode_tool_dialogue

LONGEST_TOKEN = 64  # characters, roughly: longer texts are not even encoded
FREE_SHARE = 4  # one in so many tokens of the context is kept for the answer when turns are left out


def chat_prompt(served: ServedModel, messages: Sequence[Message], tools: list[Any], wanted: int) -> tuple[list[int], int]:
    """Return the tokens of a dialogue, and how many messages were left out: the oldest turns, where all do not fit.

    wanted: tokens that the answer may have; a quarter of the context is kept for it at most. Raises Refusal.
    """
    plain = [message.plain() for message in messages]
    head = next((place for place, message in enumerate(plain) if message["role"] != "system"), 0)
    system, turns = plain[:head], plain[head:]
    begins = [0, *(place for place, message in enumerate(turns) if message["role"] == "user" and place)]
    given = [tool.function.model_dump() for tool in tools]
    with_tools = bool(given) or any(message["role"] == "tool" or "tool_calls" in message for message in plain)
    if with_tools and not writes_tools(served):
        raise Refusal(400, "tools: the dialogues of this model know none; ask without tools and results.", param="tools")
    limit = served.longest - min(wanted, served.longest // FREE_SHARE)

    @lru_cache(None)
    def prompt(first: int, limit: int = limit) -> list[int] | None:
        """Return the dialogue from this turn on, if it fits."""
        kept = [*system, *turns[begins[first] :]]
        if sum(len(message["content"]) for message in kept) > LONGEST_TOKEN * served.longest:
            return None
        ids = encoded(served, kept, given, with_tools)
        return ids if len(ids) <= limit else None

    first = 0 if prompt(0) else bisect_left(range(len(begins) - 1), True, key=lambda turn: prompt(turn) is not None)
    ids = prompt(first) or prompt(first, served.longest - 1)
    if ids is None:
        raise too_long(served, "the last question alone has")
    return ids, begins[first]


def encoded(served: ServedModel, messages: list[dict[str, Any]], tools: list[dict[str, Any]], with_tools: bool) -> list[int]:
    """Return the tokens of a dialogue up to where the answer begins. Raises Refusal for one that the model's form does not have."""
    try:
        if with_tools:
            tools = [{"type": "function", "function": tool} for tool in tools]
            return encode_tool_dialogue(served.tokenizer, served.template, messages, [], tools or None)[0]
        return served.template.encode_prompt(served.tokenizer, messages)
    except UserError as error:
        raise Refusal(400, f"messages: {error}", param="messages") from error


def writes_tools(served: ServedModel) -> bool:
    """Return True if dialogues with tools can be written."""
    try:
        check_tools(served.tokenizer, served.template)
    except UserError:
        return False
    return True


def text_prompt(served: ServedModel, prompt: str | list[int], rows: int) -> list[int]:
    """Return the tokens of a prompt that is text, or tokens already. rows: of the embedding. Raises Refusal."""
    if isinstance(prompt, str):
        if len(prompt) > LONGEST_TOKEN * served.longest:
            raise too_long(served, "the prompt has")
        prompt = served.tokenizer(prompt, verbose=False)["input_ids"]
    elif any(not 0 <= token < rows for token in prompt):
        raise Refusal(400, f"prompt: tokens are numbers from 0 to {rows - 1}.", param="prompt")
    if not prompt:
        raise Refusal(400, "prompt: it is empty; a model answers to a token at least.", param="prompt")
    if len(prompt) >= served.longest:
        raise too_long(served, "the prompt has")
    return prompt


def too_long(served: ServedModel, what: str) -> Refusal:
    """Return what is said of a prompt that does not fit."""
    return Refusal(
        400, f"{what} more tokens than the {served.longest} that the model reads; ask a shorter one.",
        code="context_length_exceeded", param="messages",
    )  # fmt: skip


# --- what a reward model reads ------------------------------------------------------------------------------------------


def score_tokens(served: ServedModel, prompt: str | list[Message], answer: str, ended: bool = True) -> list[int]:
    """Return the tokens of a dialogue and its answer, with the end token behind if it ended. Raises Refusal."""
    tokenizer, template = served.tokenizer, served.template
    if isinstance(prompt, str) and template.kind == "chatglm2" and prompt.startswith("[Round ") and prompt.endswith("答："):
        ids = [*template.prefix_ids, *tokenizer.encode_plain([prompt])[0], *template.suffix_ids]
    else:
        messages = written_messages(served, prompt) if isinstance(prompt, str) else [message.plain() for message in prompt]
        ids = encoded(served, messages, [], False)
    whole = template if ended else replace(template, answer_suffix="")
    ids = [*ids, *whole.encode_answer(tokenizer, answer)][: None if ended else -1]
    if len(ids) > served.longest:
        raise too_long(served, "a prompt and its answer have")
    return ids


def written_messages(served: ServedModel, text: str) -> list[dict[str, str]]:
    """Return the messages of a prompt as the template writes it without special tokens; of any other text one question."""
    for system in (False, True):
        messages = list(split_messages(text, marks(served.template, served.tokenizer, system), system))
        if messages and shown(served.template, served.tokenizer, messages) == text:
            return messages
    return [{"role": "user", "content": text}]


def shown(template: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return a dialogue as step 3 writes it for functions and endpoints that score."""
    return tokenizer.decode(template.encode_prompt(tokenizer, messages), skip_special_tokens=True)


def marks(template: Any, tokenizer: Any, system: bool) -> list[str]:
    """Return the texts around system message, question, answer and question, read off a dialogue."""
    words = ["sanbu one", "sanbu two", "sanbu three", "sanbu four"][not system :]
    roles = ["system", "user", "assistant", "user"][not system :]
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    try:
        text = shown(template, tokenizer, messages)
    except UserError:  # a form without system messages
        return []
    found = []
    for word in words:
        before, _, text = text.partition(word)
        found.append(before)
    return [*found, text]


def split_messages(text: str, marks: list[str], system: bool) -> Iterator[dict[str, str]]:
    """Cut a written prompt at its marks into messages; nothing comes where they do not fit, or less than was written."""
    if not marks or not text.startswith(marks[0]) or not text.endswith(marks[-1]) or not all(marks[-3:-1]):
        return
    rest = text.removeprefix(marks[0]).removesuffix(marks[-1])
    if system:
        content, _, rest = rest.partition(marks[1])
        yield {"role": "system", "content": content}
    to_answer, to_question = marks[-3], marks[-2]
    for turn in rest.split(to_question):
        question, answered, answer = turn.partition(to_answer)
        yield {"role": "user", "content": question}
        if answered:
            yield {"role": "assistant", "content": answer}


# --- what is sent -------------------------------------------------------------------------------------------------------


class AnswerText:
    """The text of an answer whose tokens come one by one. It ends before the first stop string.

    tokenizer: one that no other thread encodes with. chat: as the dialogue shows it, else as written.
    """

    def __init__(self, template: Any, tokenizer: Any, stops: Sequence[str], chat: bool) -> None:
        self.template, self.tokenizer, self.stops, self.chat = template, tokenizer, stops, chat
        self.held = CORRECTED if chat and template.kind.startswith("chatglm") else 0
        self.shown = ""

    def whole(self, tokens: Sequence[int]) -> str:
        """Return the text of these tokens."""
        if self.chat:
            text = self.template.decode_answer(self.tokenizer, tokens)
        else:
            kept = [token for token in tokens if token not in self.template.stop_token_ids]
            text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text[: min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=len(text))]

    def piece(self, tokens: Sequence[int], last: bool) -> str:
        """Return what can be shown of these tokens beyond what was shown before."""
        text = self.whole(tokens)
        if not last:
            text = text.rstrip(UNFINISHED)
            text = text[: max(0, len(text) - max(self.held, begun(text, self.stops)))]
        if len(text) <= len(self.shown) or not text.startswith(self.shown):  # a byte-fallback decoder takes characters back
            return ""
        piece, self.shown = text[len(self.shown) :], text
        return piece


def begun(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)


def token_rows(tokenizer: Any, answer: Any, first: int, stops: Sequence[int]) -> list[tuple[str, float, list[tuple[str, float]]]]:
    """Return text, log-probability and likeliest of an answer's tokens from ``first`` on, without the stop token."""

    def text(token: int) -> str:
        return tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    rows = zip(list(answer.tokens)[first:], answer.log_probs[first:], strict=False)
    return [
        (text(token), value, [(text(one), other) for one, other in likeliest])
        for token, (value, likeliest) in rows
        if token not in stops
    ]
