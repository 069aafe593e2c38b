"""Turn the rows behind a --data_path into records of one form (formats.py), stored once in the cache.

Records are built one by one and written in small batches, so memory does not grow with the data.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow

from errors import UserError
from training.utils.data.arrow_rows import ArrowRows, arrow_writer
from training.utils.data.cache import CachedData, cached
from training.utils.data.fields import EMPTY, read_fields, unread_by_rule, unread_fields
from training.utils.data.formats import (
    RECORD_UNLEARNED,
    Format,
    Record,
    assistant_turn,
    judgement,
)
from training.utils.data.named_sets import NamedSet
from training.utils.data.names import known_names
from training.utils.data.repeated_prompts import REPEATED_PROMPTS, prompts_repeated, without_prompt
from training.utils.data.rows import MISSING, Columns, Reading, refuse_unused, renamed, row_format
from training.utils.data.scored_answers import ORDERS, check_preference
from training.utils.data.sources import Source, Table, open_source
from training.utils.data.suggested import advice
from training.utils.data.turns import BadRecord, Fields, Skip, check_media, is_learned

logger = logging.getLogger("sanbu")

Judged = tuple[Record, int, str]  # the record of an answer with a label, how many answers its dialogue has, where it stands

SCHEMA = pyarrow.schema(
    {
        "messages": pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})),
        "chosen": pyarrow.string(),
        "rejected": pyarrow.string(),
        "margin": pyarrow.float32(),
        "calls": pyarrow.string(),
    }
)
WRITE_BATCH = 500
REPEATED = "a turn of a history that is there already"
NO_JUDGEMENT = "a label that is neither good nor bad"
JUDGED_BAD = "an answer judged bad without a good one to the same prompt"
EARLIER_BAD = "an earlier answer of a dialogue judged bad"


def load_records(
    path: str, *, columns: Columns | None = None, cache_dir: str | None = None, alone: bool = True
) -> dict[str, ArrowRows]:
    """Return the records behind one --data_path as read_records does, and log what was left out.

    alone: no other set could have the fields of --columns, so this one must.
    """
    read = read_records(open_source(path), columns, cache_dir)
    if alone:
        check_columns_used([read], columns)
    for line in notes_of(read):
        logger.info("%s: %s", path, line)
    return read.datasets


def read_records(
    source: Source, columns: Columns | None = None, cache_dir: str | None = None, rebuild_id: str | None = None
) -> CachedData:
    """Return the records behind one --data_path: "train" and, if the set has its own held-out split, "eval".

    columns: for sets that are not recognised by themselves. The report holds the readings. Raise UserError with the file
    and the line or record number of what is wrong.
    """

    def build(folder: Path) -> dict[str, Any]:
        return {
            split: asdict(write_records(folder / f"{split}.arrow", tables, source.named, columns))
            for split, tables in source.splits.items()
        }

    return cached("records", record_content(source, columns), tuple(source.splits), build, cache_dir, rebuild_id)


def readings(read: CachedData) -> dict[str, Reading]:
    """Return the reading of each split."""
    return {split: Reading(**values) for split, values in read.report.items()}


def notes_of(read: CachedData) -> list[str]:
    """Return the notes on all splits."""
    words = {"train": "", "eval": "held out: "}
    return [f"{words[split]}{note}" for split, reading in readings(read).items() for note in reading.notes]


def check_columns_used(read: list[CachedData], columns: Columns | None) -> None:
    """Raise UserError if no set has the fields of --columns."""
    refuse_unused(columns, (reading for one in read for reading in readings(one).values()))


def record_content(source: Source, columns: Columns | None) -> list[Any]:
    """Return all that decides the records of a source, as JSON values."""
    return [*source.content, sorted((columns or {}).items())]


def write_records(file: Path, tables: list[Table], named: NamedSet | None, columns: Columns | None) -> Reading:
    """Write the records of some tables into one Arrow file. Raise UserError if there is none."""
    reading = Reading()
    records = chain.from_iterable(table_records(table, named, columns, reading) for table in tables)
    with arrow_writer(file, SCHEMA) as write:
        while batch := list(islice(records, WRITE_BATCH)):
            write(batch)
            reading.records += len(batch)
    reading.form += ", ".join(reading.fields)
    labels = ", ".join(table.label for table in tables)
    left_out = reading.left_out_words()
    if not reading.records:
        raise UserError(
            f"{labels}: " + (f"no usable record; left out {left_out}." if left_out else "no records in it.")
        )
    if left_out:
        reading.notes.append(f"{reading.records} records; left out {left_out}")
    for words, content in (("texts in fields that are not read", True), ("fields without content, not read", False)):
        names = [name for name, looks_so in reading.unread.items() if looks_so == content]
        if names:
            more = "; --columns says what a field is (docs/en/own-data.md)" if content else ""
            reading.notes.append(f"{words}: {', '.join(names)}{more}")
    # The cache goes by content: a copy of the data under another path has the same notes.
    for table in tables:
        name = f"{Path(table.label).name}, " if len(tables) > 1 else ""
        reading.notes = [note.replace(f"{table.label}, ", name) for note in reading.notes]
    return reading


def table_records(table: Table, named: NamedSet | None, columns: Columns | None, reading: Reading) -> Iterator[Record]:
    """Yield the records of one table. The first row decides the format, and every later row must have its fields.

    reading: counts what is left out and not read.
    """
    form: Format | None = None
    seen: dict[bytes, bool] = {}
    judged: dict[str, tuple[list[Judged], list[Judged]]] = {}
    judges: bool | None = None  # whether labels say good or bad, as the first one does
    for location, raw in table.read():
        wrapper = location.partition(" under ")[2]
        location = f"{table.label}, {location}"
        if form is None:
            form, mapping = row_format(raw, named, columns, location, reading)
            reading.notes += [f"{table.label}, the records are those under {wrapper}"] if wrapper else []
            repeats = prompts_repeated(table, form, mapping)
            reading.notes += [f"{table.label}, {REPEATED_PROMPTS}"] if repeats else []
            reading.form = reading.form or (f"the rule of {form.set_name}" if form.set_name else "its fields ")
            reading.advice = reading.advice or advice(raw)
        row = raw if form.set_name else renamed(raw, mapping)
        check_needed(form, row, raw, mapping, location)
        try:
            check_media(raw)
            check_preference(row)
            results = form.convert(row)
            if repeats:
                results = [one if isinstance(one, Skip) else without_prompt(one) for one in results]
            answers = max(1, sum(not isinstance(one, Skip) for one in results))
            if not form.set_name and not is_learned(row, "the record"):
                raise Skip(RECORD_UNLEARNED, answers)
            good = judgement(form, row)
            if form.judged and row.get("label") not in EMPTY:
                judges = good is not None if judges is None else judges
                if judges and good is None:
                    raise Skip(NO_JUDGEMENT, answers)
                if good is not None and not judges:  # taken for no judgement, a bad answer would be learned
                    raise BadRecord(
                        f'field "label" is {row["label"]!r}, which says whether the answer is good, and the first label does not; '
                        "put a record with such a label first, or rename the field if it means something else"
                    )
        except Skip as reason:
            reading.leave_out(str(reason), reason.answers, location)
            continue
        except BadRecord as error:
            raise UserError(f"{location}: {error}.") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if not form.set_name:
                raise
            raise UserError(f"{location}: not of the form of {form.set_name} ({error!r}).") from error
        if form.set_name:
            reading.unread |= unread_by_rule(row, named.fields)
        else:
            theirs = {} if row is raw else {ours: name for name, ours in known_names(raw).items()} | mapping
            read = read_fields(row, form)
            for name, content in unread_fields(row, read).items():
                alone = " (it orders a list of answers; there is none)" if name in ORDERS else ""
                outer, dot, inner = name.partition(".")
                reading.unread[(theirs.get(name) or theirs.get(outer, outer) + dot + inner) + alone] = content
            for ours in read:
                reading.fields[f"{ours}={theirs[ours]}" if theirs.get(ours, ours) != ours else ours] = True
        records = [one for one in results if not isinstance(one, Skip)]
        for reason in (one for one in results if isinstance(one, Skip)):
            reading.leave_out(str(reason), reason.answers, location)
        if form.history:
            records = list(
                without_repeats(records, row.get(form.history, MISSING) is not MISSING, seen, reading, location)
            )
        if good is not None and judges and records:  # the label judges the last answer
            sides = judged.setdefault(json.dumps(records[-1]["messages"]), ([], []))
            sides[not good].append((records[-1], len(records), location))
            records = records[:-1] if good else []
        yield from records
    yield from paired(judged, reading)


def paired(judged: dict[str, tuple[list[Judged], list[Judged]]], reading: Reading) -> Iterator[Record]:
    """Yield the answers judged good, each with one to the same question that was judged bad, as long as there are some.

    They are held until the whole table is read: the two need not be neighbours. Bad ones that are left over are counted.
    """
    for good, bad in judged.values():
        for (record, _, _), (worse, answers, location) in zip(good, bad, strict=False):
            yield as_pair(record, worse)
            if answers > 1:
                reading.leave_out(EARLIER_BAD, answers - 1, location)
        yield from (record for record, _, _ in good[len(bad) :])
        for _, answers, location in bad[len(good) :]:
            reading.leave_out(JUDGED_BAD, answers, location)


def as_pair(good: Record, bad: Record) -> Record:
    """Return the record of a good answer with a bad one to the same prompt as the rejected one."""
    calls = None
    if good["calls"] or bad["calls"]:
        answers = [json.loads(one["calls"])["chosen"] if one["calls"] else assistant_turn(one["chosen"]) for one in (good, bad)]
        both = dict(zip(("chosen", "rejected"), answers, strict=True))
        calls = json.dumps(json.loads(good["calls"] or bad["calls"]) | both, ensure_ascii=False)
    return good | {"rejected": bad["chosen"], "calls": calls}


def check_needed(form: Format, row: Fields, raw: Fields, mapping: Columns, location: str) -> None:
    """Raise UserError if a row lacks a field of the format."""
    missing = next((name for name in form.needed if row.get(name) is None), None)
    if missing is not None:
        theirs = ({ours: name for name, ours in known_names(raw).items()} | mapping).get(missing, missing)
        present = ", ".join(name for name, value in raw.items() if value is not None) or "nothing"
        wrong = f'field "{theirs}" is null' if theirs in raw else f'no field "{theirs}"'
        raise UserError(
            f"{location}: {wrong} (found: {present}). Give every record one, as the "
            "first record has, or put records of another kind into a file of their own."
        )


def without_repeats(
    records: list[Record], has_history: bool, seen: dict[bytes, bool], reading: Reading, location: str
) -> Iterator[Record]:
    """Yield the turns that were not there before. Equal rows that have no history stay: somebody repeated them on purpose.

    has_history: the row has that field. seen: the turns so far -> whether one of a row with a history was among them.
    """
    for record in records:
        turn = json.dumps([record["messages"], record["chosen"], record["rejected"]])
        key = hashlib.blake2b(turn.encode(), digest_size=12).digest()
        before = seen.get(key)
        seen[key] = has_history or before is True
        if before or (has_history and before is not None):
            reading.leave_out(REPEATED, 0, location)
        else:
            yield record
