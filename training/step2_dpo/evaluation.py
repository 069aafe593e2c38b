"""Metrics of pairs in training and evaluation: implicit rewards, the share of pairs whose chosen answer has the higher one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from training.utils.data.batching import AnswerPairBatch
from training.utils.loss import dpo_loss, pair_accuracy
from training.utils.run.process_group import Run

NAMES = ("loss", "accuracy", "chosen", "rejected", "chosen_log_prob", "rejected_log_prob")


class PairSums:
    """Sums over the pairs that this process has seen; ``means`` gives the metrics of all processes."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing
        self.pairs = 0.0
        self.sums = dict.fromkeys(NAMES, 0.0)

    def add(self, rewards: Tensor, log_probs: Tensor, micro: AnswerPairBatch) -> None:
        """Add rewards, log_probs: [2 x pairs], chosen answers first: implicit rewards, and log p(answer | prompt) of the policy."""
        chosen, rejected = rewards.detach().chunk(2)
        dropped = micro.weight == 0
        found = [
            (~dropped).sum().float(),
            dpo_loss(chosen, rejected, micro.weight, 1.0, self.label_smoothing),
            pair_accuracy(chosen, rejected, micro.weight),
            *(values.masked_fill(dropped, 0.0).sum() for values in (chosen, rejected, *log_probs.detach().chunk(2))),
        ]
        pairs, *sums = torch.stack(found).tolist()  # one wait for the device, not seven
        self.pairs += pairs
        for name, value in zip(NAMES, sums, strict=True):
            self.sums[name] += value

    def means(self, run: Run) -> dict[str, float]:
        """Return accuracy (a tie counts one half); means over all pairs of the loss, of the implicit rewards chosen and rejected,
        of their difference, the margin, and of the log-probabilities of the answers; the number of pairs.
        """
        pairs, *sums = run.sum(self.pairs, *self.sums.values())
        means = {name: total / max(pairs, 1.0) for name, total in zip(self.sums, sums, strict=True)}
        return means | {"margin": means["chosen"] - means["rejected"], "pairs": pairs}


@torch.no_grad()
def evaluate_pairs(
    engine,
    micro_batches: Iterable[AnswerPairBatch],
    compare: Callable[[AnswerPairBatch], tuple[Tensor, Tensor]],
    label_smoothing: float,
    run: Run,
) -> dict[str, float]:
    """Return the metrics (PairSums.means) of all pairs of all processes. compare: micro-batch -> implicit rewards, log_probs."""
    engine.eval()
    sums = PairSums(label_smoothing)
    for micro in micro_batches:
        sums.add(*compare(micro), micro)
    engine.train()
    return sums.means(run)
