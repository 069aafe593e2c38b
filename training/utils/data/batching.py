"""Cut examples into batches: like lengths together, as many micro-batches on every process, padding to the longest.

plan_epoch cuts an epoch into global batches (one optimizer step each) without knowing how many processes there are;
plan_micro_batches cuts one global batch for them. Both return positions, no data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from models.shared_prompts import SharedRows, share_prompts

FILLER = -1
WINDOW = 100  # global batches sorted together: 16 left 8 to 16 % padding in real sets, 100 leaves 3 to 4 %


def plan_epoch(
    lengths: Sequence[int], global_batch_size: int, seed: int, epoch: int, shuffle: bool = True, bucket: bool = True
) -> list[list[int]]:
    """Return the global batches of one epoch: every example once, in an order that follows from seed and epoch alone.

    The examples are shuffled, sorted by length within windows of WINDOW global batches, cut into global batches, and
    these are shuffled. The examples left over are the last, shorter batch. shuffle=False keeps the order of the data up
    to the sorting; bucket=False sorts nothing.
    """
    random = np.random.default_rng([seed, epoch])
    lengths = np.asarray(lengths)
    order = random.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    whole = len(order) - len(order) % global_batch_size
    batches = []
    for start in range(0, whole, WINDOW * global_batch_size):
        window = order[start : min(start + WINDOW * global_batch_size, whole)]
        if bucket:
            window = window[np.argsort(lengths[window], kind="stable")]
        batches += np.split(window, len(window) // global_batch_size)
    if shuffle:
        batches = [batches[index] for index in random.permutation(len(batches))]
    if whole < len(order):
        batches.append(order[whole:])
    return [batch.tolist() for batch in batches]


@dataclass(frozen=True)
class Epochs:
    """The global batches of a run, epoch after epoch: ``size`` examples each, numbered from 1.

    After a change of the size within a run (--allow) they are those behind batch ``since``, when ``seen`` examples of ``epoch``
    had been taken; the rest of this epoch keeps the order that was drawn for batches of ``order``.
    """

    size: int
    since: int = 0
    epoch: int = 0
    seen: int = 0
    order: int = 0

    def changed(self, number: int, size: int, count: int) -> Epochs:
        """Return the batches of another size behind the one with this number. count: examples of an epoch."""
        done, rest = number - self.since, math.ceil((count - self.seen) / self.size)
        if done < rest:
            epoch, seen, order = self.epoch, self.seen + done * self.size, self.order or self.size
        else:
            epochs, within = divmod(done - rest, math.ceil(count / self.size))
            epoch, seen, order = self.epoch + 1 + epochs, within * self.size, self.size
        return Epochs(size, number, epoch, seen, order if seen else 0)

    def total(self, count: int, epochs: int) -> int:
        """Return the number of the last batch of so many epochs of so many examples."""
        if self.epoch >= epochs:
            return self.since
        rest = math.ceil((count - self.seen) / self.size)
        return self.since + rest + (epochs - self.epoch - 1) * math.ceil(count / self.size)

    def after(
        self, number: int, lengths: Sequence[int], seed: int, bucket: bool = True, fill: bool = False
    ) -> Iterator[tuple[int, int, list[int], bool]]:
        """Yield (number, epoch, examples, whether it ends the epoch) for the batches behind one, without end.

        fill: the last batch of an epoch is filled up from the epoch's start. bucket: as in plan_epoch.
        """
        epoch, done = self.epoch, self.since
        while True:
            begun = epoch == self.epoch and self.seen > 0
            plan = plan_epoch(lengths, self.order if begun else self.size, seed, epoch, bucket=bucket)
            order = list(chain.from_iterable(plan))
            if begun:
                plan = [order[start : start + self.size] for start in range(self.seen, len(order), self.size)]
            if fill:
                plan[-1] = list(islice(chain(plan[-1], cycle(order)), self.size))
            for position in range(max(number - done, 0), len(plan)):
                yield done + position + 1, epoch, plan[position], position == len(plan) - 1
            epoch, done = epoch + 1, done + len(plan)


def plan_micro_batches(
    lengths: Sequence[int], world_size: int, max_examples: int | None, max_tokens: int | None
) -> list[list[list[int]]]:
    """Cut one global batch for the processes: [rank][micro_batch] -> positions into lengths.

    Every position occurs once; every rank gets the same number of micro-batches. A micro-batch of only [FILLER] is for
    a rank that has no more work. max_examples, max_tokens: limits of one micro-batch, None for no limit; tokens count
    padding (examples x longest). No lengths: no micro-batches. Raise UserError if a single example exceeds max_tokens.
    """
    longest = max(lengths, default=0)
    if max_tokens is not None and longest > max_tokens:
        raise UserError(
            f"--max_tokens_per_device {max_tokens}: an example takes {longest} tokens; raise it, or lower the length "
            "limit (--max_seq_len; step 3: --max_prompt_seq_len, --max_answer_seq_len)."
        )
    # Assign examples in a zigzag, longest first, so that ranks get equal work and each has like lengths together.
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index, position in enumerate(order):
        turn, rank = divmod(index, world_size)
        shares[rank if turn % 2 == 0 else world_size - 1 - rank].append(position)
    plans = [_cut(share, lengths, max_examples or len(lengths), max_tokens) for share in shares]
    number = max(len(plan) for plan in plans)
    return [_stretch(plan, number, lengths) for plan in plans]


def _cut(share: list[int], lengths: Sequence[int], max_examples: int, max_tokens: int | None) -> list[list[int]]:
    """Cut positions, longest first, into as few micro-batches as the limits allow."""
    plan: list[list[int]] = []
    for position in share:
        full = not plan or len(plan[-1]) == max_examples
        if full or (max_tokens is not None and (len(plan[-1]) + 1) * lengths[plan[-1][0]] > max_tokens):
            plan.append([])
        plan[-1].append(position)
    return plan


def _stretch(plan: list[list[int]], number: int, lengths: Sequence[int]) -> list[list[int]]:
    """Bring a plan to this number of micro-batches: halve the dearest; add fillers when all hold one example."""
    plan = list(plan)
    while len(plan) < number:
        costs = [len(batch) * (lengths[batch[0]] + 1) if len(batch) > 1 else 0 for batch in plan]
        if not any(costs):
            plan.append([FILLER])
            continue
        index = costs.index(max(costs))
        batch = plan[index]
        half = (len(batch) + 1) // 2
        plan[index : index + 1] = [batch[:half], batch[half:]]
    return plan


# --- tensors ----------------------------------------------------------------------------------------------------------


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids [rows, longest] with padding behind, and their attention mask (int64, 1 on tokens, from the lengths)."""
    return _pad(rows, pad_id, left=False)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids [rows, longest] with padding in front, and their attention mask (int64, 1 on tokens, from the lengths)."""
    return _pad(rows, pad_id, left=True)


def _pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    time = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), time), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), time, dtype=torch.int64)
    for index, row in enumerate(rows):
        span = slice(time - len(row), time) if left else slice(0, len(row))
        ids[index, span] = torch.as_tensor(row, dtype=torch.int64)
        mask[index, span] = 1
    return ids, mask


class OnDevice:
    """Tensors that move together."""

    def to(self, device: torch.device | str) -> Any:
        """Return a copy on the device."""
        values = (getattr(self, one.name) for one in fields(self))
        return type(self)(*(None if value is None else value.to(device) for value in values))


@dataclass
class SFTBatch(OnDevice):
    """Prompts with answers. loss_mask[:, j] says that token j is a target; token 0 never is, nothing predicts it.

    labels: the input_ids, but for the end token of each earlier answer where the history is written without it.
    """

    input_ids: Tensor  # [batch, time] int64, right-padded
    attention_mask: Tensor  # [batch, time] int64
    loss_mask: Tensor  # [batch, time] bool
    labels: Tensor  # [batch, time] int64


@dataclass
class PairBatch(OnDevice):
    """Prompts with chosen and rejected answers: the chosen rows first, then the rejected ones in the same order."""

    input_ids: Tensor  # [2 x pairs, time] int64, right-padded
    attention_mask: Tensor  # [2 x pairs, time] int64
    margin: Tensor  # [pairs] float32, 0 where the data has none
    weight: Tensor  # [pairs] float32, 1 for a pair, 0 for a filler
    shared: SharedRows | None  # the same with each prompt once, where the network takes that


@dataclass
class AnswerPairBatch(PairBatch):
    """Pairs whose answers are read token by token (DPO)."""

    answer_mask: Tensor  # [2 x pairs, time] bool, the tokens of the answers, end token included; none of a filler's


@dataclass
class PromptBatch(OnDevice):
    """Prompts for generation."""

    input_ids: Tensor  # [batch, time] int64, left-padded
    attention_mask: Tensor  # [batch, time] int64
    index: Tensor  # [batch] int64, number of the example in the data set
    earlier: Tensor  # [batch] int64, how often the same example comes before it in what all processes answer


def collate_sft(
    rows: Sequence[dict[str, Any]],
    real: Sequence[bool] | None = None,
    *,
    pad_id: int,
    loss_on: str = "answer",
    end_id: int | None = None,
) -> SFTBatch:
    """Make a batch of rows of step 1. real: False for a filler, whose loss_mask is empty. loss_on: "answer" or "all".

    end_id: the token that ends an answer, for rows of several answers.
    """
    ids, attention_mask = pad_right([row["input_ids"] for row in rows], pad_id)
    loss_mask, labels = torch.zeros_like(ids, dtype=torch.bool), ids.clone()
    for index, row in enumerate(rows):
        context = context_spans(row)
        for start, _ in context:
            labels[index, start - 1] = end_id
        if real is None or real[index]:
            first = 1 if loss_on == "all" else max(row["prompt_length"], 1)
            loss_mask[index, first : len(row["input_ids"])] = True
            for start, end in () if loss_on == "all" else context:
                loss_mask[index, start:end] = False
    return SFTBatch(ids, attention_mask, loss_mask, labels)


def context_spans(row: dict[str, Any]) -> list[tuple[int, int]]:
    """Return (start, end) of each stretch between two answers of a row of step 1; none for a row of one answer."""
    edges = row.get("between") or []
    return list(zip(edges[0::2], edges[1::2], strict=True))


def target_counts(dataset: Any, loss_on: str) -> list[int]:
    """Count the targets of each row of step 1: the answers, end tokens included, or all but the very first token."""
    if loss_on == "all":
        return [length - 1 for length in dataset["length"]]
    columns = (dataset[name] for name in ("length", "prompt_length", "between"))
    return [
        length - max(prompt, 1) - sum(between[1::2]) + sum(between[0::2])
        for length, prompt, between in zip(*columns, strict=True)
    ]


def pair_widths(dataset: Any, share: bool) -> list[int]:
    """Return the tokens that each pair takes in a batch: two rows of the longer answer, or one row with the prompt once."""
    if not share:
        return list(dataset["padded_length"])
    return [length - prompt for length, prompt in zip(dataset["length"], dataset["prompt_length"], strict=True)]


def collate_pairs(
    rows: Sequence[dict[str, Any]], real: Sequence[bool] | None = None, *, pad_id: int, share: bool = False
) -> PairBatch:
    """Make a batch of rows of step 2. real: False for a filler, whose weight is 0. share: compute each prompt once."""
    chosen, rejected = ([row[name] for row in rows] for name in ("chosen_ids", "rejected_ids"))
    ids, mask = pad_right(chosen + rejected, pad_id)
    margin = torch.tensor([row["margin"] or 0.0 for row in rows], dtype=torch.float32)
    weight = torch.ones(len(rows)) if real is None else torch.tensor(real, dtype=torch.float32)
    shared = share_prompts(chosen, rejected, [row["prompt_length"] for row in rows], pad_id) if share else None
    return PairBatch(ids, mask, margin, weight, shared)


def collate_answer_pairs(
    rows: Sequence[dict[str, Any]], real: Sequence[bool] | None = None, *, pad_id: int, share: bool = False
) -> AnswerPairBatch:
    """Make a batch for DPO of rows of step 2. real: False for a filler, whose weight is 0 and whose answer_mask is empty."""
    pairs = collate_pairs(rows, real, pad_id=pad_id, share=share)
    prompts = torch.tensor([row["prompt_length"] for row in rows] * 2)
    behind_prompt = torch.arange(pairs.input_ids.shape[1]) >= prompts.clamp(min=1)[:, None]  # nothing predicts token 0
    answers = behind_prompt & pairs.attention_mask.bool() & pairs.weight.bool().repeat(2)[:, None]
    return AnswerPairBatch(pairs.input_ids, pairs.attention_mask, pairs.margin, pairs.weight, pairs.shared, answers)


def collate_prompts(rows: Sequence[dict[str, Any]], *, pad_id: int) -> PromptBatch:
    """Make a batch of rows of step 3, each with its "index" in the data set and, where repeated, how often "earlier"."""
    ids, mask = pad_left([row["prompt_ids"] for row in rows], pad_id)
    index, earlier = ([row.get(name, 0) for row in rows] for name in ("index", "earlier"))
    return PromptBatch(ids, mask, torch.tensor(index, dtype=torch.int64), torch.tensor(earlier, dtype=torch.int64))
