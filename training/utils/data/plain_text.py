"""Plain text -> blocks of equal length for language modelling, once: Arrow in the cache folder, as the other data.

The texts stand one behind the other, each closed by the end token, and are cut every so many tokens. A block has the form
of an example of step 1 (input_ids, prompt_length, length), so what is made for those serves here too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow

from errors import UserError
from models.templates import CHATGLM, Template, encode_texts
from training.utils.data import readers, sources
from training.utils.data.readers import Row, data_suffix
from training.utils.data.sources import Part, cache_folder, open_source
from training.utils.data.tokenize import (
    BATCH,
    PARTS,
    SCHEMAS,
    Counts,
    PhaseData,
    cached,
    code_digest,
    file_digest,
    tokenizer_digest,
)

logger = logging.getLogger("sanbu")

FLAG, COLUMN_FLAG = "--unsupervised_dataset_name", "--unsupervised_text_column"
EMPTY, TAIL = "empty texts", "tokens behind the last whole block"


def prepare_blocks(
    name: str,
    tokenizer: Any,
    template: Template,
    block_length: int,
    *,
    config: str | None = None,
    column: str | None = None,
    cache_dir: str | None = None,
    rebuild: bool = False,
) -> PhaseData:
    """The blocks of a data set's training part, from the cache or built into it; says in one line what they hold.

    name: a data file, a .txt file (blank lines part its texts), a folder, a named set or an id of the hub with its
    config. column: the field of the text; None: "text", or the only field that is text. Columns of the result: SCHEMAS[1];
    its eval part is empty. Raises UserError for a set that is not there, has no text or less than one block.
    """
    parts = open_parts(name, config)
    told = [
        "plain text", [part.content for part in parts], column, block_length, tokenizer_digest(tokenizer),
        asdict(template), code_digest(), *map(file_digest, map(Path, (__file__, readers.__file__, sources.__file__))),
    ]  # fmt: skip
    key = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()

    def write(folder: Path) -> dict[str, Counts]:
        counts = write_blocks(folder, parts, column, tokenizer, template, block_length)
        if not counts.kept:
            raise UserError(
                f"{FLAG} {name}: {counts.tokens} tokens in {counts.records} texts do not fill one block of "
                f"--max_prompt_seq_len + --max_answer_seq_len = {block_length} tokens; give more text or lower these."
            )
        return {"train": counts, "eval": Counts()}

    data = cached(cache_folder(cache_dir) / "tokens" / key, write, rebuild)
    counts = data.report["train"]
    logger.info(
        "%s: %d texts (%d empty ones left out), %d tokens in %d blocks of %d; the last %d tokens fill no block and are left out",
        name, counts["records"] - counts["dropped"].get(EMPTY, 0), counts["dropped"].get(EMPTY, 0), counts["tokens"],
        counts["kept"], block_length, counts["dropped"].get(TAIL, 0),
    )  # fmt: skip
    return data


def open_parts(name: str, config: str | None) -> list[Part]:
    """The files or the split that the texts are read from."""
    local = Path(name).expanduser()
    if config and local.exists():
        raise UserError(
            f"{FLAG} {name} is a file or folder, so --unsupervised_dataset_config_name {config} has no effect; drop it."
        )
    files = [local] if local.suffix == ".txt" and local.is_file() else []
    if local.is_dir() and not any(map(data_suffix, local.rglob("*"))):
        files = sorted(local.rglob("*.txt"))
    if files:
        return [Part(str(file), partial(paragraphs, file), f".txt {file_digest(file)}") for file in files]
    try:
        return open_source(f"{name}:{config}" if config else name).parts["train"]
    except UserError as error:
        raise UserError(str(error).replace("--data_path", FLAG)) from error


def paragraphs(path: Path) -> Iterator[Row]:
    """(place, {"text"}) of a plain file's texts, which blank lines part."""
    lines: list[str] = []
    first = 1
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    lines.append(line)
                    continue
                if lines:
                    yield f"line {first}", {"text": "".join(lines).strip("\n")}
                lines, first = [], number + 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it, for example with iconv.") from error
    if lines:
        yield f"line {first}", {"text": "".join(lines).strip("\n")}


def texts(parts: list[Part], column: str | None) -> Iterator[str]:
    """All texts, empty ones too. Raises UserError with file and line for a row without text."""
    for part in parts:
        field = column
        for where, row in part.rows():
            field = field or text_field(row, f"{part.label}, {where}")
            value = row.get(field, row)
            if value is not None and not isinstance(value, str):
                raise UserError(
                    f"{part.label}, {where}: no text in the field {field!r} (found: {', '.join(row)}); "
                    f"{COLUMN_FLAG} names the field."
                )
            yield (value or "").strip("\n")


def text_field(row: dict[str, Any], place: str) -> str:
    """ "text", or the only field of a row that is text."""
    found = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row or len(found) == 1:
        return "text" if "text" in row else found[0]
    raise UserError(f"{place}: which field is the text? (found: {', '.join(row)}); name it with {COLUMN_FLAG}.")


def write_blocks(
    folder: Path, parts: list[Part], column: str | None, tokenizer: Any, template: Template, block_length: int
) -> Counts:
    """Write train.arrow, block by block, and an empty eval.arrow."""
    frame, schema, counts = frame_of(template), pyarrow.schema(list(SCHEMAS[1].items())), Counts()
    room = block_length - len(frame)
    rest: list[int] = []
    stream = texts(parts, column)
    with ExitStack() as stack:
        writers = {}
        for part in PARTS:
            sink = stack.enter_context(pyarrow.OSFile(str(folder / f"{part}.arrow"), "wb"))
            writers[part] = stack.enter_context(pyarrow.ipc.new_stream(sink, schema))
            writers[part].write_batch(pyarrow.RecordBatch.from_pylist([], schema=schema))
        while batch := list(islice(stream, BATCH)):
            full = [text for text in batch if text.strip()]
            counts.records += len(batch)
            counts.dropped[EMPTY] += len(batch) - len(full)
            for ids in encode(full, tokenizer, template):
                counts.tokens += len(ids)
                rest += ids
            whole = len(rest) // room
            rows = [
                {
                    "input_ids": frame + rest[place * room : (place + 1) * room],
                    "prompt_length": len(frame), "length": block_length,
                }
                for place in range(whole)
            ]  # fmt: skip
            rest = rest[whole * room :]
            writers["train"].write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
            counts.kept += whole
    counts.dropped[TAIL] = len(rest)
    return counts


def frame_of(template: Template) -> list[int]:
    """What must open every block: ChatGLM's marks, without which the network knows no positions. Never learned."""
    # ChatGLM-6B has them behind a prompt, the later generations in front.
    return list(template.prefix_ids or template.suffix_ids) if template.kind in CHATGLM else []


def encode(full: list[str], tokenizer: Any, template: Template) -> list[list[int]]:
    """Tokens of each text: what opens a text (bos, where the model has it), the text, the end token."""
    if template.kind in CHATGLM:
        return [[*ids, template.end_token_id] for ids in tokenizer.encode_plain(full)]
    return [[*template.prefix_ids, *ids, template.end_token_id] for ids in encode_texts(tokenizer, full, literal=True)]
