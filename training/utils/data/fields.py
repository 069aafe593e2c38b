"""Say which fields of a row its format reads, and which it does not."""

from collections.abc import Collection, Iterator
from typing import Any

from training.utils.data.formats import Format, judgement
from training.utils.data.names import NO_CONTENT, PREFERENCE, known_names, plain_name, says_nothing
from training.utils.data.scored_answers import ORDERS, TEXTS, scored_answers
from training.utils.data.turns import LEARN_MARKS, MESSAGE_FIELDS, OF_TOOLS, Fields, is_turns, role_of

EMPTY = (None, "", [], {})


def read_fields(row: Fields, form: Format) -> list[str]:
    """Return the fields of a format that a row is read by: those that hold something, in the order of the format.

    Scores and ranks say the order of several answers; a label counts where it judges, a mark says whether to learn the record.
    """
    unused = {"label"} if judgement(form, row) is None else set()
    unused |= set() if any(is_turns(row.get(name)) for name in ("response", "output")) else set(ORDERS)
    names = (*form.needed, *(name for name in form.optional if row.get(name) not in EMPTY), *(["label"] if form.judged else []))
    marks = [name for name in LEARN_MARKS if row.get(name) not in EMPTY]
    ties = [name for name in row if plain_name(name) in PREFERENCE and row.get("rejected") is not None]
    return [*(name for name in names if name not in unused), *marks, *ties]


def unread_fields(row: Fields, read: Collection[str]) -> dict[str, bool]:
    """Return the fields that hold something and are not read -> whether they look like content. read: those of read_fields.

    A text that stands in the fields that are read too is not missing.
    """
    read = set(read)
    unread = {}
    for name, value in row.items():
        if name in read - {"tools", "answers", "paragraphs", "qas"} and isinstance(value, list):
            reads = read_in_answer if name in ("response", "output") and scored_answers(value) else read_in_turn
            inner = {key for item in value if isinstance(item, dict) for key in item if item[key] and not reads(key, item)}
            unread |= {f"{name}.{key}": key not in NO_CONTENT for key in inner}
        elif name not in read and value not in EMPTY:
            if set(texts_in(value)) - {""} <= set(texts_in([row.get(one) for one in read])) and any(texts_in(value)):
                continue  # such as the question beside its dialogue
            unread[name] = not says_nothing(name) and any(texts_in(value))
    return unread


def unread_by_rule(row: Fields, fields: tuple[str, ...]) -> dict[str, bool]:
    """Return the fields that hold something and that the rule of a named set does not read, as unread_fields does."""
    others = {name: value for name, value in row.items() if name not in fields and value not in EMPTY}
    return {name: not says_nothing(name) and any(texts_in(value)) for name, value in others.items()}


def read_in_turn(name: str, turn: Fields) -> bool:
    """Return whether a field of a turn is read: the name is that of a tool, and templates write none of a user."""
    return name in MESSAGE_FIELDS and (name not in OF_TOOLS or role_of(turn) == "tool")


def read_in_answer(name: str, answer: Fields) -> bool:
    """Return whether a field of an answer that stands with its score is read."""
    return known_names(answer).get(name, name) in (*TEXTS, *ORDERS)


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts within a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts_in(one)
