"""Read data files row by row: JSON, JSONL, CSV, TSV, Parquet, each gzipped or not. Nothing here knows about columns.

A list of messages where a record is expected is the row {"messages": the list}. A file of one object whose only list of
objects is no list of messages is a wrapper, {"version": …, "data": [records]}: its rows are those of the list.

Each row comes with its location ("line 7", "record 7"), so that an error can name it. A file is not held in memory,
but for a wrapper: a JSON list of several gigabytes is parsed record by record.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from errors import UserError
from json_text import parse_json, unique_names
from training.utils.data.formats import recognise
from training.utils.data.names import OUR_NAMES, clear_columns, known_names, with_our_names
from training.utils.data.suggested import is_dialogue
from training.utils.data.turns import is_alternating

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
CHUNK = 1 << 20
LONGEST_RECORD = 256 << 20
WHITE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder(object_pairs_hook=unique_names)
Row = tuple[str, dict[str, Any]]


def data_suffix(path: Path) -> str | None:
    """Return ".json" for a.json and a.json.gz; None for a file that is not one of SUFFIXES."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def looks_local(path: str) -> bool:
    """Return whether a path cannot be a hub id (NAME or OWNER/NAME)."""
    return path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1 or bool(data_suffix(Path(path)))


def read_rows(path: Path) -> Iterator[Row]:
    """Yield (location, row) for every record of a data file. Raise UserError with the line if it cannot be read."""
    suffix = data_suffix(path)
    if suffix is None:
        raise UserError(
            f"{path}: not a data file by its name; expected {', '.join(SUFFIXES)}, or one of them with .gz."
        )
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path)
        elif suffix in (".csv", ".tsv"):
            yield from _csv_rows(path, suffix)
        else:
            yield from _json_rows(path, suffix)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason}); convert it, for example: iconv -f GB18030 -t UTF-8 OLD > NEW."
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: damaged or incomplete gzip file ({error}); copy or download it again.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _open_bytes(path: Path) -> IO[bytes]:
    """Open a file, unpacking it when it starts with the gzip mark, whatever its name says."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")


def _open_text(path: Path) -> IO[str]:
    """Open a text file; a byte order mark (Excel, Windows editors) is skipped."""
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline="")


def _json_rows(path: Path, suffix: str) -> Iterator[Row]:
    """Read a list of objects, objects one a line (even in .json, as ADGEN), objects one after the other, or dialogues."""
    with _open_text(path) as file:
        first = ""
        while not first.strip():  # blank lines before the first record
            line = file.readline(CHUNK)
            if not line:
                return
            first += line
        start = first.strip()
        whole = start.startswith("{") and start.endswith("}")  # as against the first line of a pretty-printed object
        one_a_line = whole or _is_dialogue(start) or (suffix != ".json" and not start.startswith("["))
        values = _line_values(path, file, first) if one_a_line else _stream_values(JsonWindow(path, file, first))
        for location, value in unwrapped(path, values) if start.startswith("{") else values:
            if is_alternating(value) or (isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)):
                value = {"messages": value}
            if not isinstance(value, dict):
                kind = type(value).__name__
                raise UserError(f'{path}, {location}: a {kind}, expected an object {{"prompt": …, …}}.')
            yield location, value


def unwrapped(path: Path, values: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a file; of a file with nothing but a wrapper, the records in it ("record 1 under "data"").

    Raise UserError for records that a data server cut short.
    """
    first = next(values, None)
    inside = wrapped_records(first[1]) if first else None
    second = next(values, None)
    if inside and second is None:
        key, records = inside
        exported = enumerate(first[1][key], start=1)
        cut = next((number for number, one in exported if "row_idx" in one and one.get("truncated_cells")), None)
        if cut:
            raise UserError(f"{path}, record {cut}: the data server cut its texts (truncated_cells); download the set itself.")
        yield from ((f'record {number} under "{key}"', one) for number, one in enumerate(records, start=1))
    else:
        if first and not second and is_turned(first[1]):
            raise UserError(
                f"{path}: an object of columns, or of records by their keys; write one object a record, for example with pandas: "
                "to_json(FILE, orient='records', lines=True, force_ascii=False)."
            )
        yield from chain(filter(None, (first, second)), values)


def is_turned(value: Any) -> bool:
    """Return whether an object is a table of columns, as lists or as pandas writes them, or has a record under each key."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(column, list) and column for column in columns):
        texts = len(columns) > 1 and all(isinstance(one, str) for column in columns for one in column)
        return len({len(column) for column in columns}) == 1 and (texts or all(map(is_dialogue, chain(*columns))))
    inner = [one for one in columns if isinstance(one, dict) and one]
    numbered = all(key.isdigit() for one in inner for key in one)
    return len(inner) == len(columns) > 0 and (numbered or all(recognise(with_our_names(one)) for one in inner))


def wrapped_records(value: Any) -> tuple[str, list[dict]] | None:
    """Return the one key of an object that holds a list of records, and these; None for an object that is a record itself.

    The export of a data server has a list of its features, too, and wraps each record in {"row_idx", "row"}.
    """
    if not isinstance(value, dict) or known_names(value) or any(name in value for name in OUR_NAMES):
        return None
    if recognise(value) or "prompt" in clear_columns(value):
        return None
    lists = {key: one for key, one in value.items() if isinstance(one, list) and one and not is_dialogue(one)}
    lists = {key: one for key, one in lists.items() if all(isinstance(row, dict) for row in one)}
    if "rows" in lists:
        lists.pop("features", None)
    if len(lists) != 1:
        return None
    ((key, records),) = lists.items()
    rows = all({"row_idx", "row"} <= one.keys() for one in records)
    return key, [one["row"] for one in records] if rows else records


def _is_dialogue(line: str) -> bool:
    """Return whether a line is a whole list of messages, and not the list of all records."""
    if not (line.startswith("[") and line.endswith("]")):
        return False
    try:
        turns = parse_json(line)
    except ValueError:
        return False
    return bool(turns) and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def _line_values(path: Path, file: IO[str], first: str) -> Iterator[tuple[str, Any]]:
    """Decode values one a line. first: what was read so far, blank lines and the first value or its beginning."""
    line = first.lstrip()
    number = first[: len(first) - len(line)].count("\n")
    while line:
        number += 1
        while not line.endswith("\n") and (more := file.readline(CHUNK)):  # the first line may be cut at CHUNK
            line += more
        if line.strip():
            try:
                # Without its end: an error there is in this line, not at the start of the next.
                value = parse_json(line.rstrip("\r\n"), object_pairs_hook=unique_names)
            except ValueError as error:
                column = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{path}, line {number}: invalid JSON ({column}); expected one object a line.") from error
            yield f"line {number}", value
        line = file.readline()


def _stream_values(window: JsonWindow) -> Iterator[tuple[str, Any]]:
    """Decode the values of a JSON list, or values that follow each other."""
    in_list = window.mark() == "["
    if in_list:
        window.skip(1)
    number = 0
    while (mark := window.mark()) and not (in_list and mark == "]"):
        if in_list and number:
            if mark != ",":
                raise window.error(f'invalid JSON; expected "," or "]" after record {number}.')
            window.skip(1)
            if not window.mark():
                break
        number += 1
        location = f"record {number} (line {window.line})"
        yield location, window.value(number)
    if in_list:
        if window.mark() != "]":
            raise window.error("the JSON list is not closed; is the file incomplete?")
        window.skip(1)
        if window.mark():
            raise window.error("text after the end of the JSON list.")


class JsonWindow:
    """A window over the text of a JSON file that moves from value to value and keeps count of lines.

    Tried instead: ijson 3.6 with its C library. It needs 2.1 s of CPU for a list of 200 MB where this needs 4.5 s (tokenising
    it takes 200 s), but its errors have no line, and it refuses NaN and integers above 64 bits, which Python writes.
    """

    def __init__(self, path: Path, file: IO[str], text: str) -> None:
        """text: what was read from the file so far."""
        self.path, self.file = path, file
        self.text, self.position, self.line = text, 0, 1

    def mark(self) -> str:
        """Skip white space and return the character behind it, which stays; "" at the end of the file."""
        while True:
            self.skip(WHITE.match(self.text, self.position).end() - self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._grow(CHUNK):
                return ""

    def value(self, number: int) -> Any:
        """Decode the value at this position, and skip it. number: of the record, for an error."""
        size = CHUNK
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
                break
            except json.JSONDecodeError as error:
                length = error.pos - self.position
                # Perhaps only the rest is not read yet: an error near the end of the window, or an open string.
                cut = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if not (cut and len(self.text) - self.position < LONGEST_RECORD and self._grow(size)):
                    if cut and len(self.text) - self.position >= LONGEST_RECORD:
                        raise self.error(
                            f"record {number} is longer than {LONGEST_RECORD >> 20} MB; if it holds the list of all records, write "
                            "these one a line, for example: jq -c '.data[]' OLD > NEW.jsonl."
                        ) from error
                    self.skip(length)
                    raise self.error(f"invalid JSON in record {number} ({error.msg}).") from error
                size = min(2 * size, 64 * CHUNK)
            except (ValueError, RecursionError) as error:  # a number of 6,000 digits; 3,000 lists in each other
                reason = "nested too deep" if isinstance(error, RecursionError) else error
                raise self.error(f"invalid JSON in record {number} ({reason}).") from error
        self.skip(end - self.position)
        return value

    def skip(self, length: int) -> None:
        """Move over some characters."""
        self.line += self.text.count("\n", self.position, self.position + length)
        self.position += length

    def error(self, message: str) -> UserError:
        """Return an error with the file and the current line."""
        return UserError(f"{self.path}, line {self.line}: {message}")

    def _grow(self, size: int) -> bool:
        """Drop what was skipped and read more; False at the end of the file."""
        more = self.file.read(size)
        self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)


def _csv_rows(path: Path, suffix: str) -> Iterator[Row]:
    """Read rows of cells. A .csv has the delimiter that its first line has most of: spreadsheets also write ; and tabs."""
    csv.field_size_limit(LONGEST_RECORD)
    with _open_text(path) as file:
        first = file.readline(CHUNK)
        delimiter = max(",;\t", key=first.count) if suffix == ".csv" else "\t"
        reader = csv.DictReader(chain([first], file), delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or ()  # spreadsheets leave columns without a name at the end
            reader.fieldnames = [name or f"column {place}" for place, name in enumerate(names, start=1)]
            _check_columns(f"{path}, line 1", reader.fieldnames)
            for row in reader:
                location = f"line {reader.line_num}"
                if None in row or None in row.values():
                    few = None in row.values()
                    raise UserError(
                        f"{path}, {location}: {'fewer' if few else 'more'} cells than the {len(reader.fieldnames or ())} "
                        'columns of the first line; put text with a comma or a line break between double quotes ("").'
                    )
                yield location, row
        except csv.Error as error:
            # The count stands at the last good record, for a quote that is never closed runs to the end of the file.
            raise UserError(f"{path}, line {reader.line_num + 1}: invalid CSV ({error}).") from error


def _check_columns(location: str, names: list[str]) -> None:
    """Raise UserError for a name that two columns have."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f'{location}: two columns are called "{twice}"; rename or remove one of them.')


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow  # 0.4 s, which a wrong flag need not wait for
    import pyarrow.parquet

    with _open_bytes(path) as file, tempfile.TemporaryFile() as unpacked:
        if isinstance(file, gzip.GzipFile):  # Parquet is read from its end: unpack to a file that goes away by itself
            shutil.copyfileobj(file, unpacked, CHUNK)
            file = unpacked
        try:
            table = pyarrow.parquet.ParquetFile(file)
            _check_columns(str(path), table.schema_arrow.names)
            batches = table.iter_batches(batch_size=500)
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1):
                yield f"record {number}", row
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a readable Parquet file ({error}).") from error
