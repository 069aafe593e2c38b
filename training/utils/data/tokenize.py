"""Records -> tokens, once: Arrow in the cache folder, which every process and every later run opens memory-mapped.

The cache is addressed by content - data, template, tokenizer, lengths, split and this code - so it cannot go stale. One
process builds under a file lock, the others wait and open what it built. A finished folder is moved into place at once
and checked when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import torch.distributed as dist
from datasets import Dataset
from filelock import FileLock

import models.templates
from errors import UserError
from models.templates import Template
from training.utils.data import splits
from training.utils.data.sources import cache_folder, content_key, load_records
from training.utils.data.splits import held_out_questions, question_of, select_phase

logger = logging.getLogger("sanbu")

Record = dict[str, Any]
Row = dict[str, Any]

TOKENS, COUNT = pyarrow.list_(pyarrow.int32()), pyarrow.int32()
# length counts real tokens; padded_length what a pair takes in a batch of [2, time], where the longer answer sets time.
SCHEMAS = {
    1: {"input_ids": TOKENS, "prompt_length": COUNT, "length": COUNT},
    2: {
        "chosen_ids": TOKENS, "rejected_ids": TOKENS, "prompt_length": COUNT, "margin": pyarrow.float32(),
        "length": COUNT, "padded_length": COUNT,
    },
    3: {"prompt_ids": TOKENS, "length": COUNT},
}  # fmt: skip
BATCH = 500  # records tokenised at once: enough for the tokenizer's threads, few enough to keep memory flat
MANIFEST = "manifest.json"
PARTS = ("train", "eval")
# Why a record is dropped, as the report says it.
NO_ANSWER, NO_REJECTED = "without an answer", "without a rejected answer"
SAME, SAME_CUT = "chosen equals rejected", "chosen equals rejected after truncation"
TOO_LONG, REFUSED = "prompt too long", "refused by the chat template"
HELD_OUT = "question held out in another set"


@dataclass
class PhaseData:
    """Tokenised records of one step (columns: SCHEMAS), what became of them, and a hash of the tokens.

    report: {"train" | "eval": {"records", "kept", "tokens", "truncated_prompts", "truncated_answers",
    "dropped": {why: count}}}
    """

    train: Dataset
    eval: Dataset
    report: dict[str, dict[str, Any]]
    fingerprint: str


@dataclass
class Counts:
    """What became of the records of one part."""

    records: int = 0
    kept: int = 0
    tokens: int = 0
    truncated_prompts: int = 0
    truncated_answers: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Count the other's records as well."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Task:
    """How records become tokens: for which step, with what, and how long they may get."""

    phase: int
    tokenizer: Any
    template: Template
    max_seq_len: int
    max_source_length: int | None = None  # both or neither: limits of prompt and answer apart, in phase 1
    max_target_length: int | None = None


@dataclass(frozen=True)
class Selected:
    """The records of one path that belong to the step. own_eval: the set came with a held-out split."""

    path: str
    train: Dataset
    eval: Dataset
    own_eval: bool


def prepare_phase(args: Any, phase: int, tokenizer: Any, template: Template) -> PhaseData:
    """prepare() with the flags of a step; says in one line a part what was kept, cut and dropped, and why."""
    data = prepare(
        args.data_path, phase, tokenizer, template,
        max_seq_len=args.max_prompt_seq_len if phase == 3 else args.max_seq_len,
        max_source_length=args.max_source_length if phase == 1 else None,
        max_target_length=args.max_target_length if phase == 1 else None,
        data_split=args.data_split, sft_only_data_path=args.sft_only_data_path if phase == 1 else (),
        columns=args.column_map, seed=args.seed, eval_fraction=args.eval_fraction,
        cache_dir=args.cache_dir, rebuild=args.rebuild_cache,
    )  # fmt: skip
    for line in report_lines(data.report):
        logger.info("%s", line)
    return data


def prepare(
    data_paths: Sequence[str],
    phase: int,
    tokenizer: Any,
    template: Template,
    *,
    max_seq_len: int,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    data_split: str = "2,4,4",
    sft_only_data_path: Sequence[str] = (),
    columns: dict[str, str] | None = None,
    seed: int = 1234,
    eval_fraction: float = 0.05,
    cache_dir: str | None = None,
    rebuild: bool = False,
) -> PhaseData:
    """Tokenised training and evaluation records of one step, from the cache or built into it.

    max_seq_len: tokens of prompt and answer in phases 1 and 2, of the prompt in phase 3. max_source_length,
    max_target_length: in phase 1, tokens of the prompt and of the answer apart, instead. rebuild: build although the
    cache has it; processes of one torch.distributed job build once. Raises UserError if nothing is left to train on.
    """
    least = max(2, template.frame_length + 1)
    if max_seq_len < least:
        flag = "max_prompt_seq_len" if phase == 3 else "max_seq_len"
        raise UserError(f"--{flag} {max_seq_len}: expected at least {least} tokens.")
    if max_source_length is not None and max_source_length < template.frame_length:
        raise UserError(f"--max_source_length {max_source_length}: expected at least {template.frame_length} tokens.")
    task = Task(phase, tokenizer, template, max_seq_len, max_source_length, max_target_length)
    paths = [(path, False) for path in data_paths] + [(path, True) for path in sft_only_data_path]
    contents = [(content_key(path, columns), sft_only) for path, sft_only in paths]
    told = [
        phase, contents, [max_seq_len, max_source_length, max_target_length], data_split, seed, eval_fraction,
        tokenizer_digest(tokenizer), asdict(template), code_digest(),
    ]  # fmt: skip
    home = cache_folder(cache_dir)
    folder = home / "tokens" / hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()

    def select(path: str, sft_only: bool) -> Selected:
        records = load_records(path, columns=columns, cache_dir=cache_dir)
        train, held_out = select_phase(
            records, phase, data_split=data_split, seed=seed, eval_fraction=eval_fraction, sft_only=sft_only
        )
        return Selected(path, train, held_out, own_eval="eval" in records)

    def write(building: Path) -> dict[str, Counts]:
        if rebuild:  # who asks for this trusts nothing that is there, the records included
            for content, _ in contents:
                shutil.rmtree(home / "records" / content, ignore_errors=True)
        counts = write_parts(building, task, [select(path, sft_only) for path, sft_only in paths])
        check_something_left([path for path, _ in paths], task, counts["train"])
        return counts

    return cached(folder, write, rebuild)


def cached(folder: Path, write: Callable[[Path], dict[str, Counts]], rebuild: bool = False) -> PhaseData:
    """The data in a folder of the cache; if there is none, one process writes it, see build_cache."""
    wish = rebuild_wish() if rebuild else None
    data = None if rebuild else open_cache(folder)
    if data is not None:
        return data
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{folder}.lock"):
            data = open_cache(folder, wish)  # whoever comes second finds the work done
            if data is None:
                build_cache(folder, write, wish)
                data = open_cache(folder)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be used ({error}); name another with --cache_dir or SANBU_CACHE."
        ) from error
    if data is None:
        raise UserError(f"{folder} reads back differently from what was written; the disk is at fault (--cache_dir).")
    return data


def report_lines(report: dict[str, dict[str, Any]]) -> list[str]:
    """The report in words, one line a part."""
    cuts = {"truncated_prompts": "prompts lost their oldest part", "truncated_answers": "answers lost their tail"}
    lines = []
    for part, counts in report.items():
        line = f"{part}: {counts['kept']} of {counts['records']} records, {counts['tokens']} tokens"
        line += "".join(f"; {counts[name]} {what}" for name, what in cuts.items() if counts[name])
        line += "".join(f"; {count} dropped: {why}" for why, count in counts["dropped"].items())
        lines.append(line)
    return lines


# --- tokens of a record -----------------------------------------------------------------------------------------------


def tokenise(records: list[Record], task: Task, counts: Counts) -> list[Row]:
    """Rows (SCHEMAS) of a batch of records, fewer where some are dropped; counts is brought up to date."""
    if task.phase != 3:
        records = drop(records, lambda record: not record["chosen"], NO_ANSWER, counts)
    if task.phase == 2:
        records = drop(records, lambda record: record["rejected"] is None, NO_REJECTED, counts)
        records = drop(records, lambda record: record["chosen"] == record["rejected"], SAME, counts)
    records, prompts = encode_prompts(records, task, counts)
    rows = {1: answer_rows, 2: pair_rows, 3: prompt_rows}[task.phase](records, prompts, task, counts)
    counts.kept += len(rows)
    counts.tokens += sum(row["length"] for row in rows)
    return rows


def drop(records: list[Record], unfit: Callable[[Record], bool], why: str, counts: Counts) -> list[Record]:
    """The records that are fit; the others are counted."""
    fit = [record for record in records if not unfit(record)]
    if len(fit) < len(records):
        counts.dropped[why] += len(records) - len(fit)
    return fit


def encode_prompts(records: list[Record], task: Task, counts: Counts) -> tuple[list[Record], list[list[int]]]:
    """The records whose dialogue the template takes, and the tokens of their prompts."""
    try:
        return records, task.template.encode_prompts(task.tokenizer, [record["messages"] for record in records])
    except UserError:  # the chat template refuses at least one, for instance for its roles: ask one by one
        kept, prompts = [], []
        for record in records:
            try:
                prompts.append(task.template.encode_prompt(task.tokenizer, record["messages"]))
                kept.append(record)
            except UserError as error:
                if not counts.dropped[REFUSED]:
                    logger.warning("%s The record is left out; more of the kind are only counted.", error)
                counts.dropped[REFUSED] += 1
        return kept, prompts


def answer_rows(records: list[Record], prompts: list[list[int]], task: Task, counts: Counts) -> list[Row]:
    """Rows of step 1."""
    answers = task.template.encode_answers(task.tokenizer, [record["chosen"] for record in records])
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        prompt, answer = fit(prompt, [answer], task, counts)
        ids = prompt + answer
        rows.append({"input_ids": ids, "prompt_length": len(prompt), "length": len(ids)})
    return rows


def pair_rows(records: list[Record], prompts: list[list[int]], task: Task, counts: Counts) -> list[Row]:
    """Rows of step 2. Both answers follow the same prompt, which is cut for the longer of them."""
    chosen = task.template.encode_answers(task.tokenizer, [record["chosen"] for record in records])
    rejected = task.template.encode_answers(task.tokenizer, [record["rejected"] for record in records])
    rows = []
    for record, prompt, *pair in zip(records, prompts, chosen, rejected, strict=True):
        prompt, good, bad = fit(prompt, pair, task, counts)
        if good == bad:
            counts.dropped[SAME if pair[0] == pair[1] else SAME_CUT] += 1
            continue
        lengths = len(prompt) + len(good), len(prompt) + len(bad)
        rows.append({
            "chosen_ids": prompt + good, "rejected_ids": prompt + bad, "prompt_length": len(prompt),
            "margin": record["margin"], "length": sum(lengths), "padded_length": 2 * max(lengths),
        })  # fmt: skip
    return rows


def prompt_rows(records: list[Record], prompts: list[list[int]], task: Task, counts: Counts) -> list[Row]:
    """Rows of step 3. A prompt that is too long is dropped: cut, it would be another question."""
    rows = [{"prompt_ids": ids, "length": len(ids)} for ids in prompts if len(ids) <= task.max_seq_len]
    if len(rows) < len(prompts):
        counts.dropped[TOO_LONG] += len(prompts) - len(rows)
    return rows


def fit(prompt: list[int], answers: list[list[int]], task: Task, counts: Counts) -> tuple[list[int], ...]:
    """Prompt and answers, such that the prompt with any of the answers stays within the task's limits.

    The oldest part of the prompt goes first. An answer that fills max_seq_len alone, or is longer than
    max_target_length, loses its tail but keeps its end token, and one token of the prompt stays: something must predict
    the first token. Of ChatGLM's prompts, the marks stay ([gMASK] <sop>): without them the network knows no positions.
    """
    limit = task.max_target_length or task.max_seq_len - max(1, task.template.frame_length)
    cut = [answer if len(answer) <= limit else [*answer[: limit - 1], answer[-1]] for answer in answers]
    counts.truncated_answers += sum(len(answer) > limit for answer in answers)
    room = task.max_source_length or task.max_seq_len - max(len(answer) for answer in cut)
    counts.truncated_prompts += len(prompt) > room
    return (cut_prompt(prompt, room, task.template), *cut)


def cut_prompt(prompt: list[int], room: int, template: Template) -> list[int]:
    """The newest part of a prompt, ``room`` tokens; what opens every text (bos) stays where there is room for more.

    ChatGLM's marks, in front or at the end, stay always: never fewer than template.frame_length tokens are left.
    """
    room = max(room, template.frame_length)
    if len(prompt) <= room:
        return prompt
    opening = list(template.prefix_ids)
    if (room <= len(opening) and not template.frame_length) or prompt[: len(opening)] != opening:
        opening = []
    return opening + prompt[len(prompt) - room + len(opening) :]


def batches(records: Dataset) -> Iterator[list[Record]]:
    """Records in lists of BATCH."""
    for batch in records.iter(batch_size=BATCH):
        yield [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


# --- the cache --------------------------------------------------------------------------------------------------------


def build_cache(folder: Path, write: Callable[[Path], dict[str, Counts]], wish: str | None) -> None:
    """Make a new folder, then move it into place. The caller holds the lock.

    write: puts train.arrow and eval.arrow into the folder it is given and counts what is in them. wish: kept in the
    manifest, see rebuild_wish.
    """
    started = time.monotonic()
    building, old = (folder.with_name(f".{folder.name}.{name}") for name in ("building", "old"))
    for rest in (building, old):  # what a killed run left
        shutil.rmtree(rest, ignore_errors=True)
    building.mkdir(mode=0o700)
    try:
        counts = write(building)
        manifest = {
            "report": {part: vars(one) for part, one in counts.items()},
            "files": {f"{part}.arrow": file_digest(building / f"{part}.arrow") for part in PARTS},
            "wish": wish,
        }
        (building / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=2), encoding="utf-8")
        if folder.exists():  # damaged, or unwanted; who has it open keeps its files
            folder.replace(old)
        building.replace(folder)
    finally:
        for rest in (building, old):
            shutil.rmtree(rest, ignore_errors=True)
    number = sum(one.records for one in counts.values())
    logger.info("Tokenised %d records in %.1f s into %s", number, time.monotonic() - started, folder)


def write_parts(folder: Path, task: Task, sets: list[Selected]) -> dict[str, Counts]:
    """Write train.arrow and eval.arrow batch by batch. Raises UserError if a set is of no use to the step."""
    totals = {part: Counts() for part in PARTS}
    schema = pyarrow.schema(list(SCHEMAS[task.phase].items()))
    held_out = [set() for _ in sets]
    if len(sets) > 1:
        held_out = [held_out_questions(one.eval, [] if one.own_eval else [one.train]) for one in sets]
    with ExitStack() as stack:
        writers = {}
        for part in PARTS:
            sink = stack.enter_context(pyarrow.OSFile(str(folder / f"{part}.arrow"), "wb"))
            writers[part] = stack.enter_context(pyarrow.ipc.new_stream(sink, schema))
            # Without any batch at all, an empty part would not open.
            writers[part].write_batch(pyarrow.RecordBatch.from_pylist([], schema=schema))
        for place, one in enumerate(sets):
            # Sets may share questions, rm-static with full-hh-rlhf, and a split of its own knows nothing of the hash.
            taken = set().union(*(questions for other, questions in enumerate(held_out) if other != place))
            for part, records in (("eval", one.eval), ("train", one.train)):
                counts = Counts()
                for batch in batches(records):
                    counts.records += len(batch)
                    if part == "train" and taken:
                        batch = drop(batch, lambda one, taken=taken: question_of(one["messages"]) in taken, HELD_OUT, counts)
                    rows = tokenise(batch, task, counts)
                    writers[part].write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
                totals[part].add(counts)
            check_usable(one.path, task.phase, counts)
    return totals


def open_cache(folder: Path, wish: str | None = None) -> PhaseData | None:
    """The data in a finished folder, memory-mapped; None if there is none, it is damaged or not built for this wish."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if wish is not None and manifest["wish"] != wish:
            return None
        for name, digest in manifest["files"].items():
            if file_digest(folder / name) != digest:
                raise ValueError(f"{name} is not what was written")
        train, held_out = (Dataset.from_file(str(folder / f"{part}.arrow")) for part in PARTS)
        fingerprint = hashlib.blake2b(json.dumps(manifest["files"]).encode(), digest_size=16).hexdigest()
        return PhaseData(train, held_out, manifest["report"], fingerprint)
    except FileNotFoundError as error:
        if folder.exists():
            logger.warning("The cache %s is incomplete (%s): tokenising again.", folder, error)
        return None
    except (ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        logger.warning("The cache %s is damaged (%s): tokenising again.", folder, error)
        return None


def rebuild_wish() -> str:
    """A name for one --rebuild_cache, the same in all processes of a torch.distributed job, so that they build once."""
    wish = [uuid.uuid4().hex]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(wish, src=0)
    return wish[0]


def check_usable(path: str, phase: int, counts: Counts) -> None:
    """UserError if a whole set lacks what the step needs, though it has records."""
    candidates = counts.records - counts.dropped[HELD_OUT]
    if candidates and counts.dropped[NO_ANSWER] == candidates:
        raise UserError(
            f"{path}: prompts without answers, which only step 3 can use; step {phase} needs an answer in every record."
        )
    if candidates and counts.dropped[NO_REJECTED] == candidates:
        raise UserError(
            f'{path}: no record has a "rejected" answer. Step 2 trains on pairs; give every record one, or use the set '
            "in step 1 (--sft_only_data_path)."
        )


def check_something_left(paths: list[str], task: Task, counts: Counts) -> None:
    """UserError if no training record is left."""
    if counts.kept:
        return
    names = ", ".join(paths)
    if not counts.records:
        whole = ",".join("1" if task.phase == phase else "0" for phase in (1, 2, 3))
        raise UserError(
            f"{names}: too few records, none falls to step {task.phase}; --data_split {whole} gives all of them to it."
        )
    why = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items())
    if counts.dropped[TOO_LONG]:
        why += f" (raise --max_prompt_seq_len {task.max_seq_len})"
    raise UserError(f"{names}: of {counts.records} records none is left to train on: {why}.")


# --- what the key is made of ------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def code_digest() -> str:
    """Hash of the code between a record and its tokens; sources.content_key covers what comes before."""
    return "".join(file_digest(Path(file)) for file in (__file__, splits.__file__, *models.templates.code_files()))


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of all that decides how a tokenizer cuts text: the files that it saves, special tokens, chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    told = [type(tokenizer).__name__, special, tokenizer.chat_template, sorted(tokenizer.get_added_vocab().items())]
    # ChatGLM2 and ChatGLM3 have the same vocabulary file; ChatGLM-6B's other settings are in no file of its own.
    settings = ("chatglm_version", "do_lower_case", "remove_space", "encode_special_tokens")
    told.append([getattr(tokenizer, name, None) for name in settings])
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            # The config tells where the tokenizer came from, not what it does; what matters of it is in ``told``.
            if file.is_dir() or file.name == "tokenizer_config.json":
                continue
            content = file.read_bytes()
            if file.name == "tokenizer.json":  # padding and truncation are left from the last call, whoever made it
                content = json.dumps(json.loads(content) | {"padding": None, "truncation": None}).encode()
            digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()
