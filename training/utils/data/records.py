"""Turn the rows behind a --data_path into records of one form (formats.py), stored once in the cache.

Records are built one by one and written in small batches, so memory does not grow with the data.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from errors import UserError
from training.utils.data.cache import arrow_writer, cached
from training.utils.data.formats import OUR_NAMES, BadRecord, Fields, Format, Record, Skip, recognise
from training.utils.data.named_sets import NamedSet
from training.utils.data.sources import Source, Table, open_source

logger = logging.getLogger("sanbu")

Columns = dict[str, str]  # our name of a field -> its name in the data; "a.b" looks inside

FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": Value("string")}],
        "chosen": Value("string"),
        "rejected": Value("string"),
        "margin": Value("float32"),
    }
)
WRITE_BATCH = 500
MISSING = object()
REPEATED = "a turn of a history that is there already"


def load_records(
    path: str | Source, *, columns: Columns | None = None, cache_dir: str | None = None, rebuild_id: str | None = None
) -> dict[str, Dataset]:
    """Return the records behind one --data_path: {"train": Dataset} and, if the set has its own held-out split, "eval".

    columns: for sets that are not recognised by themselves. cache_dir, rebuild_id: see cache.cached. Raise UserError with
    the file and the line or record number of what is wrong.
    """
    source = open_source(path) if isinstance(path, str) else path

    def build(folder: Path) -> list[str]:
        notes: list[str] = []
        for split, tables in source.splits.items():
            write_records(folder / f"{split}.arrow", tables, source.named, columns, notes)
        return notes

    content = record_content(source, columns)
    found = cached("records", content, tuple(source.splits), build, cache_dir, rebuild_id)
    for note in found.report:
        logger.info("%s", note)
    return found.datasets


def record_content(source: Source, columns: Columns | None) -> list[Any]:
    """Return all that decides the records of a source, as JSON values."""
    return [*source.content, sorted((columns or {}).items())]


def write_records(
    file: Path, tables: list[Table], named: NamedSet | None, columns: Columns | None, notes: list[str]
) -> None:
    """Write the records of some tables into one Arrow file. Raise UserError if there is none."""
    skipped: Counter[str] = Counter()
    records = chain.from_iterable(table_records(table, named, columns, skipped, notes) for table in tables)
    written = 0
    with arrow_writer(file, FEATURES.arrow_schema) as write:
        while batch := list(islice(records, WRITE_BATCH)):
            write(batch)
            written += len(batch)
    left_out = ", ".join(f"{count} with {reason}" for reason, count in skipped.most_common())
    labels = ", ".join(table.label for table in tables)
    if not written:
        raise UserError(f"{labels}: " + (f"no usable record; left out {left_out}." if skipped else "no records in it."))
    if skipped:
        notes.append(f"{labels}: {written} records; left out {left_out}")


def table_records(
    table: Table, named: NamedSet | None, columns: Columns | None, skipped: Counter[str], notes: list[str]
) -> Iterator[Record]:
    """Yield the records of one table. The first row decides the format, and every later row must have its fields.

    skipped: counts what is left out, by reason. notes: gets a line where the rows are not read as the user asked.
    """
    form: Format | None = None
    seen: dict[bytes, bool] = {}
    for location, row in table.read():
        location = f"{table.label}, {location}"
        form = form or row_format(row, named, columns, location, notes)
        for field in form.needed:
            if field_of(row, field) is None:
                present = ", ".join(name for name, value in row.items() if value is not None) or "nothing"
                raise UserError(
                    f'{location}: no field "{field}" (found: {present}). Give every record one, as the first record '
                    "has, or put records of another kind into a file of their own."
                )
        try:
            records = form.convert(row)
        except Skip as reason:
            skipped[str(reason)] += 1
            continue
        except BadRecord as error:
            raise UserError(f"{location}: {error}.") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if not form.set_name:
                raise
            raise UserError(f"{location}: not of the form of {form.set_name} ({error!r}).") from error
        if form.history:
            records = without_repeats(records, field_of(row, form.history, MISSING) is not MISSING, seen, skipped)
        yield from records


def without_repeats(
    records: list[Record], has_history: bool, seen: dict[bytes, bool], skipped: Counter[str]
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
            skipped[REPEATED] += 1
        else:
            yield record


def row_format(
    row: Fields, named: NamedSet | None, columns: Columns | None, location: str, notes: list[str]
) -> Format:
    """Choose the format by --columns, else the named set, else the fields of the first row. Raise UserError if none fits."""
    missing = [theirs for theirs in (columns or {}).values() if field_of(row, theirs, MISSING) is MISSING]
    if columns and not missing:
        return mapped_format(columns)
    found = recognise(row)
    ruled = named is not None and named.rule is not None
    if columns and (len(missing) < len(columns) or not (found or ruled)):
        raise UserError(f'{location}: --columns names "{missing[0]}", which is not there (found: {", ".join(row)}).')
    if columns:
        notes.append(f"{location}: without the fields of --columns, so read by its own fields")
    if ruled and all(field in row for field in named.fields):
        return Format((), named.rule, set_name=named.names[0])
    if ruled:
        wanted = ", ".join(named.fields)
        notes.append(f"{location}: without the fields of {named.names[0]} ({wanted}), so read by its own")
    if found is None:
        raise UserError(f"{location}: {unknown_fields(row)}")
    return found


def mapped_format(columns: Columns) -> Format:
    """Return the format that the fields of --columns make under our names. Raise UserError if they make none."""
    unknown = [ours for ours in columns if ours not in OUR_NAMES]
    if unknown:
        raise UserError(f"--columns {unknown[0]}=…: no such name of ours; use {', '.join(OUR_NAMES)}.")
    found = recognise(columns)
    if found is None:
        given = ",".join("=".join(pair) for pair in columns.items())
        raise UserError(
            f"--columns {given}: these do not make a record; map at least prompt and response, or prompt, chosen and "
            "rejected, or messages, or prompt alone."
        )
    return Format(
        needed=tuple(columns[name] for name in found.needed),
        convert=lambda row: found.convert({ours: field_of(row, theirs) for ours, theirs in columns.items()}),
        history=columns.get(found.history, ""),
    )


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
    fields = ", ".join(row)
    if {"text", "label"} <= set(row):
        return (
            f"labelled texts (fields {fields}) are no dialogues, and no step trains on labels; "
            "--columns prompt=text takes the texts as prompts for step 3."
        )
    if "chosen" in row and "rejected" not in row:
        return f'no field "prompt" or "rejected" (found: {fields}); pairs need prompt, chosen and rejected.'
    return (
        f"the fields {fields} are no known format (prompt/chosen/rejected, prompt/response, messages, "
        "conversations, instruction/output, content/summary, prompt); say which is which, for example "
        "--columns prompt=question,response=answer (docs/en/own-data.md)."
    )
