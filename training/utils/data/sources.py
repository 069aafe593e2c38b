"""--data_path -> records: a named set, a hub id, a folder or a data file becomes one form of record, stored as Arrow.

Records are built one by one and written in small batches, so memory does not grow with the data; the result is
memory-mapped and kept in the cache folder under a key made of the data's content, --columns and this code.
"""

import difflib
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from filelock import FileLock

from errors import UserError
from training.utils.data import formats, named_sets, readers
from training.utils.data.formats import SPELLED_OUT, BadRecord, Fields, Record, Skip
from training.utils.data.named_sets import NamedSet, find_named_set, similar_name
from training.utils.data.readers import SUFFIXES, Row, data_suffix

logger = logging.getLogger("sanbu")

FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": Value("string")}],
        "chosen": Value("string"),
        "rejected": Value("string"),
        "margin": Value("float32"),
    }
)
EVAL_SPLITS = ("eval", "evaluation", "validation", "valid", "val", "dev", "test")
WRITE_BATCH = 500
MISSING = object()
REPEATED = "a turn of a history that is there already"


@dataclass(frozen=True)
class Part:
    """One file or split. rows: a fresh iterator over (place, row). content: its hash."""

    label: str
    rows: Callable[[], Iterator[Row]]
    content: str


@dataclass(frozen=True)
class Source:
    """What a path turned out to be: its parts, "train" and perhaps "eval", and the named set that gives the rule."""

    path: str
    parts: dict[str, list[Part]]
    named: NamedSet | None


def load_records(
    path: str, *, columns: dict[str, str] | None = None, cache_dir: str | None = None
) -> dict[str, Dataset]:
    """The records behind one --data_path: {"train": Dataset} and, when the set has its own held-out split, "eval".

    columns: our name -> the name in the data, for sets that are not recognised by themselves ("a.b" looks inside).
    cache_dir: where the records are kept. UserError with the file and the line or record number of what is wrong.
    """
    source = open_source(path)
    folder = cache_folder(cache_dir) / "records" / _key(source, columns)
    if not folder.is_dir():  # a whole folder is moved into place at once: if it is there, it is complete
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    _build(source, columns, folder)
        except OSError as error:
            told = f"the cache folder {folder.parent} cannot be written ({error})"
            raise UserError(f"{told}; name another one in the environment variable SANBU_CACHE.") from error
    for note in json.loads((folder / "notes.json").read_text(encoding="utf-8")):
        logger.info("%s", note)
    files = {part: folder / f"{part}.arrow" for part in source.parts}
    return {part: Dataset.from_file(str(file)) for part, file in files.items()}


def content_key(path: str, columns: dict[str, str] | None = None) -> str:
    """A hash that changes when the data behind a path, --columns or the code that reads it changes."""
    return _key(open_source(path), columns)


def cache_folder(cache_dir: str | None = None) -> Path:
    """Where prepared data is kept: the argument, else SANBU_CACHE, else $XDG_CACHE_HOME/sanbu, else ~/.cache/sanbu."""
    chosen = cache_dir or os.environ.get("SANBU_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sanbu"


# ------------------------------------------------------------------------------------------------- what a path means


def open_source(path: str) -> Source:
    """Finds out what a path is. UserError when there is no such thing."""
    named = find_named_set(path)
    local = Path(path).expanduser()
    if local.is_file():
        return Source(path, {"train": [_file_part(local)]}, named)
    if local.is_dir():
        return Source(path, _folder_parts(local), named)
    if named and named.local and not data_suffix(local):  # a file that is meant and missing is an error
        return _local_jsonfile(path, named) if named.names[0] == "local/jsonfile" else _local_form(path, named)
    if _looks_local(path):
        raise UserError(_missing_file(path, local, named))
    for downloaded in map(download_folder, (path, *(named.names if named else ()))):
        if downloaded.is_dir():
            logger.info("%s: taken from the folder %s", path, downloaded)
            return Source(path, _folder_parts(downloaded), named)
    return Source(path, _split_parts(load_from_hub(path), path), named)


def download_folder(name: str) -> Path:
    """Where scripts.download_dataset puts a set, and where it is looked for before the hub is asked."""
    return Path("datasets") / name.replace(":", "-")


def _local_jsonfile(path: str, named: NamedSet) -> Source:
    """local/jsonfile: data/train.json and data/eval.json of the current folder."""
    train, held_out = Path("data/train.json"), Path("data/eval.json")
    if not train.is_file():
        raise UserError(
            f"--data_path {path} reads {train} (and {held_out}) of the current folder {Path.cwd()}: no such file."
        )
    parts = {"train": [_file_part(train)]}
    if held_out.is_file():
        parts["eval"] = [_file_part(held_out)]
    else:
        logger.info("%s: no %s, so a share of %s is held out (--eval_fraction).", path, held_out, train)
    return Source(path, parts, named)


def _local_form(path: str, named: NamedSet) -> Source:
    """Smart/Q_A: a JSON file of the user's own; the one file is never its own test set."""
    name = named.names[0]
    places = [Path(f"{folder}{name}.json") for folder in ("", "data/", "datasets/")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(
            f'--data_path {path}: a local set; put its records, a JSON list of {{"prompt", "chosen", "rejected"}}, '
            f"into one of {', '.join(map(str, places))}, or give the path of the file itself."
        )
    return Source(path, {"train": [_file_part(found)]}, named)


def _looks_local(path: str) -> bool:
    """A path that cannot be a hub id (NAME or OWNER/NAME)."""
    return path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1 or bool(data_suffix(Path(path)))


def _missing_file(path: str, local: Path, named: NamedSet | None) -> str:
    if named and not named.local and data_suffix(local) is None:
        return (
            f"--data_path {path}: no such folder. To fetch the set it is named after: "
            f"python -m scripts.download_dataset {named.names[0]} --output_dir {path}"
        )
    siblings = [entry.name for entry in local.parent.iterdir()] if local.parent.is_dir() else []
    near = difflib.get_close_matches(local.name, siblings, n=1)
    if near:
        return f"--data_path {path}: no such file or folder; did you mean {local.parent / near[0]}?"
    where = "" if local.parent.is_dir() else f" (the folder {local.parent} does not exist either)"
    return f"--data_path {path}: no such file or folder, seen from {Path.cwd()}{where}."


def load_from_hub(name: str) -> DatasetDict:
    """All splits of a set from the hub or its local cache; name: a named set, ID or ID:CONFIG.

    UserError that says how to fetch the set before, when there is no network.
    """
    hub_id, _, config = name.partition(":")
    named = find_named_set(name)
    if named and name.lower() in map(str.lower, named.names):  # not somebody else's set of the same last name
        hub_id, config = named.hub_id, named.config
    try:
        return load_dataset(hub_id, config or None)
    except Exception as error:  # whatever the hub client raises becomes one sentence; its own words are kept in it
        cause = error
    if "scripts are no longer supported" in str(cause) or "trust_remote_code" in str(cause):
        logger.info("%s has a loading script, which is not run; reading the hub's Parquet copy of it.", hub_id)
        try:
            return load_dataset(hub_id, config or None, revision="refs/convert/parquet")
        except Exception as error:  # same reason
            cause = error
    raise UserError(_hub_trouble(name, cause)) from cause


def _hub_trouble(name: str, error: Exception) -> str:
    near = None if find_named_set(name) else similar_name(name)
    hint = f" Did you mean {near}?" if near else ""
    cause = " ".join(str(error).split())[:300]
    if isinstance(error, FileNotFoundError):
        return f"{name}: no file or folder of this name, and no public data set on the hub ({cause}).{hint}"
    if isinstance(error, ConnectionError) or "connect" in cause.lower() or "offline" in cause.lower():
        meant = near or name
        return (
            f"{name}: no file or folder of this name, and the hub cannot be reached.{hint} On a machine with network "
            f"run: python -m scripts.download_dataset {meant}, then copy the folder {download_folder(meant)} to the "
            "same place here."
        )
    return f"{name}: the set on the hub cannot be read ({cause}); ID:CONFIG chooses a configuration.{hint}"


def _folder_parts(folder: Path) -> dict[str, list[Part]]:
    """A folder written by save_to_disk (one set or several splits), or one that holds data files named after splits."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            saved = load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, pyarrow.ArrowInvalid) as error:
            raise UserError(
                f"{folder}: a folder of save_to_disk that cannot be read ({error}); write it again."
            ) from error
        splits = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        return _split_parts(splits, str(folder))
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and data_suffix(file) and file.name[0] not in "._"
    )
    files = [file for file in files if file.name not in ("dataset_info.json", "dataset_infos.json")]
    if not files:
        raise UserError(
            f"{folder}: neither a set written by save_to_disk nor data files in it ({', '.join(SUFFIXES)})."
        )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())
        split = next((word for word in words if word == "train" or word in EVAL_SPLITS), "")
        by_split.setdefault(split, []).append(file)
    if "" in by_split:  # files that name no split: for training, unless others say so of themselves
        unnamed = by_split.pop("")
        by_split.setdefault("train", unnamed)
        if by_split["train"] is not unnamed:
            logger.info("%s: not used, for other files have train in their names: %s", folder, _listed(unnamed, folder))
    names = _chosen_splits(by_split, str(folder))
    return {part: [_file_part(file) for file in by_split[name]] for part, name in names.items()}


def _listed(files: list[Path], folder: Path) -> str:
    return ", ".join(str(file.relative_to(folder)) for file in files)


def _split_parts(splits: dict[str, Dataset], label: str) -> dict[str, list[Part]]:
    return {
        part: [Part(f"{label} ({name})", partial(_dataset_rows, splits[name]), _hash_dataset(splits[name]))]
        for part, name in _chosen_splits(splits, label).items()
    }


def _chosen_splits(splits: dict[str, Any], label: str) -> dict[str, str]:
    """{"train": the name of a split, "eval": of another, when there is one}."""
    names = list(splits)
    train = "train" if "train" in names else next((name for name in names if name.startswith("train")), None)
    if train is None and len(names) == 1:
        train = names[0]
    if train is None:
        raise UserError(
            f'{label}: no split named "train" (found: {", ".join(names)}); save the wanted one by itself and give that.'
        )
    held_out = next((name for name in EVAL_SPLITS if name in names and name != train), None)
    ignored = [name for name in names if name not in (train, held_out)]
    if ignored:
        told = "%s: training on %s, evaluating on %s, not used: %s"
        logger.info(told, label, train, held_out or "a share of it", ", ".join(ignored))
    return {"train": train, "eval": held_out} if held_out else {"train": train}


def _file_part(path: Path) -> Part:
    return Part(str(path), partial(readers.read_rows, path), f"{data_suffix(path)} {_hash_files([path])}")


def _dataset_rows(dataset: Dataset) -> Iterator[Row]:
    for number, row in enumerate(dataset, start=1):
        yield f"record {number}", row


def _hash_dataset(dataset: Dataset) -> str:
    files = [Path(file["filename"]) for file in dataset.cache_files]
    # Kept in memory (HF_DATASETS_IN_MEMORY_MAX_SIZE) it names no files, and all sets would be one.
    return _hash_files(files) if files else f"in memory {dataset._fingerprint}"


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def _key(source: Source, columns: dict[str, str] | None) -> str:
    code = _hash_files([Path(module.__file__) for module in (formats, named_sets, readers)] + [Path(__file__)])
    contents = [[name, [part.content for part in parts]] for name, parts in source.parts.items()]
    told = json.dumps([contents, source.named and source.named.names, sorted((columns or {}).items()), code])
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------------- rows -> records


def _build(source: Source, columns: dict[str, str] | None, folder: Path) -> None:
    """Writes the records of a source into a new folder, then moves it to its place."""
    building = folder.with_name(f".{folder.name}.building")  # one name: the next run clears what a killed one left
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(mode=0o700)
    notes: list[str] = []
    try:
        for name, parts in source.parts.items():
            _write(building / f"{name}.arrow", parts, source.named, columns, notes)
        (building / "notes.json").write_text(json.dumps(notes), encoding="utf-8")
        building.replace(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(
    file: Path, parts: list[Part], named: NamedSet | None, columns: dict[str, str] | None, notes: list[str]
) -> None:
    """Streams the records of some parts into an Arrow file. UserError when nothing is left."""
    skipped: Counter[str] = Counter()
    written, batch, schema = 0, [], FEATURES.arrow_schema
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for record in chain.from_iterable(_records(part, named, columns, skipped, notes) for part in parts):
            batch.append(record)
            if len(batch) == WRITE_BATCH:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
                written, batch = written + len(batch), []
        if batch:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
            written += len(batch)
    left_out = ", ".join(f"{count} with {reason}" for reason, count in skipped.most_common())
    labels = ", ".join(part.label for part in parts)
    if not written and not skipped:
        raise UserError(f"{labels}: no records in it.")
    if not written:
        raise UserError(f"{labels}: no usable record; left out {left_out}.")
    if skipped:
        notes.append(f"{labels}: {written} records; left out {left_out}")


def _records(
    part: Part, named: NamedSet | None, columns: dict[str, str] | None, skipped: Counter[str], notes: list[str]
) -> Iterator[Record]:
    """The records of one part. The first row decides the format, and every later row must have its fields."""
    needed: tuple[str, ...] = ()
    earlier = ""
    convert: Callable[[Fields], list[Record]] | None = None
    seen: dict[bytes, bool] = {}
    for where, row in part.rows():
        if convert is None:
            needed, convert, earlier = _format_of(row, named, columns, f"{part.label}, {where}", notes)
        for field in needed:
            if _field(row, field) is None:
                found = ", ".join(name for name, value in row.items() if value is not None)
                raise UserError(
                    f'{part.label}, {where}: no field "{field}" (found: {found or "nothing"}). Give every record one, '
                    "as the first record has, or put records of another kind into a file of their own."
                )
        try:
            records = convert(row)
        except Skip as reason:
            skipped[str(reason)] += 1
            continue
        except BadRecord as error:
            raise UserError(f"{part.label}, {where}: {error}.") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if named is None or convert is not named.rule:
                raise
            raise UserError(f"{part.label}, {where}: not of the form of {named.names[0]} ({error!r}).") from error
        if not earlier:
            yield from records
            continue
        yield from _once(records, _field(row, earlier, MISSING) is not MISSING, seen, skipped)


def _once(
    records: list[Record], spelled_out: bool, seen: dict[bytes, bool], skipped: Counter[str]
) -> Iterator[Record]:
    """Without the turns that are there already. Equal rows that have no field of a history stay: somebody repeated them.

    spelled_out: the row has such a field. seen: the turns so far, and whether one of such a row was among them.
    """
    for record in records:
        told = json.dumps([record["messages"], record["chosen"], record["rejected"]])
        digest = hashlib.blake2b(told.encode(), digest_size=12).digest()
        before = seen.get(digest)
        seen[digest] = spelled_out or before is True
        if before or (spelled_out and before is not None):
            skipped[REPEATED] += 1
        else:
            yield record


def _format_of(
    row: Fields, named: NamedSet | None, columns: dict[str, str] | None, place: str, notes: list[str]
) -> tuple[tuple[str, ...], Callable[[Fields], list[Record]], str]:
    """The fields that every row needs (names in the data), how a row becomes records, and the field of a history whose
    turns count once, "" for none.
    """
    missing = [theirs for theirs in (columns or {}).values() if _field(row, theirs, MISSING) is MISSING]
    if columns and not missing:
        return _mapped(columns)
    found = formats.recognise(row)
    ruled = named is not None and named.rule is not None
    if columns and (len(missing) < len(columns) or not (found or ruled)):
        raise UserError(f'{place}: --columns names "{missing[0]}", which is not there (found: {", ".join(row)}).')
    if columns:
        notes.append(f"{place}: without the fields of --columns, so read by its own fields")
    if ruled and all(field in row for field in named.fields):
        return (), named.rule, ""
    if ruled:
        notes.append(f"{place}: without the fields of {named.names[0]} ({', '.join(named.fields)}), so read by its own")
    if found is None:
        raise UserError(_unknown_fields(row, place))
    return *found, "history" if found[0] in SPELLED_OUT else ""


def _mapped(columns: dict[str, str]) -> tuple[tuple[str, ...], Callable[[Fields], list[Record]], str]:
    """--columns: the named fields alone, under our names, in the format that these make."""
    unknown = [ours for ours in columns if ours not in formats.OUR_NAMES]
    if unknown:
        raise UserError(f"--columns {unknown[0]}=…: no such name of ours; use {', '.join(formats.OUR_NAMES)}.")
    found = formats.recognise(columns)
    if found is None:
        told = ",".join("=".join(pair) for pair in columns.items())
        raise UserError(
            f"--columns {told}: these do not make a record; map at least prompt and response, or prompt, chosen and "
            "rejected, or messages, or prompt alone."
        )
    names, convert = found
    needed = tuple(columns[name] for name in names)
    earlier = columns.get("history", "") if names in SPELLED_OUT else ""
    return needed, lambda row: convert({ours: _field(row, theirs) for ours, theirs in columns.items()}), earlier


def _field(row: Fields, name: str, default: Any = None) -> Any:
    """A field of a row; "question.full_text" and "answers.0" look inside."""
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


def _unknown_fields(row: Fields, place: str) -> str:
    fields = ", ".join(row)
    if {"text", "label"} <= set(row):
        return (
            f"{place}: labelled texts (fields {fields}) are no dialogues, and no step trains on labels; "
            "--columns prompt=text takes the texts as prompts for step 3."
        )
    if "chosen" in row and "rejected" not in row:
        return f'{place}: no field "prompt" or "rejected" (found: {fields}); pairs need prompt, chosen and rejected.'
    return (
        f"{place}: the fields {fields} are no known format (prompt/chosen/rejected, prompt/response, messages, "
        "conversations, instruction/output, content/summary, prompt); say which is which, for example "
        "--columns prompt=question,response=answer (docs/en/own-data.md)."
    )
