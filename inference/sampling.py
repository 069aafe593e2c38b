"""Draw tokens from logits: random numbers that belong to a row, top-p, top-k, repetition penalty, stop strings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def uniform_numbers(row_seeds: Sequence[int] | None, batch: int, count: int) -> Tensor:
    """Return [batch, count] float32 in [0, 1): row i is the beginning of the sequence that belongs to row_seeds[i], on the CPU, so
    that it is the same on every device. Without seeds, they come from torch's global generator.
    """
    if row_seeds is None:
        row_seeds = torch.randint(2**62, (batch,)).tolist()
    numbers = torch.empty(batch, count)
    for row, seed in enumerate(row_seeds):
        numbers[row].uniform_(generator=torch.Generator().manual_seed(seed))
    return numbers


def draw(log_probs: Tensor, uniform: Tensor, top_p: float = 1.0, top_k: int = 0) -> tuple[Tensor, Tensor | bool]:
    """Draw one token a row by inverting the cumulative distribution at the row's uniform number.

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
    """Return the first place whose cumulative weight exceeds uniform · total: place i with probability weights[i] / total.

    weights [batch, n] >= 0, uniform [batch] float32 in [0, 1 - 2^-24] -> [batch]. uniform · total rounds to less than total,
    so the place exists and has weight; of weights that are NaN it is the last place (engine.check_finite says so afterwards).
    """
    cumulative = weights.cumsum(dim=1)
    goal = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goal, right=True).squeeze(1).clamp(max=weights.shape[1] - 1)


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits [batch, vocab] in which a penalty above 1 makes tokens that occurred before less likely.

    Keskar et al. 2019 (arXiv 1909.05858, section 4.1) divide the logits of tokens that occurred by the penalty, which makes
    a negative one likelier; those are multiplied, as in transformers. seen [batch, vocab] bool.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def occurring(input_ids: Tensor, attention_mask: Tensor, vocab: int) -> Tensor:
    """Tell which tokens stand in a row: [batch, time] twice -> [batch, vocab] bool, padding aside."""
    counts = torch.zeros(len(input_ids), vocab, dtype=torch.long, device=input_ids.device)
    return counts.scatter_add_(1, input_ids, attention_mask.long()) > 0


class StopStrings:
    """Tells whether an answer has come to contain one of some strings, wherever tokens begin and end.

    Special tokens count as their text, so that the mark of a turn can be given as a string.
    """

    MARGIN = 8  # tokens that a decoder may show otherwise at the beginning of a text: half characters, a space

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings, self.tokenizer = tuple(strings), tokenizer
        # A token holds at least a byte: a string that the last token completed lies within so many of the last tokens.
        self.window = max(len(string.encode()) for string in self.strings) + self.MARGIN

    def met(self, tokens: Sequence[int]) -> bool:
        """Tell whether the last of these tokens completed one of the strings; ask after each token."""
        text = self.tokenizer.decode(
            list(tokens[-self.window :]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(string in text for string in self.strings)
