"""Batched sampling with a key-value cache, for chat and for PPO's rollouts. Not transformers' generate(): here the
log-probabilities of what was drawn are kept, no setting of the checkpoint (generation_config) interferes, and an answer
depends on its prompt and its seed alone, not on the rest of the batch or on the number of processes. (Matrix products of
other shapes round differently: once in a great while a draw at the edge between two tokens falls on the other side.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from inference.cache import RowsCache, rows_cache
from inference.decoder import Reading, by_columns, next_logits, runs
from inference.few_rows import packed_weights
from inference.lockstep import in_step
from inference.sampling import StopStrings, draw, occurring, penalised, uniform_numbers
from models.heads import base_model, forward_arguments, mask_with_prefix, position_ids_for, prefix_cache, prefix_length

# Drop finished rows once they make up this share of the batch: dropping copies the cache once, keeping wastes a row in
# every matrix product. 4 layers x 256, batch 64, answers of 10 tokens on average and 32 at most, one CPU core: never 0.64 s,
# at 1/2 0.39 s, at 1/4 0.35 s, at 1/8 0.37 s, at once 0.39 s.
DROP_SHARE = 0.25
# While prompts wait, replace finished rows by them once they make up this share of the batch. A small share reads few
# prompts at a time, but finished rows idle less. 4 layers x 256, 256 prompts, 32 at once, answers of 24 tokens on average and
# 64 at most, one CPU core: batches of like length one after another 7.5 s; at 1/2 7.1 s, at 1/4 6.6 s, at 1/8 6.3 s, at 1/16 6.9 s.
REPLACE_SHARE = 0.125


@dataclass
class Generation:
    """Answers to a batch of prompts.

    sequences: [batch, time] int64, the answers alone, padded on the right to the longest of them. lengths: [batch] int64,
    the stop token included. ended: [batch] bool, false where max_new_tokens cut the answer off. log_probs: [batch, time]
    float32, of each token under the whole softmax at the sampling temperature, 0 after the end. filtered: top-p or top-k
    left tokens out somewhere, or a repetition penalty moved probabilities, so that the answers were not drawn from the
    distribution that log_probs belong to.
    """

    sequences: Tensor
    lengths: Tensor
    ended: Tensor
    log_probs: Tensor
    filtered: bool = False


def check_finite(log_probs: Tensor, remedy: str) -> None:
    """Raise UserError, with what to do about it, unless the log-probabilities of drawn tokens are all finite: others come
    from weights or activations that are not.
    """
    if not bool(log_probs.isfinite().all()):
        raise UserError(f"the model's logits are not finite numbers, so nothing can be drawn from them; {remedy}")


@dataclass(frozen=True)
class Rules:
    """Settings of generate() that are the same for all rows: the sampling and the end of an answer.

    greedy takes the likeliest tokens. repetition_penalty: above 1 makes tokens of the prompt and of the answer so far less
    likely (sampling.penalised). stop_strings: the token that completes one of them in the answer's text ends it, too; they
    need the tokenizer. on_token(row, token) is called with each token once it is drawn.
    """

    max_new_tokens: int
    stop_token_ids: Sequence[int]
    pad_token_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    repetition_penalty: float = 1.0
    stop_strings: Sequence[str] = ()
    tokenizer: Any = None
    on_token: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; at least one token must be asked for")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 (greedy=True takes the likeliest token)")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 changes nothing)")
        if self.stop_strings and (self.tokenizer is None or not all(self.stop_strings)):
            raise ValueError("stop_strings: they must not be empty, and the tokenizer is needed to find them")


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    num_return_sequences: int = 1,
    **settings: Any,
) -> Generation:
    """Do what generate_many() does, for one batch: input_ids, attention_mask [batch, prompt], padded on the left."""
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("attention_mask: a prompt is empty or padded on the right; pad prompts on the left")
    prompts = [ids[mask.bool()] for ids, mask in zip(input_ids.cpu(), attention_mask.cpu(), strict=True)]
    settings |= {"max_batch": max(1, len(prompts) * num_return_sequences), "num_return_sequences": num_return_sequences}
    return generate_many(model, prompts, **settings)


def generate_many(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    max_batch: int,
    num_return_sequences: int = 1,
    row_seeds: Sequence[int] | None = None,
    **settings: Any,
) -> Generation:
    """Sample until every answer has met a stop token or has max_new_tokens; at most max_batch answers are in work at a time.

    model: a causal language model of transformers, or a PeftModel around one (LoRA, or a prefix, which is put into the
    cache once); it is in evaluation mode meanwhile. prompts: token ids, not padded. settings: Rules.
    With num_return_sequences = n each prompt is read once and gets n answers: row i * n + j of the result, of row_seeds and of
    on_token is answer j to prompt i. Row k is sampled with random numbers from row_seeds[k] (default: seeds from torch's
    global generator). Raises ValueError for a call that cannot be meant.

    Prompts of like length are together, the longest first. Finished rows give their places to prompts that wait. Where the
    network keeps more or less than keys and values of every place (sliding windows), a batch ends before the next begins.
    Where ZeRO-3 keeps the model's weights split, all processes call it, each with prompts of its own (inference/lockstep.py).
    """
    if max_batch < 1:
        raise ValueError(f"max_batch is {max_batch}; at least one row must fit")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("there is no prompt, or one of them is empty; a model answers to a token at least")
    rules, each = Rules(**settings), num_return_sequences
    answers = _Answers(rules, len(prompts) * each, row_seeds, next(model.parameters()).device)
    order = sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt]))
    queue = [prompt * each + answer for prompt in order for answer in range(each)]

    def begin(count: int) -> Batch:
        rows = queue[:count]
        del queue[:count]
        return Batch(model, rules, prompts, [row // each for row in rows], rows)

    batch: Batch | None = None
    with evaluation_mode(model), packed_weights(base_model(model)), in_step(model):
        while batch is not None or queue:
            if batch is None:
                batch = begin(max_batch)
                read(batch)
            batch.draw(answers)
            finished = int(batch.done.sum())
            replaces = queue and batch.replaces
            if finished == len(batch.done):
                batch = None
                continue
            if not replaces and finished >= DROP_SHARE * len(batch.done):
                batch.drop()
            batch.go_on(answers.lengths[batch.rows])
            if replaces and finished >= REPLACE_SHARE * len(batch.done):
                places = batch.done.nonzero().squeeze(1)[: len(queue)]
                other = begin(len(places))
                read(batch, other)
                batch.replace(places, other)
            else:
                read(batch)
    return answers.generation()


def read(*batches: Batch) -> None:
    """Run the network on what each of these batches of one model has to read next, in one pass where decoder.py computes it."""
    for batch in batches:
        batch.mask = torch.cat([batch.mask, batch.unread.seen], dim=1)
    if batches[0].direct:
        readings = [one.unread._replace(seen=mask_with_prefix(one.model, one.mask)) for one in batches]
        for batch, logits in zip(batches, next_logits(batches[0].network, readings), strict=True):
            batch.logits = logits
    else:
        for batch in batches:
            batch.forward()
    for batch in batches:
        batch.unread = None
        if batch.asked is not None:
            batch.spread()


class _Answers:
    """State of all rows of the call. Made outside inference mode: training may save these tensors for its backward."""

    def __init__(self, rules: Rules, count: int, row_seeds: Sequence[int] | None, device: torch.device) -> None:
        if count < 1:
            raise ValueError("nothing is asked for: no prompt, or num_return_sequences below 1")
        if row_seeds is not None and len(row_seeds) != count:
            raise ValueError(f"{len(row_seeds)} row_seeds for {count} answers")
        self.rules, longest = rules, rules.max_new_tokens
        self.uniform = None if rules.greedy else uniform_numbers(row_seeds, count, longest).to(device)
        self.stop_ids = torch.tensor(list(rules.stop_token_ids), dtype=torch.long, device=device)
        self.stop_strings = StopStrings(rules.stop_strings, rules.tokenizer) if rules.stop_strings else None
        self.sequences = torch.full((count, longest), rules.pad_token_id, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(count, longest, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.filtered: bool | Tensor = rules.repetition_penalty != 1.0

    def add(self, rows: Tensor, tokens: Tensor, log_probs: Tensor, live: Tensor) -> Tensor:
        """Append a token to those of these rows that are live ([batch] bool); returns which rows are complete now."""
        places = self.lengths[rows].clamp(max=self.rules.max_new_tokens - 1)
        self.sequences[rows, places] = tokens.where(live, self.sequences[rows, places])
        self.log_probs[rows, places] = log_probs.where(live, self.log_probs[rows, places])
        self.lengths[rows] += live
        stopped = live & (tokens[:, None] == self.stop_ids).any(dim=1)
        if self.stop_strings is not None or self.rules.on_token is not None:
            for position in live.nonzero().squeeze(1).tolist():
                row = int(rows[position])
                if self.rules.on_token is not None:
                    self.rules.on_token(row, int(tokens[position]))
                if self.stop_strings is not None:
                    stopped[position] |= self.stop_strings.met(self.sequences[row, : self.lengths[row]].tolist())
        self.ended[rows] |= stopped
        return self.ended[rows] | (self.lengths[rows] == self.rules.max_new_tokens)

    def generation(self) -> Generation:
        """Return all answers, no wider than the longest."""
        longest = int(self.lengths.max())
        return Generation(
            self.sequences[:, :longest], self.lengths, self.ended, self.log_probs[:, :longest], bool(self.filtered)
        )


class Batch:
    """Rows in work: a rectangle of cache in which all of them end in the same column.

    rows [batch]: which row of the call each is. mask [batch, width]: the columns of the cache that are the row's own, a
    prefix aside. ahead: the positions of the prompt's last token and of those to come, [batch, 1 + max_new_tokens] or
    [batch, 2, 1 + max_new_tokens] or None. logits [batch, vocab] of the next token, None until read(). unread: what read() takes
    next. done [batch] bool. seen [batch, vocab] bool, for the repetition penalty.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        prompts: Sequence[Sequence[int] | Tensor],
        asked: list[int],
        rows: list[int],
        known: Sequence[Tensor | None] = (),
    ) -> None:
        """Lay out prompts, each once, for read(). asked: the number of the prompt that each row answers; equal ones stand together.
        known: the states of each prompt's beginning (RowsCache.states), which need not be read, or None; where the batch shares().
        """
        self.model, self.rules, self.network = model, rules, base_model(model)
        self.takes = forward_arguments(type(self.network))
        device, places = next(model.parameters()).device, {prompt: place for place, prompt in enumerate(dict.fromkeys(asked))}
        width = max(len(prompts[prompt]) for prompt in places)
        ids = torch.full((len(places), width), rules.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for prompt, place in places.items():
            ids[place, width - len(prompts[prompt]) :] = torch.as_tensor(prompts[prompt])
            mask[place, width - len(prompts[prompt]) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = position_ids_for(model, ids, mask, room=rules.max_new_tokens)
        direct = runs(self.network)
        columns = direct and by_columns(self.network)
        self.cache = rows_cache(self.network, prefix_cache(model, len(ids)), prefix_length(model), columns)
        self.direct = direct and self.replaces
        begin = self._remember([known[prompt] if known else None for prompt in places], mask)
        now = None if positions is None else positions[..., begin:width]
        self.unread: Reading | None = Reading(ids[:, begin:], now, mask[:, begin:], self.cache)
        self.ahead = None if positions is None else positions[..., width - 1 :]
        self.rows = torch.tensor(rows, device=device)
        self.asked = torch.tensor([places[prompt] for prompt in asked], device=device)
        self.prompts = (ids, mask) if rules.repetition_penalty != 1.0 else None
        self.logits = self.seen = None
        self.done = torch.zeros(len(ids), dtype=torch.bool, device=device)

    def spread(self) -> None:
        """Give each answer a row of its own, once the prompts are read."""
        rows, asked, self.rows, self.asked = self.rows, self.asked, None, None
        if self.prompts is not None:
            self.seen = occurring(*self.prompts, self.logits.shape[1])
        if len(asked) > len(self.done):
            self._select(asked)
        self.rows = rows

    @property
    def one_unread(self) -> bool:
        """Return True if all of each prompt is known but its last token, and each is answered once."""
        return self.unread.ids.shape[1] == 1 and bool(self.cache.layers) and len(self.asked) == len(self.done)

    @property
    def replaces(self) -> bool:
        """True where rows can give their places to others."""
        return isinstance(self.cache, RowsCache)

    @property
    def shares(self) -> bool:
        """True where the states of a token depend on it and on those before it alone, so that other prompts may begin with them."""
        return self.replaces and not self.cache.front and (self.ahead is None or self.ahead.dim() == 2)

    def draw(self, answers: _Answers) -> None:
        """Draw the next token of each row."""
        scaled = self.logits.float() / self.rules.temperature
        scores = scaled.log_softmax(dim=-1)
        if self.seen is not None:
            scaled = penalised(scaled, self.seen, self.rules.repetition_penalty)
        if self.rules.greedy:
            self.tokens = scaled.argmax(dim=-1)
        else:
            drawn_from = scores if self.seen is None else scaled.log_softmax(dim=-1)
            uniform = answers.uniform[self.rows, answers.lengths[self.rows].clamp(max=self.rules.max_new_tokens - 1)]
            self.tokens, cut = draw(drawn_from, uniform, self.rules.top_p, self.rules.top_k)
            answers.filtered = answers.filtered | cut
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)
        chosen = scores.gather(1, self.tokens[:, None]).squeeze(1)
        self.done = answers.add(self.rows, self.tokens, chosen, ~self.done)

    def go_on(self, lengths: Tensor) -> None:
        """Let read() take the tokens drawn last. lengths [batch]: how many tokens each answer has with them."""
        positions = None
        if self.ahead is not None:
            positions = self.ahead.take_along_dim(lengths.view(-1, *[1] * (self.ahead.dim() - 1)), dim=-1)
        self.unread = Reading(self.tokens[:, None], positions, torch.ones_like(self.tokens)[:, None], self.cache)

    def drop(self) -> None:
        """Drop finished rows, and columns that belong to none of the others."""
        self._select((~self.done).nonzero().squeeze(1))

    def replace(self, places: Tensor | slice, other: Batch) -> None:
        """Give the places of finished rows to those of another batch whose prompts are not wider; both were just read, or both have
        one token to read. Drop columns that belong to none of the rows in work: attention pays for each.
        """
        self.cache.replace(places, other.cache)
        self.mask[places] = nn.functional.pad(other.mask, (self.mask.shape[1] - other.mask.shape[1], 0))
        for name in ("rows", "done", "logits", "ahead", "seen"):
            if getattr(other, name) is not None:
                getattr(self, name)[places] = getattr(other, name)
        for mine, new in zip(self.unread or (), other.unread or (), strict=True):
            if isinstance(new, Tensor):
                mine[places] = new
        if not self.cache.front:
            empty = int(self.mask[~self.done].any(dim=0).int().argmax())
            self.cache.trim(empty)
            self.mask = self.mask[:, empty:]

    def join(self, other: Batch) -> None:
        """Put the rows of another batch, just read by the same rules, below these, whichever is wider."""
        self.cache.join(other.cache)
        width = max(self.mask.shape[1], other.mask.shape[1])
        masks = [nn.functional.pad(one.mask, (width - one.mask.shape[1], 0)) for one in (self, other)]
        self.mask, self.tokens = torch.cat(masks), None
        for name in ("rows", "done", "logits", "ahead", "seen"):
            if getattr(self, name) is not None:
                setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def _remember(self, known: list[Tensor | None], mask: Tensor) -> int:
        """Fill the cache with what is known of all prompts, mask [batch, width]; returns the first column that is to be read."""
        lengths, width = mask.sum(dim=1).tolist(), mask.shape[1]
        unread = max(length - (0 if one is None else one.shape[2]) for length, one in zip(lengths, known, strict=True))
        self.mask, self.tokens = mask[:, : width - unread], None
        if unread < width:
            kept = [None if length <= unread else one[:, :, : length - unread] for length, one in zip(lengths, known, strict=True)]
            self.cache.fill(kept, width - unread, unread)
        return width - unread

    def forward(self) -> None:
        """Let the network's own modules read what is unread."""
        extra = {} if self.unread.positions is None else {"position_ids": self.unread.positions}
        if "logits_to_keep" in self.takes:
            extra["logits_to_keep"] = 1
        seen = mask_with_prefix(self.model, self.mask)
        extra |= {"past_key_values": self.cache, "use_cache": True, "return_dict": True}
        output = self.network(input_ids=self.unread.ids, attention_mask=seen, **extra)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]

    def _select(self, places: Tensor) -> None:
        """Keep these rows, which may repeat."""
        for name in ("rows", "done", "logits", "ahead", "seen", "mask", "tokens"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[places])
        if self.replaces:
            empty = int(self.mask.any(dim=0).int().argmax())
            self.cache.rebuild(places, empty)
            self.mask = self.mask[:, empty:]
        else:
            self.cache.batch_select_indices(places)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off (and with it gradient checkpointing, which would forbid the cache); every module's mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
