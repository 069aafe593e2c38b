"""Batched sampling with a key-value cache, for chat and for PPO's rollouts. Not transformers' generate(): here the
log-probabilities of what was drawn are kept, no setting of the checkpoint (generation_config) interferes, and an answer
depends on its prompt and its seed alone, not on the rest of the batch or on the number of processes. (Matrix products of
other shapes round differently: once in a great while a draw at the edge between two tokens falls on the other side.)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.heads import base_model, mask_with_prefix, position_ids_for, prefix_cache, prefix_length

# Finished rows leave the batch once they are this share of it. Leaving costs a copy of the cache, staying a row of every
# matrix product. 4 layers x 256, batch 64, answers of 10 tokens on average and 32 at most, one CPU core: never 0.64 s,
# at 1/2 0.39 s, at 1/4 0.35 s, at 1/8 0.37 s, at once 0.39 s.
DROP_SHARE = 0.25


@dataclass
class Generation:
    """Answers to a batch of prompts.

    sequences: [batch, time] int64, the answers alone, padded on the right to the longest of them. lengths: [batch] int64,
    the stop token included. ended: [batch] bool, false where max_new_tokens cut the answer off. log_probs: [batch, time]
    float32, of each token under the whole softmax at the sampling temperature, 0 after the end. filtered: top-p or top-k
    left tokens out somewhere, so that the answers were not drawn from the distribution that log_probs belong to.
    """

    sequences: Tensor
    lengths: Tensor
    ended: Tensor
    log_probs: Tensor
    filtered: bool = False


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy: bool = False,
    row_seeds: Sequence[int] | None = None,
) -> Generation:
    """Sample (or, greedy, take the likeliest tokens) until every row has met a stop token or has max_new_tokens.

    model: a causal language model of transformers, or a PeftModel around one (LoRA, or a prefix, which is put into the
    cache once); it is in evaluation mode meanwhile.
    input_ids, attention_mask: [batch, prompt], padded on the left. Row i is sampled with random numbers from row_seeds[i]
    (default: seeds from torch's global generator). Raises ValueError for a call that cannot be meant.
    """
    _check(attention_mask, max_new_tokens, temperature, row_seeds)
    batch, device = len(input_ids), input_ids.device
    uniform = None if greedy else uniform_numbers(row_seeds, batch, max_new_tokens).to(device)
    stops = torch.tensor(list(stop_token_ids), dtype=torch.long, device=device)
    # Made outside inference mode: training may save these tensors for its backward pass.
    sequences = torch.full((batch, max_new_tokens), pad_token_id, dtype=torch.long, device=device)
    log_probs = torch.zeros(batch, max_new_tokens, device=device)
    lengths = torch.zeros(batch, dtype=torch.long, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    filtered = False

    with torch.inference_mode(), evaluation_mode(model):
        network = base_model(model)
        takes = inspect.signature(network.forward).parameters
        positions = position_ids_for(model, input_ids, attention_mask, room=max_new_tokens)
        mask = torch.cat([attention_mask.long(), attention_mask.new_ones(batch, max_new_tokens, dtype=torch.long)], 1)
        mask, prefix = mask_with_prefix(model, mask), prefix_length(model)
        rows = torch.arange(batch, device=device)  # which row of the call each row of the shrinking batch is
        done = torch.zeros_like(ended)
        fed, cache, past = input_ids, prefix_cache(model, batch), 0
        for step in range(max_new_tokens):
            seen = past + fed.shape[1]
            extra = {} if positions is None else {"position_ids": positions[..., past:seen]}
            if "logits_to_keep" in takes:
                extra["logits_to_keep"] = 1
            extra |= {"past_key_values": cache, "use_cache": True, "return_dict": True}
            output = network(input_ids=fed, attention_mask=mask[:, : prefix + seen], **extra)
            cache, past = output.past_key_values, seen
            scaled = output.logits[:, -1].float() / temperature
            scores = scaled.log_softmax(dim=-1)
            if greedy:
                tokens = scaled.argmax(dim=-1)
            else:
                tokens, cut = draw(scores, uniform[rows, step], top_p, top_k)
                filtered = filtered | cut
            tokens = tokens.masked_fill(done, pad_token_id)
            sequences[rows, step] = tokens
            log_probs[rows, step] = scores.gather(1, tokens[:, None]).squeeze(1).masked_fill(done, 0.0)

            lengths[rows] += ~done
            done = done | (tokens[:, None] == stops).any(dim=1)
            ended[rows] = done
            finished = int(done.sum())
            if finished == len(done):
                break
            if finished >= DROP_SHARE * len(done):
                going = (~done).nonzero().squeeze(1)
                cache.batch_select_indices(going)
                rows, tokens, mask, done = (x[going] for x in (rows, tokens, mask, done))
                positions = None if positions is None else positions[going]
            fed = tokens[:, None]

    longest = int(lengths.max())
    return Generation(sequences[:, :longest], lengths, ended, log_probs[:, :longest], bool(filtered))


def uniform_numbers(row_seeds: Sequence[int] | None, batch: int, count: int) -> Tensor:
    """[batch, count] float32 in [0, 1): row i is the beginning of the sequence that belongs to row_seeds[i], on the CPU, so
    that it is the same on every device. Without seeds, they come from torch's global generator.
    """
    if row_seeds is None:
        row_seeds = torch.randint(2**62, (batch,)).tolist()
    numbers = torch.empty(batch, count)
    for row, seed in enumerate(row_seeds):
        numbers[row].uniform_(generator=torch.Generator().manual_seed(seed))
    return numbers


def draw(log_probs: Tensor, uniform: Tensor, top_p: float = 1.0, top_k: int = 0) -> tuple[Tensor, Tensor | bool]:
    """One token a row by inverting the cumulative distribution at the row's uniform number.

    log_probs [batch, vocab] (normalised), uniform [batch] in [0, 1). top_k > 0 keeps the k likeliest tokens; top_p < 1 the
    fewest likeliest that hold this share of the probability (Holtzman et al. 2020, arXiv 1904.09751, section 3.1), of the
    top_k if both. Returns tokens [batch], and whether any token with a probability was left out (False or a bool scalar).
    """
    probs = log_probs.exp()
    vocab = probs.shape[1]
    if top_p >= 1.0 and not 0 < top_k < vocab:
        return invert(probs, uniform), False
    probs, tokens = probs.topk(top_k, dim=1) if 0 < top_k < vocab else probs.sort(dim=1, descending=True, stable=True)
    cut = (probs.sum(dim=1) < 1.0 - 1e-6).any()
    if top_p < 1.0:
        before = probs.cumsum(dim=1) - probs
        outside = before >= top_p * probs.sum(dim=1, keepdim=True)
        outside[:, 0] = False
        cut = cut | (outside & (probs > 0)).any()
        probs = probs.masked_fill(outside, 0.0)
    return tokens.gather(1, invert(probs, uniform)[:, None]).squeeze(1), cut


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first place whose cumulative weight exceeds uniform · total: place i with probability weights[i] / total.

    weights [batch, n] >= 0, uniform [batch] float32 in [0, 1 - 2^-24] -> [batch]. uniform · total rounds to less than total,
    so the place exists and has weight.
    """
    cumulative = weights.cumsum(dim=1)
    goal = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goal, right=True).squeeze(1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off (and with it gradient checkpointing, which would forbid the cache); every module's mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(attention_mask: Tensor, max_new_tokens: int, temperature: float, row_seeds: Sequence[int] | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at least one token must be asked for")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0 (greedy=True takes the likeliest token)")
    if row_seeds is not None and len(row_seeds) != len(attention_mask):
        raise ValueError(f"{len(row_seeds)} row_seeds for {len(attention_mask)} prompts")
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("attention_mask: a prompt is empty or padded on the right; pad prompts on the left")
