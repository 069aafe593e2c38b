"""Answers that begin with their prompt once more, as sets for base models have them: {"prompt": "2+2=", "chosen": "2+2= 4"}.

One such answer may be meant so. Where all of a file begin so, the prompt is taken off: learned twice, it would be repeated.
"""

from training.utils.data.formats import Format
from training.utils.data.rows import Columns, renamed
from training.utils.data.sources import Table
from training.utils.data.turns import Fields, split_turns

REPEATED_PROMPTS = "all answers begin with their prompt, which is taken off them"
ASKED, ANSWERS = ("prompt", "instruction"), ("chosen", "rejected", "response", "output")


def prompts_repeated(table: Table, form: Format, mapping: Columns) -> tuple[str, ...]:
    """Return the fields of the prompt and of its answers if in all rows, and more than one, these begin with it; else ().

    Reads up to the first row where one does not: in nearly all files the first.
    """
    fields = tuple(name for names in (ASKED, ANSWERS) for name in names if name in form.needed)
    if len(fields) < 2 or fields[0] not in ASKED:
        return ()
    several = False
    for place, (_, raw) in enumerate(table.read()):
        if not repeats_prompt(renamed(raw, mapping), fields):
            return ()
        several = place > 0
    return fields if several else ()


def repeats_prompt(row: Fields, fields: tuple[str, ...]) -> bool:
    """Return whether all answers of a row are more than its prompt and begin with it. Dialogues as text are read elsewhere."""
    prompt, *answers = (row.get(name) for name in fields)
    texts = all(isinstance(one, str) for one in (prompt, *answers)) and bool(prompt.strip())
    start = prompt.rstrip() if texts else ""
    return texts and all(continues(start, one) for one in answers) and not split_turns(prompt)


def continues(start: str, answer: str) -> bool:
    """Return whether an answer is more than this text and begins with it, not with a longer word ("Blue", "Blueberries ...")."""
    joint = answer[len(start) - 1 : len(start) + 1]
    within_word = joint.isascii() and joint.isalnum() and len(joint) == 2
    return answer.startswith(start) and bool(answer[len(start) :].strip()) and not within_word


def without_prompt(row: Fields, fields: tuple[str, ...]) -> Fields:
    """Return a row whose answers have lost the prompt, and the space or the line breaks behind it.

    White space at the end of a prompt is of no account, as in training: behind a line break an indentation stays whole.
    """
    start = row[fields[0]].rstrip()
    rest = {name: row[name].removeprefix(start) for name in fields[1:]}
    return row | {name: one[1:] if one.startswith(" ") else one.lstrip("\r\n") for name, one in rest.items()}
