"""Find the records that are the answers of one dialogue, and the parts of it that fit into one sequence.

A record holds one answer and the dialogue before it. Where the template writes an answer in the history with the tokens that
are learned, the records of a dialogue become one row, in which every answer is a target: no token of it sees what comes
later, so loss and gradient are those of the records. That is looked up in the tokens of each dialogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from models.templates import Template
from training.utils.data.formats import Record


@dataclass(frozen=True)
class Example:
    """A record with the tokens of its prompt and of the answers that the step needs."""

    record: Record
    prompt: list[int]
    answers: list[list[int]]


def continues(record: Record, before: Record) -> bool:
    """Return whether the dialogue of a record goes on from the answer of another one."""
    asked = before["messages"]
    return record["messages"][: len(asked) + 1] == [*asked, {"role": "assistant", "content": before["chosen"]}]


def grouped(records: Iterable[Any], record_of: Callable[[Any], Record] = lambda record: record) -> list[list[Any]]:
    """Return neighbours that are answers of one dialogue together. record_of: gives the record of each item."""
    groups: list[list[Any]] = []
    for one in records:
        if groups and continues(record_of(one), record_of(groups[-1][-1])):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def whole_dialogues(batches: Iterable[list[Record]]) -> Iterator[list[Record]]:
    """Yield batches of records again such that none ends within a dialogue."""
    waiting: list[Record] = []
    for batch in batches:
        *complete, waiting = grouped([*waiting, *batch])
        yield [record for dialogue in complete for record in dialogue]
    yield waiting


def stands_in(earlier: Example, later: Example, template: Template) -> bool:
    """Return whether the prompt of a later example begins with an earlier one, its answer's end token aside.

    The history of ChatGLM3 has the next role's token there. Never for ChatGLM-6B, whose positions depend on where the prompt
    ends, nor in dialogues with tools, whose calls may end in another token than answers do.
    """
    if template.kind == "chatglm" or earlier.record["calls"] or later.record["calls"]:
        return False
    tokens = [*earlier.prompt, *earlier.answers[0][:-1]]
    return later.prompt[: len(tokens)] == tokens and len(later.prompt) > len(tokens)


def newest_turns(
    examples: list[Example], tokenizer: Any, template: Template, fits: Callable[[Example], bool]
) -> list[Example]:
    """Return the newest examples of a dialogue that fit into one row, without the oldest whole turns that are too much.

    examples: of which each stands in the last one. The newest question stays, however long it is.
    """
    last = examples[-1]
    messages = last.record["messages"]
    if fits(last):
        return examples
    system = [turn for turn in messages[:1] if turn["role"] == "system"]
    starts = [place for place, turn in enumerate(messages) if place and messages[place - 1]["role"] == "assistant"]
    newest = None
    for place in reversed(starts):
        shorter = replace(last, prompt=template.encode_prompt(tokenizer, system + messages[place:]))
        if newest and not fits(shorter):
            break
        start, newest = place, shorter
    if newest is None:
        return [last]
    members = [one for one in examples[:-1] if len(one.record["messages"]) > start]
    prompts = template.encode_prompts(tokenizer, [system + one.record["messages"][start:] for one in members])
    members = [replace(one, prompt=prompt) for one, prompt in zip(members, prompts, strict=True)]
    while not all(stands_in(one, newest, template) for one in members):
        members.pop(0)
    return [*members, newest]
