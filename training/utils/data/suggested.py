"""What --columns could be for a row that fits no format."""

import re
from typing import Any

from training.utils.data.names import says_nothing
from training.utils.data.scored_answers import scored_answers
from training.utils.data.turns import ROLES, BadRecord, Skip, is_alternating, items, messages_of, role_of

QUESTION = re.compile("question|query|prompt|instruction|input|request|ask|^user$|^human$|问|指令|输入", re.IGNORECASE)
TALK = re.compile("dialog|conversation|messages|chat|^data$|utterances|对话", re.IGNORECASE)
ANSWER = re.compile(
    "answer|response|output|reply|target|completion|summary|solution|chosen|good|better|win(?!ner)|^assistant$|^bot$|^gpt$|答|输出",
    re.IGNORECASE,
)
WORSE = re.compile("neg|bad|reject|worse|lose|other|_k$|差", re.IGNORECASE)
TWINS = {"0": "1", "1": "2", "a": "b", "A": "B"}
NUMBER, LETTER = re.compile(r"[-+]?\d+([.,/]\d+)?"), re.compile(r"\(?[A-J]\)?\.?")  # a letter: of a choice in a list


def suggested_columns(row: dict[str, Any]) -> str:
    """Return what --columns could be for a row: its one list of messages, or its texts by their names; else ""."""
    dialogues = [name for name, value in row.items() if is_dialogue(value) or (TALK.search(name) and is_alternating(value))]
    if dialogues:
        return f"messages={dialogues[0]}" if len(dialogues) == 1 else ""
    texts = [name for name, value in row.items() if isinstance(value, str) and not says_nothing(name)]
    choices = [NUMBER, LETTER] if any(isinstance(value, (list, dict)) for value in row.values()) else [NUMBER]
    texts = [name for name in texts if row[name] not in row and not any(one.fullmatch(row[name].strip()) for one in choices)]
    asked = next((name for name in texts if QUESTION.search(name) and not ANSWER.search(name)), None)
    others = [name for name in texts if name != asked]
    worse = next((name for name in others if WORSE.search(name)), None)
    better = next((name for name in others if name != worse and (worse or ANSWER.search(name))), None)
    ranked = [name for name, value in row.items() if (found := scored_answers(value)) and found[1]]
    if asked and len(ranked) == 1:
        better, worse = ranked[0], None
    if not asked or not better or better in two_answers(row):
        return ""
    columns = {"prompt": asked} | ({"chosen": better, "rejected": worse} if worse else {"response": better})
    return ",".join(f"{ours}={theirs}" for ours, theirs in columns.items() if ours != theirs)


def advice(row: dict[str, Any]) -> str:
    """Return the end of a sentence on a row that is not understood: what to do about its fields."""
    columns, two = suggested_columns(row), two_answers(row)
    if two:
        return f": write the better one of {' and '.join(two)} as chosen, the other as rejected, and leave out ties"
    return f", for example --columns {columns}" if columns else " with --columns, or write it in one of these forms"


def two_answers(row: dict[str, Any]) -> list[str]:
    """Return the names of two answers that differ in their number or letter (response_a, response_b); [] if there are none.

    Another field may say which of them is the better one, so that none of them alone is the answer.
    """
    answers = [name for name, value in row.items() if len(name) > 1 and (isinstance(value, str) or is_dialogue(value))]
    for one in answers:
        other = one[:-1] + TWINS.get(one[-1], "")
        if one[-1] in TWINS and other in answers and (ANSWER.search(one) or TALK.search(one)):
            return [one, other]
    return []


def is_dialogue(value: Any) -> bool:
    """Return whether a value can be read as messages of a user and an assistant, and is no list of records."""
    if not isinstance(value, (list, dict)) and not str(value).lstrip().startswith("["):
        return False
    try:
        turns = items(value, "")
        roles = {turn["role"] for turn in messages_of(turns, "")}
    except (BadRecord, Skip):
        return False
    return {"user", "assistant"} <= roles and all(role_of(turn) or ROLES.keys() & turn.keys() for turn in turns)
