"""Metrics of pairs in training and evaluation: implicit rewards, the share of pairs whose chosen answer has the higher one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from training.utils.data.batching import AnswerPairBatch
from training.utils.loss import dpo_loss, pair_accuracy
from training.utils.run.metrics import rounded
from training.utils.run.process_group import Run

NAMES = ("pairs", "loss", "accuracy", "chosen", "rejected", "chosen_log_prob", "rejected_log_prob")


@torch.no_grad()
def pair_sums(rewards: Tensor, log_probs: Tensor, micro: AnswerPairBatch, label_smoothing: float) -> list[float]:
    """Return the sums of NAMES over the pairs of a micro-batch.

    rewards, log_probs: [2 x pairs], chosen answers first: implicit rewards, and log p(answer | prompt) of the policy.
    """
    chosen, rejected = rewards.chunk(2)
    dropped = micro.weight == 0
    loss, accuracy = dpo_loss(chosen, rejected, micro.weight, 1.0, label_smoothing), pair_accuracy(chosen, rejected, micro.weight)
    values = [one.masked_fill(dropped, 0.0).sum() for one in (chosen, rejected, *log_probs.chunk(2))]
    return torch.stack([(~dropped).sum().float(), loss, accuracy, *values]).tolist()  # one wait for the device, not seven


def pair_metrics(sums: Sequence[list[float]], run: Run) -> dict[str, float]:
    """Return accuracy (a tie counts one half), and means of the loss, of the implicit rewards chosen and rejected, of their
    difference, the margin, and of the log-probabilities, from pair_sums of all processes; the number of pairs.
    """
    pairs, *totals = run.sum(*map(sum, zip(*sums, strict=True)))
    means = {name: total / max(pairs, 1.0) for name, total in zip(NAMES[1:], totals, strict=True)}
    return means | {"margin": means["chosen"] - means["rejected"], "pairs": pairs}


@torch.no_grad()
def evaluate_pairs(
    engine,
    micro_batches: Iterable[AnswerPairBatch],
    compare: Callable[[AnswerPairBatch], tuple[Tensor, Tensor]],
    label_smoothing: float,
    run: Run,
) -> dict[str, float]:
    """Return the metrics of all pairs of all processes. compare: micro-batch -> implicit rewards, log_probs."""
    engine.eval()
    sums = [pair_sums(*compare(micro), micro, label_smoothing) for micro in micro_batches]
    engine.train()
    return pair_metrics(sums, run)


def evaluation_line(step: int, metrics: dict[str, float], measured_on: str) -> str:
    """Write an evaluation as a line, with the kind of its pairs: accuracy on training pairs says nothing about others."""
    rewards = f"{rounded(metrics['chosen'], 3)} (chosen) and {rounded(metrics['rejected'], 3)} (rejected)"
    pairs = f"{measured_on} accuracy {metrics['accuracy']:.4f} over {metrics['pairs']:.0f} pairs"
    return f"step {step}: {pairs}, implicit rewards {rewards}"
