"""Turn plain text into blocks of equal length for language modelling, in the cache as the other data.

The texts follow each other, each closed by the end token, and are cut every so many tokens. A block has the form of an
example of step 1 (input_ids, prompt_length, between, length), so what is made for those serves here too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from errors import UserError
from models.templates import CHATGLM, Template, encode_texts
from training.utils.data.arrow_rows import arrow_writer
from training.utils.data.cache import CachedData, cached, new_rebuild_id
from training.utils.data.digest import file_digest
from training.utils.data.names import says_nothing
from training.utils.data.readers import Row, data_suffix
from training.utils.data.sources import Table, open_source
from training.utils.data.tokenize import BATCH, SCHEMAS, SPLITS, Counts, report_of, tokenizer_digest

logger = logging.getLogger("sanbu")

FLAG, COLUMN_FLAG = "--unsupervised_dataset_name", "--unsupervised_text_column"
EMPTY, TAIL = "empty texts", "tokens behind the last whole block"


def prepare_blocks(
    name: str,
    tokenizer: Any,
    template: Template,
    block_length: int,
    *,
    column: str | None = None,
    cache_dir: str | None = None,
    rebuild: bool = False,
) -> CachedData:
    """Return the blocks of a data set's training split, from the cache or built into it; log in one line what they hold.

    name: a data file, a .txt file (blank lines part its texts), a folder, a named set or an id of the hub, also NAME:CONFIG.
    column: the field of the text; None: "text", or the only field that is text. Columns of the result: SCHEMAS[1];
    its eval split is empty. Raise UserError for a set that is not there, has no text or less than one block.
    """
    tables = open_tables(name)

    def build(folder: Path) -> dict[str, dict[str, Any]]:
        unread: dict[str, None] = {}  # in the order of the fields
        counts = write_blocks(folder, texts(tables, column, unread), tokenizer, template, block_length)
        if not counts.kept:
            raise UserError(
                f"{FLAG} {name}: {counts.tokens} tokens in {counts.records} texts do not fill one block of "
                f"--max_prompt_seq_len + --max_answer_seq_len = {block_length} tokens; give more text or lower these."
            )
        return report_of({"train": counts, "eval": Counts()}) | {"unread": list(unread)}

    digests = [table.digest for table in tables]
    content = ["plain text", digests, column, block_length, tokenizer_digest(tokenizer), asdict(template)]
    rebuild_id = new_rebuild_id() if rebuild else None
    data = cached("tokens", content, SPLITS, build, cache_dir, rebuild_id)
    counts = data.report["train"]
    empty, tail = (counts["dropped"].get(reason, 0) for reason in (EMPTY, TAIL))
    logger.info(
        f"{name}: {counts['records'] - empty} texts ({empty} empty ones left out), {counts['tokens']} tokens in "
        f"{counts['kept']} blocks of {block_length}; the last {tail} tokens fill no block and are left out"
    )
    if data.report["unread"]:
        logger.info("%s: texts in fields that are not read: %s", name, ", ".join(data.report["unread"]))
    return data


def open_tables(name: str) -> list[Table]:
    """Return the files or the split that the texts are read from."""
    local = Path(name).expanduser()
    files = [local] if local.suffix == ".txt" and local.is_file() else []
    if local.is_dir() and not any(map(data_suffix, local.rglob("*"))):
        files = sorted(local.rglob("*.txt"))
    if files:
        return [Table(str(file), partial(paragraphs, file), f".txt {file_digest(file)}") for file in files]
    try:
        return open_source(name).splits["train"]
    except UserError as error:
        raise UserError(str(error).replace("--data_path", FLAG)) from error


def paragraphs(path: Path) -> Iterator[Row]:
    """Yield (location, {"text"}) of a plain file's texts, which blank lines part."""
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(chain(file, [""]), start=1):
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield f"line {number - len(lines)}", {"text": "".join(lines).strip("\n")}
                    lines = []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it, for example with iconv.") from error


def texts(tables: list[Table], column: str | None, unread: dict[str, None]) -> Iterator[str]:
    """Yield all texts, empty ones too. Raise UserError with file and line for a row without text.

    unread: gets the names of other fields that hold texts.
    """
    for table in tables:
        field = column
        for location, row in table.read():
            field = field or text_field(row, f"{table.label}, {location}")
            value = row.get(field, row)
            if value is not None and not isinstance(value, str):
                raise UserError(
                    f"{table.label}, {location}: no text in the field {field!r} (found: {', '.join(row)}); "
                    f"{COLUMN_FLAG} names the field."
                )
            others = (name for name, other in row.items() if name != field and isinstance(other, str) and other)
            unread.update((name, None) for name in others if not says_nothing(name))
            yield (value or "").strip("\n")


def text_field(row: dict[str, Any], location: str) -> str:
    """Return "text", or the only field of a row that is text."""
    fields = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row or len(fields) == 1:
        return "text" if "text" in row else fields[0]
    raise UserError(f"{location}: which field is the text? (found: {', '.join(row)}); name it with {COLUMN_FLAG}.")


def write_blocks(
    folder: Path, stream: Iterator[str], tokenizer: Any, template: Template, block_length: int
) -> Counts:
    """Write train.arrow, block by block, and an empty eval.arrow."""
    opening, counts = opening_of(template), Counts()
    length = block_length - len(opening)
    rest: list[int] = []
    with (
        arrow_writer(folder / "eval.arrow", SCHEMAS[1]),
        arrow_writer(folder / "train.arrow", SCHEMAS[1]) as write,
    ):
        while batch := list(islice(stream, BATCH)):
            full = [text for text in batch if text.strip()]
            counts.records += len(batch)
            counts.dropped[EMPTY] += len(batch) - len(full)
            for ids in encode(full, tokenizer, template):
                counts.tokens += len(ids)
                rest += ids
            end = len(rest) // length * length
            blocks = [opening + rest[start : start + length] for start in range(0, end, length)]
            rest = rest[end:]
            row = {"prompt_length": len(opening), "between": [], "length": block_length}
            write([{"input_ids": ids} | row for ids in blocks])
            counts.kept += len(blocks)
    counts.dropped[TAIL] = len(rest)
    return counts


def opening_of(template: Template) -> list[int]:
    """Return ChatGLM's marks, which open every block and are never learned: without them it knows no positions."""
    # ChatGLM-6B has them behind a prompt, the later generations in front.
    return list(template.prefix_ids or template.suffix_ids) if template.kind in CHATGLM else []


def encode(full: list[str], tokenizer: Any, template: Template) -> list[list[int]]:
    """Return the tokens of each text: what opens a text (bos, where the model has it), the text, the end token."""
    if template.kind in CHATGLM:
        return [[*ids, template.end_token_id] for ids in tokenizer.encode_plain(full)]
    return [[*template.prefix_ids, *ids, template.end_token_id] for ids in encode_texts(tokenizer, full, literal=True)]
