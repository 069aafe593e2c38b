"""Turn records into tokens: what is too long is cut or dropped, what is of no use is dropped, and both are counted."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import pyarrow

from errors import UserError
from models.shared_prompts import shared_length
from models.templates import Template
from models.tool_calls import check_tools, encode_tool_dialogue
from training.utils.data.dialogues import Example, grouped, newest_turns, stands_in
from training.utils.data.formats import Record

logger = logging.getLogger("sanbu")

Row = dict[str, Any]

TOKENS, COUNT = pyarrow.list_(pyarrow.int32()), pyarrow.int32()
# Columns by phase. between: [start, end, start, end, ...] of what stands between the answers of a dialogue. length counts
# real tokens; padded_length what a pair takes in a batch of [2, time], where the longer answer sets time.
SCHEMAS = {
    1: pyarrow.schema({"input_ids": TOKENS, "prompt_length": COUNT, "between": TOKENS, "length": COUNT}),
    2: pyarrow.schema(
        {
            "chosen_ids": TOKENS,
            "rejected_ids": TOKENS,
            "prompt_length": COUNT,
            "margin": pyarrow.float32(),
            "length": COUNT,
            "padded_length": COUNT,
        }
    ),
    3: pyarrow.schema({"prompt_ids": TOKENS, "length": COUNT}),
}
ANSWERS = {1: ("chosen",), 2: ("chosen", "rejected"), 3: ()}  # the answers that a step needs
BATCH = 500  # records tokenised at once: enough for the tokenizer's threads, few enough to keep memory flat
QUESTION_SHARE = 4  # of max_seq_len an answer that is too long leaves this part to its prompt, or less if that is shorter
LONGEST_TOKEN = 128  # characters, at least: a token of ChatGLM-6B with a shorter name stands for 80 blanks
SPLITS = ("train", "eval")
# Reasons for dropping a record, as the report gives them.
NO_ANSWER, NO_REJECTED = "without an answer", "without a rejected answer"
SAME, SAME_CUT = "chosen equals rejected", "chosen equals rejected after truncation"
TOO_LONG, REFUSED = "prompt too long", "refused by the chat template"
SYSTEM_TOO_LONG, CALL_TOO_LONG = "system text too long", "call of a tool too long"
TOOLS_TOO_LONG = "tools and newest turn too long"
RAISE = (TOO_LONG, SYSTEM_TOO_LONG, CALL_TOO_LONG, TOOLS_TOO_LONG)  # what a longer limit mends


@dataclass
class Counts:
    """Numbers of records, rows kept, tokens and cuts of one split; dropped: number of records by reason.

    joined: records that became part of a later one's row; tokens_apart: all tokens, had each record a row of its own.
    rejected: records with a worse answer, which step 1 does not learn.
    """

    records: int = 0
    kept: int = 0
    joined: int = 0
    tokens: int = 0
    tokens_apart: int = 0
    truncated_prompts: int = 0
    truncated_answers: int = 0
    rejected: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def sum_of(counts: list[Counts]) -> Counts:
    """Return the counts of several sets together."""
    names = vars(Counts())
    return Counts(**{name: sum((getattr(one, name) for one in counts), start=names[name]) for name in names})


def report_of(counts: dict[str, Counts]) -> dict[str, dict[str, Any]]:
    """Return the counts by split as JSON values."""
    return {split: vars(of_split) for split, of_split in counts.items()}


@dataclass(frozen=True)
class Limits:
    """Numbers of tokens: of prompt and answer together (phase 3: of the prompt), or of each apart (both, in phase 1)."""

    max_seq_len: int
    max_source_length: int | None = None
    max_target_length: int | None = None


@dataclass(frozen=True)
class Encoding:
    """All that decides how a record becomes tokens."""

    phase: int
    tokenizer: Any
    template: Template
    limits: Limits

    @cached_property
    def most_characters(self) -> int:
        """Return a number of characters above which a text has more tokens than the limits leave."""
        limits = self.limits
        tokens = max(limits.max_seq_len, limits.max_source_length or 0, limits.max_target_length or 0)
        longest = max(LONGEST_TOKEN, *map(len, self.tokenizer.get_vocab()))
        return (tokens + 1) * longest


def tokenise(records: list[Record], encoding: Encoding, counts: Counts) -> list[Row]:
    """Return rows (SCHEMAS) of a batch of records, fewer where some are dropped; they are added to counts."""
    if any(record["calls"] for record in records):
        check_tools(encoding.tokenizer, encoding.template)
    if encoding.phase != 3:
        records = drop(records, lambda record: not record["chosen"], NO_ANSWER, counts)
    if encoding.phase == 2:
        records = drop(records, lambda record: record["rejected"] is None, NO_REJECTED, counts)
        records = drop(records, lambda record: record["chosen"].strip() == record["rejected"].strip(), SAME, counts)
    examples = encode_records([cut_texts(record, encoding.most_characters) for record in records], encoding, counts)
    rows = {1: answer_rows, 2: pair_rows, 3: prompt_rows}[encoding.phase](examples, encoding, counts)
    counts.kept += len(rows)
    counts.tokens += sum(row["length"] for row in rows)
    return rows


def drop(records: list[Record], unfit: Callable[[Record], bool], reason: str, counts: Counts) -> list[Record]:
    """Return the records that are fit; the others are counted."""
    fit = [record for record in records if not unfit(record)]
    if len(fit) < len(records):
        counts.dropped[reason] += len(records) - len(fit)
    return fit


def cut_texts(record: Record, most: int) -> Record:
    """Return a record whose turns have their last and whose answers have their first ``most`` characters.

    What lies beyond would be tokenised (1 s a MB) and cut away.
    """
    texts = [turn["content"] for turn in record["messages"]] + [record["chosen"], record["rejected"] or ""]
    if max(map(len, texts)) <= most:
        return record
    messages = [turn | {"content": turn["content"][-most:]} for turn in record["messages"]]
    return record | {"messages": messages} | {name: record[name] and record[name][:most] for name in ("chosen", "rejected")}


def encode_records(records: list[Record], encoding: Encoding, counts: Counts) -> list[Example]:
    """Return the records whose dialogue the template takes, with the tokens of their prompts and answers."""
    template, tokenizer = encoding.template, encoding.tokenizer
    fields = ANSWERS[encoding.phase]
    plain = [record for record in records if not record["calls"]]
    examples, rest = [], [record for record in records if record["calls"]]
    try:
        prompts = template.encode_prompts(tokenizer, [record["messages"] for record in plain])
        answers = [template.encode_answers(tokenizer, [record[field] for record in plain]) for field in fields]
        pairs = zip(*answers, strict=True) if answers else [()] * len(plain)
        examples = [Example(*one) for one in zip(plain, prompts, map(list, pairs), strict=True)]
    except UserError:  # the chat template refuses at least one, for instance for its roles: ask one by one
        rest = records
    for record in rest:
        try:
            examples.append(Example(record, *encode_one(record, encoding, fields)))
        except UserError as error:
            if not counts.dropped[REFUSED]:
                begins = str(record["messages"][0]["content"])[:60]
                logger.warning("%s The record, which begins with %r, is left out; more are only counted.", error, begins)
            counts.dropped[REFUSED] += 1
    return examples


def encode_one(record: Record, encoding: Encoding, fields: tuple[str, ...]) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a record's prompt and answers. Raise UserError if the template refuses them."""
    template, tokenizer = encoding.template, encoding.tokenizer
    if record["calls"]:
        calls = json.loads(record["calls"])
        answers = [calls[field] for field in fields]
        return encode_tool_dialogue(tokenizer, template, calls["messages"], answers, calls["tools"])
    prompt = template.encode_prompt(tokenizer, record["messages"])
    return prompt, [template.encode_answer(tokenizer, record[field]) for field in fields]


def answer_rows(examples: list[Example], encoding: Encoding, counts: Counts) -> list[Row]:
    """Return rows of step 1: one for a dialogue, where its template and its length allow."""
    rows, left_out = [], counts.dropped.total()
    for dialogue in grouped(examples, lambda example: example.record):
        rows += filter(None, dialogue_rows(dialogue, encoding, counts))
    counts.joined += len(examples) - len(rows) - (counts.dropped.total() - left_out)
    return rows


def dialogue_rows(examples: list[Example], encoding: Encoding, counts: Counts) -> list[Row | None]:
    """Return the rows of a dialogue, None for one that is left out.

    One is for all answers that stand in the last one's prompt as they are learned. Of a dialogue that is too long, the
    oldest whole turns become a row of their own. The other answers have one each.
    """
    limits, template = encoding.limits, encoding.template
    cut = partial(fit, limits=limits, template=template, counts=Counts())
    counts.tokens_apart += sum(len(part) for one in examples for part in cut(one.prompt, one.answers))
    *earlier, last = examples
    whole = [len(one.answers[0]) <= longest_answer(one.prompt, limits, template) for one in earlier]
    joins = [uncut and stands_in(one, last, template) for one, uncut in zip(earlier, whole, strict=True)]
    rows = [joined_row([one], encoding, counts) for one, joined in zip(earlier, joins, strict=True) if not joined]
    if not any(joins):
        return [*rows, joined_row([last], encoding, counts)]

    def fits(example: Example) -> bool:
        return cut(example.prompt, example.answers)[0] == example.prompt

    parts, newest_first = [*compress(earlier, joins), last], []
    while parts:
        window = newest_turns(parts, encoding.tokenizer, template, fits)
        if len(window[-1].prompt) < len(parts[-1].prompt):
            counts.truncated_prompts += len(window)
        parts = parts[: len(parts) - len(window)]
        newest_first.append(joined_row(window, encoding, counts))
    return [*rows, *reversed(newest_first)]


def joined_row(examples: list[Example], encoding: Encoding, counts: Counts) -> Row | None:
    """Return one row of examples that stand in the last one, or of a single one; None if it is left out."""
    fitted = fit_example(examples[-1], encoding, counts)
    if fitted is None:
        return None
    prompt, answer = fitted
    between: list[int] = []
    for one, following in pairwise(examples):
        between += [len(one.prompt) + len(one.answers[0]), len(following.prompt)]
    first = len(prompt) if len(examples) == 1 else len(examples[0].prompt)
    return {
        "input_ids": prompt + answer,
        "prompt_length": first,
        "between": between,
        "length": len(prompt) + len(answer),
    }


def pair_rows(examples: list[Example], encoding: Encoding, counts: Counts) -> list[Row]:
    """Return rows of step 2. Both answers follow the same prompt, which is cut for the longer of them."""
    rows = []
    for example in examples:
        fitted = fit_example(example, encoding, counts)
        if fitted is None:
            continue
        prompt, good, bad = fitted
        if good == bad:
            counts.dropped[SAME if example.answers[0] == example.answers[1] else SAME_CUT] += 1
            continue
        lengths = len(prompt) + len(good), len(prompt) + len(bad)
        row = {"chosen_ids": prompt + good, "rejected_ids": prompt + bad, "prompt_length": len(prompt)}
        margin = example.record["margin"]
        rows.append(row | {"margin": margin, "length": sum(lengths), "padded_length": 2 * max(lengths)})
    return rows


def prompt_rows(examples: list[Example], encoding: Encoding, counts: Counts) -> list[Row]:
    """Return rows of step 3. A prompt that is too long is dropped: cut, it would be another question."""
    prompts = [example.prompt for example in examples]
    rows = [{"prompt_ids": ids, "length": len(ids)} for ids in prompts if len(ids) <= encoding.limits.max_seq_len]
    if len(rows) < len(prompts):
        counts.dropped[TOO_LONG] += len(prompts) - len(rows)
    return rows


def fit_example(example: Example, encoding: Encoding, counts: Counts) -> tuple[list[int], ...] | None:
    """Return prompt and answers within the limits, as fit does, but with a system text, tools and calls whole.

    The oldest whole turns go first, then, without tools, the beginning of the newest question. None, counted with its
    reason, if that is not enough.
    """
    record, limits, template = example.record, encoding.limits, encoding.template
    calls, longest = json.loads(record["calls"] or "{}"), longest_answer(example.prompt, limits, template)
    for name, answer in zip(ANSWERS[encoding.phase], example.answers, strict=True):
        if calls and "tool_calls" in calls[name] and len(answer) > longest:
            counts.dropped[CALL_TOO_LONG] += 1
            return None
    space = prompt_space(example.prompt, example.answers, limits, template)
    prompt = fit_prompt(record, example.prompt, space, encoding)
    if prompt is None:
        counts.dropped[TOOLS_TOO_LONG if calls else SYSTEM_TOO_LONG] += 1
        return None
    counts.truncated_prompts += len(example.prompt) > space
    return fit(prompt, example.answers, limits, template, counts)


def fit_prompt(record: Record, prompt: list[int], space: int, encoding: Encoding) -> list[int] | None:
    """Return a prompt of at most ``space`` tokens, a system text and tools whole; None if they alone take more."""
    if len(prompt) <= space or not (record["calls"] or record["messages"][0]["role"] == "system"):
        return cut_prompt(prompt, space, encoding.template)
    return newest_whole_turns(record, encoding, space)


def newest_whole_turns(record: Record, encoding: Encoding, space: int) -> list[int] | None:
    """Return the tokens of a prompt without its oldest turns, at most ``space``; None if the newest one is too long.

    Of a prompt without tools the system text stays and the newest question loses its beginning.
    """
    messages = record["messages"]
    system = int(messages[0]["role"] == "system")
    starts = [place for place, turn in enumerate(messages) if turn["role"] == "user" and place > system]

    def prompt_from(start: int) -> list[int]:
        kept = {"messages": messages[:system] + messages[start:], "calls": record["calls"]}
        if record["calls"]:
            calls = json.loads(record["calls"])
            calls["messages"] = calls["messages"][:system] + calls["messages"][start:]
            kept["calls"] = json.dumps(calls)
        return encode_one(kept, encoding, ())[0]

    place = bisect_left(starts, True, key=lambda start: len(prompt_from(start)) <= space)
    if place < len(starts):
        return prompt_from(starts[place])
    if record["calls"]:
        return None
    prompt = prompt_from(starts[-1] if starts else system)
    other = {"role": "user", "content": "1" if messages[-1]["content"].startswith("0") else "0"}
    frame = encode_one({"messages": [*messages[:system], other], "calls": None}, encoding, ())[0]
    head, tail = shared_length(prompt, frame), shared_length(prompt[::-1], frame[::-1])
    return None if head + tail >= space else prompt[:head] + prompt[len(prompt) - space + head :]


def fit(
    prompt: list[int], answers: list[list[int]], limits: Limits, template: Template, counts: Counts
) -> tuple[list[int], ...]:
    """Return prompt and answers, cut such that the prompt with any of the answers stays within the limits.

    The oldest part of the prompt goes first, down to a quarter of max_seq_len. Then an answer, as one that is longer than
    max_target_length, loses its tail but keeps its end token. Of ChatGLM's prompts, the marks stay ([gMASK] <sop>): without
    them the network knows no positions.
    """
    longest = longest_answer(prompt, limits, template)
    cut = [answer if len(answer) <= longest else [*answer[: longest - 1], answer[-1]] for answer in answers]
    counts.truncated_answers += sum(len(answer) > longest for answer in answers)
    space = prompt_space(prompt, answers, limits, template)
    counts.truncated_prompts += len(prompt) > space
    return (cut_prompt(prompt, space, template), *cut)


def prompt_space(prompt: list[int], answers: list[list[int]], limits: Limits, template: Template) -> int:
    """Return how many tokens of a prompt there is space for before any of the answers, these cut to longest_answer."""
    if limits.max_source_length:
        return limits.max_source_length
    return limits.max_seq_len - min(longest_answer(prompt, limits, template), max(map(len, answers)))


def longest_answer(prompt: list[int], limits: Limits, template: Template) -> int:
    """Return how many tokens of an answer there is space for behind a prompt, its end token included."""
    kept = min(len(prompt), limits.max_seq_len // QUESTION_SHARE)
    return limits.max_target_length or limits.max_seq_len - max(1, template.frame_length, kept)


def cut_prompt(prompt: list[int], length: int, template: Template) -> list[int]:
    """Return the newest part of a prompt; what opens every text (bos) stays where there is space for more.

    ChatGLM's marks, in front or at the end, stay always: never fewer than template.frame_length tokens are left.
    """
    length = max(length, template.frame_length)
    if len(prompt) <= length:
        return prompt
    opening = list(template.prefix_ids)
    if (length <= len(opening) and not template.frame_length) or prompt[: len(opening)] != opening:
        opening = []
    return opening + prompt[len(prompt) - length + len(opening) :]


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a hash of all that decides how a tokenizer cuts text: the files it saves, special tokens, chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    facts = [type(tokenizer).__name__, special, tokenizer.chat_template, sorted(tokenizer.get_added_vocab().items())]
    # ChatGLM2 and ChatGLM3 have the same vocabulary file; ChatGLM-6B's other settings are in no file of its own.
    settings = ("chatglm_version", "do_lower_case", "remove_space", "encode_special_tokens")
    facts.append([getattr(tokenizer, name, None) for name in settings])
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            # The config tells where the tokenizer came from, not what it does; what matters of it is in ``facts``.
            if file.is_dir() or file.name == "tokenizer_config.json":
                continue
            content = file.read_bytes()
            if file.name == "tokenizer.json":  # padding and truncation are left from the last call, whoever made it
                content = json.dumps(json.loads(content) | {"padding": None, "truncation": None}).encode()
            digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()
