"""Answers that begin with their prompt once more, as sets for base models have them: {"prompt": "2+2=", "chosen": "2+2= 4"}.

One such answer may be meant so. Where all of a file begin so, the prompt is taken off: learned twice, it would be repeated.
Records are looked at, not fields, so that this holds for every format.
"""

import re

from training.utils.data.formats import Format, Record
from training.utils.data.rows import Columns, renamed
from training.utils.data.sources import Table
from training.utils.data.turns import BadRecord, Skip

REPEATED_PROMPTS = "all answers begin with their prompt, which is taken off them"
WHITE = re.compile(r"\s*")


def prompts_repeated(table: Table, form: Format, mapping: Columns) -> bool:
    """Return whether the answers of all records, and of more than one, begin with their prompt.

    Reads up to the first one that does not: in nearly all files the first.
    """
    if form.set_name:  # its rule knows
        return False
    several = 0
    for _, raw in table.read():
        try:
            records = [one for one in form.convert(renamed(raw, mapping)) if not isinstance(one, Skip)]
        except Skip:
            continue
        except (BadRecord, KeyError, TypeError, ValueError, AttributeError):  # the reading proper says what is wrong
            return False
        if not all(repeats_prompt(one) for one in records):
            return False
        several += len(records)
    return several > 1


def repeats_prompt(record: Record) -> bool:
    """Return whether all answers of a record are more than its newest question and begin with it."""
    question, answers = record["messages"][-1]["content"], filter(None, (record["chosen"], record["rejected"]))
    return bool(record["chosen"]) and not record["calls"] and all(rest_behind(question, one) for one in answers)


def rest_behind(question: str, answer: str) -> str | None:
    """Return what follows the question in an answer that begins with it; None if nothing does.

    White space within the question may be another: an instruction and its input are put together in several ways. A longer
    word is no repetition ("Blue", "Blueberries ..."). The space or the line breaks behind the question go, an indentation stays.
    """
    place = 0
    for word in question.split():
        place = WHITE.match(answer, place).end()
        if not answer.startswith(word, place):
            return None
        place += len(word)
    joint, rest = answer[max(place - 1, 0) : place + 1], answer[place:]
    if not place or not rest.strip() or (joint.isascii() and joint.isalnum() and len(joint) == 2):
        return None
    return rest[1:] if rest.startswith(" ") else rest.lstrip("\r\n")


def without_prompt(record: Record) -> Record:
    """Return a record whose answers, also the earlier ones, have lost the question that they begin with."""
    messages = [dict(turn) for turn in record["messages"]]
    for asked, turn in zip(record["messages"], messages[1:], strict=False):
        if turn["role"] == "assistant":
            turn["content"] = rest_behind(asked["content"], turn["content"]) or turn["content"]
    question = messages[-1]["content"]
    answers = {name: record[name] and rest_behind(question, record[name]) for name in ("chosen", "rejected")}
    return record | {"messages": messages} | answers
