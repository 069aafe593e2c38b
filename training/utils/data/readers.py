"""Data files -> rows, one at a time: JSON, JSONL, CSV, TSV, Parquet, each gzipped or not. Knows nothing about columns.

Every row comes with the place it was read from ("line 7", "record 7"), so that an error can name it. A file is never
held in memory: a JSON list of several gigabytes is parsed record by record.
"""

import csv
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from errors import UserError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
CHUNK = 1 << 20
LONGEST_RECORD = 256 << 20
Row = tuple[str, dict[str, Any]]


def data_suffix(path: Path) -> str | None:
    """ ".json" for a.json and a.json.gz; None for a file that is not one of SUFFIXES."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_rows(path: Path) -> Iterator[Row]:
    """(place, row) for every record of a data file. UserError with the line when the file cannot be read."""
    suffix = data_suffix(path)
    if suffix is None:
        raise UserError(
            f"{path}: not a data file by its name; expected {', '.join(SUFFIXES)}, or one of them with .gz."
        )
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path)
        elif suffix in (".csv", ".tsv"):
            yield from _csv_rows(path, "," if suffix == ".csv" else "\t")
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
    """The bytes of a file, unpacked when they start with the gzip mark, whatever the name says."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")


def _open_text(path: Path) -> IO[str]:
    """The text of a file; a byte order mark (Excel, Windows editors) is skipped."""
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline="")


def _json_rows(path: Path, suffix: str) -> Iterator[Row]:
    """A list of objects, objects one a line (even in .json, as ADGEN), or objects one after the other."""
    with _open_text(path) as file:
        first = ""
        while not first.strip():  # blank lines before the first record
            line = file.readline(CHUNK)
            if not line:
                return
            first += line
        if first.lstrip().startswith("["):
            yield from _json_values(path, file, first, in_list=True)
        elif suffix != ".json" or _is_whole_object(first):
            yield from _json_lines(path, file, first)
        else:
            yield from _json_values(path, file, first, in_list=False)


def _is_whole_object(line: str) -> bool:
    """The first line of a file with one object a line, as against a pretty-printed object; a broken object counts."""
    return line.strip().startswith("{") and line.strip().endswith("}")


def _json_lines(path: Path, file: IO[str], first: str) -> Iterator[Row]:
    line = first.lstrip()
    number = first[: len(first) - len(line)].count("\n")  # blank lines before the first record
    while line:
        number += 1
        while not line.endswith("\n") and (more := file.readline(CHUNK)):  # the first line may be cut at CHUNK
            line += more
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: invalid JSON ({error.msg}, column {error.colno}); "
                    "expected one object a line."
                ) from error
            yield f"line {number}", _object(value, path, f"line {number}")
        line = file.readline()


def _json_values(path: Path, file: IO[str], text: str, in_list: bool) -> Iterator[Row]:
    """Objects out of a stream of text, decoded one by one; the buffer grows while an object is incomplete."""
    decoder = json.JSONDecoder()
    skip = " \t\r\n"
    position, line, number, chunk, closed = 0, 1, 0, CHUNK, False
    expect = "[" if in_list else ""  # the mark that must come next: "[" once, then "," or "]" after every value

    def refill() -> bool:
        nonlocal text, position
        more = file.read(chunk)
        text, position = text[position:] + more, 0
        return bool(more)

    while True:
        while True:  # white space, and the marks between values
            start = position
            while position < len(text) and text[position] in skip:
                position += 1
            line += text.count("\n", start, position)
            if position < len(text):
                mark = text[position]
                if closed:
                    raise UserError(f"{path}, line {line}: text after the end of the JSON list.")
                if expect == "[" or (expect == "," and mark in ",]") or (expect == "first" and mark == "]"):
                    position += 1
                    closed = mark == "]"
                    expect = {"[": "first", ",": "value"}.get(mark, expect)
                    continue
                if expect == ",":
                    raise UserError(f'{path}, line {line}: invalid JSON; expected "," or "]" after record {number}.')
                break
            if not refill():
                if in_list and not closed:
                    raise UserError(f"{path}, line {line}: the JSON list is not closed; is the file incomplete?")
                return
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # An error near the end of the buffer, or an open string, may only mean that the rest is not read yet.
            cut = error.pos >= len(text) - 16 or error.msg.startswith("Unterminated string")
            at = line + text.count("\n", position, error.pos)
            if cut and len(text) - position < LONGEST_RECORD and refill():
                chunk = min(2 * chunk, 64 * CHUNK)
                continue
            raise UserError(f"{path}, line {at}: invalid JSON in record {number + 1} ({error.msg}).") from error
        number, chunk = number + 1, CHUNK
        yield f"record {number} (line {line})", _object(value, path, f"record {number} (line {line})")
        line += text.count("\n", position, end)
        position = end
        expect = "," if in_list else ""


def _object(value: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{path}, {where}: a {type(value).__name__}, expected an object {{"prompt": …, …}}.')
    return value


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_RECORD)
    with _open_text(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row or None in row.values():
                    few = None in row.values()
                    raise UserError(
                        f"{path}, {where}: {'fewer' if few else 'more'} cells than the {len(reader.fieldnames or ())} "
                        'columns of the first line; put text with a comma or a line break between double quotes ("").'
                    )
                yield where, row
        except csv.Error as error:
            # the count stands at the last good record, for a quote that is never closed runs to the end of the file
            raise UserError(f"{path}, line {reader.line_num + 1}: invalid CSV ({error}).") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    with _open_bytes(path) as file:
        if isinstance(file, gzip.GzipFile):  # Parquet is read from its end: unpack to a file that goes away by itself
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(file, unpacked, CHUNK)
                yield from _parquet_file_rows(path, unpacked)
        else:
            yield from _parquet_file_rows(path, file)


def _parquet_file_rows(path: Path, file: IO[bytes]) -> Iterator[Row]:
    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=500)
        for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1):
            yield f"record {number}", row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}).") from error
