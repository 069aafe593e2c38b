"""Prepare the data of a step: records of each set, the step's share of them, tokens in the cache, a report in words."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from errors import UserError
from models.templates import Template
from training.utils.data.arrow_rows import ArrowRows, arrow_writer
from training.utils.data.cache import CachedData, cached, new_rebuild_id
from training.utils.data.dialogues import whole_dialogues
from training.utils.data.names import ALIASES, OUR_NAMES
from training.utils.data.overview import FILE, overview
from training.utils.data.records import check_columns_used, notes_of, read_records, readings, record_content
from training.utils.data.rows import Reading
from training.utils.data.sources import open_source
from training.utils.data.splits import batches, held_out_questions, question_of, select_phase
from training.utils.data.tokenize import (
    NO_ANSWER,
    NO_REJECTED,
    QUESTION_SHARE,
    RAISE,
    SCHEMAS,
    SPLITS,
    Counts,
    Encoding,
    Limits,
    drop,
    report_of,
    sum_of,
    tokenise,
    tokenizer_digest,
)

logger = logging.getLogger("sanbu")

HELD_OUT = "question held out in another set"


@dataclass(frozen=True)
class StepRecords:
    """The records of one path that belong to the step. own_eval: the set came with a held-out split."""

    path: str
    reading: Reading  # of the training split
    notes: list[str]  # of all splits
    train: ArrowRows
    eval: ArrowRows
    own_eval: bool


def prepare_phase(
    args: Any, phase: int, tokenizer: Any, template: Template, overview_folder: str | None = None
) -> CachedData:
    """Return tokenised training and evaluation records of one step, from the cache or built into it.

    args: the flags of a step; those of data and lengths are read. Log a table for each set and one line a split: what was
    kept, cut and dropped, and why. overview_folder: gets the tables as data.txt. Processes of one torch.distributed job
    build once. Raise UserError if nothing is left to train on.
    """
    limits = limits_of(args, phase, template)
    encoding = Encoding(phase, tokenizer, template, limits)
    sft_only_paths = args.sft_only_data_path if phase == 1 else ()
    paths = [(path, False) for path in args.data_path] + [(path, True) for path in sft_only_paths]
    sources = [open_source(path) for path, _ in paths]
    content = [
        phase,
        [(record_content(source, args.column_map), sft) for source, (_, sft) in zip(sources, paths, strict=True)],
        asdict(limits),
        [args.data_split, args.seed, args.eval_fraction],
        tokenizer_digest(tokenizer),
        asdict(template),
    ]
    rebuild_id = new_rebuild_id() if args.rebuild_cache else None

    def build(folder: Path) -> dict[str, dict[str, Any]]:
        started = time.monotonic()
        # Who asks for --rebuild_cache trusts nothing that is there, the records included.
        options = {"columns": args.column_map, "cache_dir": args.cache_dir, "rebuild_id": rebuild_id}
        read = [read_records(source, **options) for source in sources]
        check_columns_used(read, args.column_map)
        share = {"data_split": args.data_split, "seed": args.seed, "eval_fraction": args.eval_fraction}
        sets = []
        for one, (path, sft_only) in zip(read, paths, strict=True):
            notes = notes_of(one)
            train, held_out = select_phase(one.datasets, phase, sft_only=sft_only, notes=notes, **share)
            reading, own_eval = readings(one)["train"], "eval" in one.datasets
            sets.append(StepRecords(path, reading, notes, train, held_out, own_eval))
        counts = write_tokens(folder, encoding, sets)
        total = {split: sum_of([of_set[split] for of_set in counts]) for split in SPLITS}
        check_something_left([path for path, _ in paths], encoding, total["train"])
        number = sum(of_split.records for of_split in total.values())
        logger.info("Tokenised %d records in %.1f s into %s", number, time.monotonic() - started, folder.parent)
        told = [
            {"form": one.reading.form, "notes": [*one.notes, *cut_notes(of_set, limits)], **report_of(of_set)}
            for one, of_set in zip(sets, counts, strict=True)
        ]
        return report_of(total) | {"sets": told}

    data = cached("tokens", content, SPLITS, build, args.cache_dir, rebuild_id)
    loss_on = getattr(args, "loss_on", "answer")  # a flag of step 1 alone
    table = overview(data, [path for path, _ in paths], phase, tokenizer, args.show_examples, loss_on)
    for line in (table, *report_lines(data.report)):
        logger.info("%s", line)
    if overview_folder and not (dist.is_initialized() and dist.get_rank()):
        Path(overview_folder, FILE).write_text(table + "\n", encoding="utf-8")
    return data


def cut_notes(counts: dict[str, Counts], limits: Limits) -> list[str]:
    """Return the rule by which answers of a set were cut, where some were."""
    if limits.max_target_length or not sum_of([*counts.values()]).truncated_answers:
        return []
    least = f"{limits.max_seq_len // QUESTION_SHARE} tokens of its prompt, or all of them if these are fewer"
    return [f"answers cut at the end: of --max_seq_len {limits.max_seq_len} each leaves {least}"]


def limits_of(args: Any, phase: int, template: Template) -> Limits:
    """Return the limits that the flags set. Raise UserError if they leave no space for what the template always writes."""
    name = "max_prompt_seq_len" if phase == 3 else "max_seq_len"
    length, least = getattr(args, name), max(2, template.frame_length + 1)
    if length < least:
        raise UserError(f"--{name} {length}: expected at least {least} tokens.")
    if phase != 1:
        return Limits(length)
    source = args.max_source_length
    if source is not None and source < template.frame_length:
        raise UserError(f"--max_source_length {source}: expected at least {template.frame_length} tokens.")
    return Limits(length, source, args.max_target_length)


def write_tokens(folder: Path, encoding: Encoding, sets: list[StepRecords]) -> list[dict[str, Counts]]:
    """Write train.arrow and eval.arrow batch by batch; return the counts of each set by split.

    Raise UserError if a set is of no use to the step.
    """
    counts = []
    held_out = [set() for _ in sets]
    if len(sets) > 1:
        held_out = [held_out_questions(one.eval, [] if one.own_eval else [one.train]) for one in sets]
    with ExitStack() as stack:
        write = {
            split: stack.enter_context(arrow_writer(folder / f"{split}.arrow", SCHEMAS[encoding.phase]))
            for split in SPLITS
        }
        for index, one in enumerate(sets):
            # Sets may share questions, rm-static with full-hh-rlhf, and a split of its own knows nothing of the hash.
            elsewhere = set().union(*held_out[:index], *held_out[index + 1 :])
            held_back = tokenise_records(one.eval, encoding, set(), write["eval"])
            trained = tokenise_records(one.train, encoding, elsewhere, write["train"])
            check_usable(one, encoding.phase, trained)
            counts.append({"train": trained, "eval": held_back})
    return counts


def tokenise_records(
    records: ArrowRows, encoding: Encoding, excluded: set[str], write: Callable[[list[dict[str, Any]]], None]
) -> Counts:
    """Tokenise and write records, but for those whose question is excluded; return what became of them."""
    counts = Counts()
    for batch in whole_dialogues(batches(records)):
        counts.records += len(batch)
        if excluded:
            batch = drop(batch, lambda record: question_of(record["messages"]) in excluded, HELD_OUT, counts)
        counts.rejected += sum(record["rejected"] is not None for record in batch)
        write(tokenise(batch, encoding, counts))
    return counts


def check_usable(one: StepRecords, phase: int, counts: Counts) -> None:
    """Raise UserError if a whole set lacks what the step needs, though it has records."""
    candidates = counts.records - counts.dropped[HELD_OUT]
    path, others = one.path, [name for name, content in one.reading.unread.items() if content]
    ours = [name for name in others if ALIASES.get(name.strip().lower(), name) in OUR_NAMES]
    if candidates and counts.dropped[NO_ANSWER] == candidates and ours:
        raise UserError(
            f"{path}: read as prompts alone, as the first record is one, but later records have {', '.join(ours)}; give every "
            "record an answer, or put the prompts into a file of their own."
        )
    if candidates and counts.dropped[NO_ANSWER] == candidates and others:
        raise UserError(
            f"{path}: read as prompts alone, for the fields {', '.join(others)} are not known, and step {phase} needs answers; "
            f"say which is which{one.reading.advice} (docs/en/own-data.md)."
        )
    if candidates and counts.dropped[NO_ANSWER] == candidates:
        raise UserError(
            f"{path}: prompts without answers, which only step 3 can use; step {phase} needs an answer in every record."
        )
    if candidates and counts.dropped[NO_REJECTED] == candidates:
        raise UserError(
            f'{path}: no record has a "rejected" answer. Step 2 trains on pairs; give every record one, or use the set '
            "in step 1 (--sft_only_data_path)."
        )


def check_something_left(paths: list[str], encoding: Encoding, counts: Counts) -> None:
    """Raise UserError if no training record is left."""
    if counts.kept:
        return
    names = ", ".join(paths)
    if not counts.records:
        whole = ",".join("1" if encoding.phase == phase else "0" for phase in (1, 2, 3))
        raise UserError(
            f"{names}: too few records, none falls to step {encoding.phase}; --data_split {whole} --eval_fraction 0 trains on "
            "all of them."
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items())
    if any(counts.dropped[reason] for reason in RAISE):
        source = encoding.limits.max_source_length
        name = "max_prompt_seq_len" if encoding.phase == 3 else "max_source_length" if source else "max_seq_len"
        reasons += f" (raise --{name} {source or encoding.limits.max_seq_len})"
    raise UserError(f"{names}: of {counts.records} records none is left to train on: {reasons}.")


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return the counts of all sets together in words, one line a split."""
    cuts = {"truncated_prompts": "prompts lost their oldest part", "truncated_answers": "answers lost their tail"}
    lines = []
    for split in SPLITS:
        counts = report[split]
        used = counts["kept"] + counts["joined"]
        line = f"{split}: {used} of {counts['records']} records, {counts['tokens']} tokens"
        line += "".join(f"; {counts[name]} {words}" for name, words in cuts.items() if counts[name])
        line += "".join(f"; {count} dropped: {reason}" for reason, count in counts["dropped"].items())
        lines.append(line)
    return lines
