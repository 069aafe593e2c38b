"""Shared by the evaluations: built-in prompts, held-out records, batches, a loaded model and its answers, JSON output."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from errors import UserError
from inference.chatbot import context_length
from inference.engine import generate_many
from models.checkpoint_folder import CheckpointFolder
from models.device import Platform, attention_implementation, detect_platform, resolve_dtype, set_device
from models.heads import TokenLogProbs, TokenScores, at_last_token, prefix_length
from models.load import load_causal_lm
from models.templates import Template, load_template
from models.tokenizer import load_tokenizer
from training.utils.data.batching import pad_right
from training.utils.data.records import check_columns_used, read_records, readings
from training.utils.data.sources import open_source
from training.utils.data.tokenize import Counts, Encoding, Limits, cut_prompt, fit, fit_prompt, prompt_space

logger = logging.getLogger("sanbu")
BUILT_IN = json.loads(Path(__file__).with_name("builtin.json").read_text(encoding="utf-8"))
REPORT_SECONDS = 30  # between two lines of progress
Messages = list[dict[str, str]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its length in tokens with the end token, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, with its tokenizer and template."""

    path: str
    model: torch.nn.Module
    tokenizer: Any
    template: Template
    device: torch.device

    @property
    def longest(self) -> int:
        """Return how many tokens the model reads, a prefix that takes places of them aside."""
        return context_length(self.model.config) - prefix_length(self.model)

    def encode(self, prompts: list[Messages], room: int, flag: str, longest: int | None = None) -> list[list[int]]:
        """Return the token ids of the prompts, cut at the beginning where they leave less room for an answer.

        longest: further limit of a prompt in tokens. Raises UserError, which names the flag, if no prompt leaves the room.
        """
        limit = min(self.longest - room, longest or self.longest)
        if limit < 1:
            raise UserError(
                f"{flag} {room} leaves no room for a prompt in the {self.longest} tokens that {self.path} reads; lower it."
            )
        encoded = self.template.encode_prompts(self.tokenizer, prompts)
        self.tell_cuts(sum(len(ids) > limit for ids in encoded), 0, len(encoded), limit)
        return [self.cut(messages, ids, limit) for messages, ids in zip(prompts, encoded, strict=True)]

    def tell_cuts(self, prompts: int, answers: int, count: int, limit: int) -> None:
        """Say how many of so many prompts and their answers are cut to a limit in tokens, if any."""
        words = [f"{prompts} lost their oldest part"] if prompts else []
        words += [f"{answers} answers their end"] if answers else []
        if words:
            logger.warning("%s: of %d prompts %s, to fit into %d tokens", self.path, count, " and ".join(words), limit)

    def cut(self, messages: Messages, ids: list[int], space: int) -> list[int]:
        """Return the tokens of a prompt within a space, as training cuts them; a system text that alone is too long is cut too."""
        encoding = Encoding(3, self.tokenizer, self.template, Limits(space))
        cut = fit_prompt({"messages": messages, "calls": None}, ids, space, encoding)
        return cut_prompt(ids, space, self.template) if cut is None else cut

    def behind_prompts(
        self, prompts: Sequence[Messages], answers: Sequence[Sequence[list[int]]], limit: int | None = None
    ) -> list[tuple[list[int], ...]]:
        """Return each prompt with its answers, cut as in training to limit tokens (None: all that the model reads).

        answers: [answers to a prompt][prompts] of token ids. Returns [prompts] of (prompt, answer, answer, …).
        """
        limits, cut, counts, cuts = Limits(limit or self.longest), [], Counts(), 0
        encoded = self.template.encode_prompts(self.tokenizer, prompts)
        for messages, ids, *few in zip(prompts, encoded, *answers, strict=True):
            space = prompt_space(ids, few, limits, self.template)
            cuts += len(ids) > space
            cut.append(fit(self.cut(messages, ids, space), few, limits, self.template, counts))
        self.tell_cuts(cuts, counts.truncated_answers, len(encoded), limits.max_seq_len)
        return cut

    def answer(self, prompts: list[list[int]], **settings: Any) -> list[Answer]:
        """Return the answers to encoded prompts, those to one prompt together. settings: those of generate_many."""
        stop, pad = self.template.stop_token_ids, self.tokenizer.pad_token_id
        generation = generate_many(self.model, prompts, stop_token_ids=stop, pad_token_id=pad, **settings)
        columns = (generation.sequences, generation.lengths, generation.ended)
        return [
            Answer(self.template.decode_answer(self.tokenizer, tokens[:length]), length, ended)
            for tokens, length, ended in zip(*(column.tolist() for column in columns), strict=True)
        ]

    @torch.no_grad()
    def log_probs(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
        """Return log p(answer | prompt) in nats of each pair, the end token included, for a batch of token ids."""
        ids, mask = self.padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        target = mask.bool()
        for row, prompt in enumerate(prompts):
            target[row, : len(prompt)] = False
        return TokenLogProbs(self.model)(ids, mask, target_mask=target[:, 1:]).sum(dim=1).tolist()

    @torch.no_grad()
    def scores(self, rows: Sequence[list[int]]) -> list[float]:
        """Return the score of each row of token ids at its last token, by a reward model."""
        ids, mask = self.padded(rows)
        return at_last_token(TokenScores(self.model)(ids, mask), mask).tolist()

    def padded(self, rows: Sequence[list[int]]) -> list[torch.Tensor]:
        """Return ids and mask [rows, longest] on the model's device, padded behind."""
        return [tensor.to(self.device) for tensor in pad_right(rows, self.tokenizer.pad_token_id)]


def load_for_evaluation(
    checkpoint: CheckpointFolder,
    dtype: str,
    attention: str,
    load: Callable[..., torch.nn.Module] = load_causal_lm,
    platform: Platform | None = None,
    local_rank: int = 0,
    **options: Any,
) -> LoadedModel:
    """Load a checkpoint on this process's device. dtype, attention: the flags; options: further arguments of load."""
    platform = platform or detect_platform()
    device = set_device(platform, local_rank)
    tokenizer = load_tokenizer(checkpoint)
    kernels = attention_implementation(attention, platform)
    options |= {"dtype": resolve_dtype(dtype, platform), "attn": kernels, "tokenizer": tokenizer}
    model = load(checkpoint, **options).to(device).eval()
    return LoadedModel(checkpoint.path, model, tokenizer, load_template(checkpoint, tokenizer), device)


def in_batches(
    work: Callable[[list[int]], Iterable[Result]],
    lengths: Sequence[int],
    size: int,
    rank: int = 0,
    processes: int = 1,
    done: str = "",
) -> list[Result]:
    """Return what ``work`` gives for each item, in their order and on every process. work takes a batch of their numbers.

    Batches hold items of like length, the longest first, and are the same for every number of processes, which take them
    in turn: so the results are the same too. done: the word of the lines of progress, such as "answered".
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    results: dict[int, Result] = {}
    reported = time.monotonic()
    for finished, numbers in enumerate(batches[rank::processes], 1):
        results |= zip(numbers, work(numbers), strict=True)
        if done and rank == 0 and time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            print(f"{done} {min(finished * processes * size, len(order))} of {len(order)}", flush=True)
    if processes > 1:
        gathered: list[dict[int, Result]] = [{}] * processes
        dist.all_gather_object(gathered, results)
        results = {number: one for each in gathered for number, one in each.items()}
    return [results[number] for number in range(len(order))]


def held_out(path: str, columns: dict[str, str], cache_dir: str | None = None, alone: bool = True) -> Any:
    """Return the held-out records of a data set, or all where it has no held-out part. alone: see load_records.

    What was left out of them, or not read, is told. So are dialogues with tools, which are left out: here prompts are messages.
    """
    read = read_records(open_source(path), columns, cache_dir)
    if alone:
        check_columns_used([read], columns)
    split = "eval" if "eval" in read.datasets else "train"
    records = read.datasets[split]
    for note in readings(read)[split].notes:
        logger.warning("%s: %s", path, note)
    plain = [row for row, calls in enumerate(records["calls"]) if calls is None]
    if len(plain) < len(records):
        logger.warning("%s: %d dialogues with tools are not evaluated", path, len(records) - len(plain))
    if not plain:
        raise UserError(f"{path}: only dialogues with tools, which the evaluation does not read; name another set.")
    return records.select(plain) if len(plain) < len(records) else records


def write_json(file: Path | str, content: Any) -> None:
    """Write a readable JSON file: indented, letters as letters."""
    Path(file).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
