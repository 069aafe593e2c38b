"""Choose the format of a table by its first row and --columns. Imports none of the libraries that read data."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from errors import UserError, refuse
from training.utils.data.fields import read_fields, unread_fields
from training.utils.data.formats import Format, recognise
from training.utils.data.named_sets import NamedSet
from training.utils.data.names import OUR_NAMES, clear_columns, known_names, says_nothing, with_our_names
from training.utils.data.suggested import advice
from training.utils.data.turns import Fields

Columns = dict[str, str]  # our name of a field -> its name in the data; "a.b" looks inside
MISSING = object()


@dataclass
class Reading:
    """The fate of the rows of one split, as the report of a data set tells it."""

    form: str = ""  # what the rows were read by: the rule of a named set, or fields
    fields: dict[str, bool] = field(default_factory=dict)  # those that were read, as --columns writes them; in order
    records: int = 0
    # reason -> [times, answers that it cost, where it was first met]
    left_out: dict[str, list[Any]] = field(default_factory=dict)
    unread: dict[str, bool] = field(default_factory=dict)  # fields that are not read -> whether they look like content
    notes: list[str] = field(default_factory=list)
    columns_used: bool = False
    advice: str = ""  # what to do about fields of the first row that are not understood

    def leave_out(self, reason: str, answers: int, location: str) -> None:
        """Count what is left out."""
        counted = self.left_out.setdefault(reason, [0, 0, location])
        counted[0] += 1
        counted[1] += answers

    def left_out_words(self) -> str:
        """Return the counts in words: "2 with an empty turn (5 answers; first: line 3)"."""
        return ", ".join(
            f"{count} with {reason} ({f'{answers} answers; ' if answers > 1 else ''}first: {first})"
            for reason, (count, answers, first) in sorted(self.left_out.items(), key=lambda item: -item[1][0])
        )


def refuse_unused(columns: Columns | None, readings: Iterable[Reading]) -> None:
    """Raise UserError if no set has the fields of --columns."""
    given = ",".join("=".join(pair) for pair in (columns or {}).items())
    sentence = f"--columns {given}: no data set has these fields; leave the flag out, or correct the names."
    refuse(columns and not any(reading.columns_used for reading in readings), sentence)


def row_format(
    row: Fields, named: NamedSet | None, columns: Columns | None, location: str, reading: Reading
) -> tuple[Format, Columns]:
    """Choose the format by --columns, else the named set, else the fields of the first row; also return the columns to use.

    Where the known names leave a text unread, or make no format, the usual names of a question and its answer may do better.
    Raise UserError if none fits.
    """
    unknown = [ours for ours in columns or () if ours not in OUR_NAMES]
    if unknown:
        raise UserError(f"--columns {unknown[0]}=…: no such name of ours; use {', '.join(OUR_NAMES)}.")
    missing = [theirs for theirs in (columns or {}).values() if field_of(row, theirs, MISSING) is MISSING]
    if columns and not missing:
        reading.columns_used = True
        return mapped_format(row, columns), columns
    found, clear = recognise(with_our_names(row)), clear_columns(row)
    if clear and not reads_all(row, {}, found) and reads_all(row, clear, better := recognise(renamed(row, clear))):
        found = better
    else:
        clear = {}
    ruled = named is not None and named.rule is not None
    if columns and (len(missing) < len(columns) or not (found or ruled)):
        raise UserError(f'{location}: --columns names "{missing[0]}", which is not there (found: {", ".join(row)}).')
    if columns:
        reading.notes.append(f"{location}: without the fields of --columns, so read by its own fields")
    if ruled and all(field in row for field in named.fields):
        return Format((), named.rule, set_name=named.names[0]), {}
    if ruled:
        wanted = ", ".join(named.fields)
        reading.notes.append(f"{location}: without the fields of {named.names[0]} ({wanted}), so read by its own")
    if found is None:
        raise UserError(f"{location}: {unknown_fields(row)}")
    return found, clear


def reads_all(row: Fields, columns: Columns, found: Format | None) -> bool:
    """Return whether a format reads all texts of a row, its names changed by columns."""
    row = renamed(row, columns)
    return found is not None and not any(unread_fields(row, read_fields(row, found)).values())


def mapped_format(row: Fields, columns: Columns) -> Format:
    """Return the format that the fields of --columns make together with the others. Raise UserError if they make none."""
    found = recognise(renamed(row, columns), mapped=set(columns))
    if found is None:
        given = ",".join("=".join(pair) for pair in columns.items())
        raise UserError(
            f"--columns {given}: these do not make a record; map at least prompt and response, or prompt, chosen and "
            "rejected, or messages, or prompt alone."
        )
    return found


def renamed(row: Fields, columns: Columns) -> Fields:
    """Return a row under our names: what --columns maps, and the other fields that are known.

    A field of a name that --columns gives to another, and one that it looks inside, have longer names: they are told as not
    read where they hold more.
    """
    if not columns:
        return with_our_names(row)
    mapped, made = set(columns.values()), {ours: field_of(row, theirs) for ours, theirs in columns.items()}
    inside = {theirs.split(".")[0] for theirs in mapped if theirs not in row}
    others = {name: value for name, value in row.items() if name not in mapped | inside | made.keys()}
    known = {name: ours for name, ours in known_names(others).items() if ours not in made}
    rest = {f"{name} (the rest)": row[name] for name in inside if name in row}
    rest |= {f"{name} (of the file)": row[name] for name in made if name in row and name not in mapped | inside}
    return {known.get(name, name): value for name, value in others.items()} | rest | made


def field_of(row: Fields, name: str, default: Any = None) -> Any:
    """Return a field of a row; "question.full_text" and "answers.0" look inside."""
    if name in row:
        return row[name]
    value: Any = row
    for step in name.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return default
    return value


def unknown_fields(row: Fields) -> str:
    """Say what is wrong with the fields of a row that fits no format."""
    if not row:
        return "an empty record, {}; remove it, or give it fields (docs/en/own-data.md)."
    fields = ", ".join([*islice(row, 8), "…"] if len(row) > 8 else row)
    empty = [name for name, value in row.items() if value == []]
    if empty and all(name in empty or says_nothing(name) for name in row):
        return f'no records in it: the list "{empty[0]}" is empty.'
    lists = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) > 1 and len(lists) == len(row):
        return f"several lists of records ({', '.join(lists)}); write each into a file of its own, and name those to train on."
    if {"text", "label"} <= set(row):
        return (
            f"labelled texts (fields {fields}) are no dialogues, and no step trains on labels; "
            "--columns prompt=text takes the texts as prompts for step 3."
        )
    if all(isinstance(value, str) for value in row.values()) and any(re.search("[?!。？！]|( .*){4}", name) for name in row):
        return f"the names of the fields read like texts ({fields}); put a line with the columns' names first: prompt,response."
    if {"message_id", "parent_id"} <= set(row):
        return "a message of a tree (message_id, parent_id); write each path from a first message to a last one as messages."
    if [name for name, value in row.items() if isinstance(value, str) and not says_nothing(name)] == ["text"]:
        return (
            "a text by itself; if it is a dialogue in the form of some template, write its turns as messages; "
            "--columns prompt=text takes the texts as prompts for step 3."
        )
    if "chosen" in row and "rejected" not in row:
        return f'no field "prompt" or "rejected" (found: {fields}); pairs need prompt, chosen and rejected.'
    return (
        f"the fields {fields} are no known format (prompt/chosen/rejected, prompt/response, messages, "
        "conversations, instruction/output, content/summary, prompt); say which is which"
        f"{advice(row)} (docs/en/own-data.md)."
    )
