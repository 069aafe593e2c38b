"""The losses of steps 1 and 2 as pure functions of tensors.

Every loss is a sum divided by a ``denominator`` that the caller counts over the whole global batch (all micro-batches,
all processes), so that the gradient is the same however the batch is cut. Masks select by ``where``, never by
multiplication: NaN times 0 is NaN.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sft_loss(log_probs: Tensor, target_mask: Tensor, denominator: float | Tensor) -> Tensor:
    """Cross-entropy of the target tokens: - sum over targets of log p / denominator. Maximum likelihood; Ouyang et al.
    2022, 3.5.

    log_probs [batch, time] float32, target_mask [batch, time] bool, denominator: target tokens of the global batch (>=
    1). Scalar.
    """
    return -log_probs.float().masked_fill(~target_mask.bool(), 0.0).sum() / denominator


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    weight: Tensor,
    denominator: float | Tensor,
    margin: Tensor | None = None,
    center_coef: float = 0.0,
) -> Tensor:
    """- sum_i w_i log sigmoid(c_i - r_i - m_i) / denominator, the likelihood of Bradley and Terry (1952) as in Ouyang
    et al. 2022, eq. 1.

    chosen, rejected: [pairs], the scores of the answers; weight [pairs], 0 drops a pair; denominator: pairs of the
    global batch (>= 1); margin [pairs], Touvron et al. 2023 (arXiv 2307.09288), eq. 2; center_coef adds center_coef ·
    w_i (c_i + r_i)^2, which keeps the mean of the scores near 0 (Eisenstein et al. 2023, arXiv 2312.09244). logsigmoid,
    not log(sigmoid()): finite for any difference. Scalar.
    """
    dropped = weight == 0
    chosen, rejected = (scores.float().masked_fill(dropped, 0.0) for scores in (chosen, rejected))
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin.float().masked_fill(dropped, 0.0)
    loss = -F.logsigmoid(difference)
    if center_coef:
        loss = loss + center_coef * (chosen + rejected).square()
    return (loss * weight.float()).sum() / denominator


def pair_accuracy(chosen: Tensor, rejected: Tensor, weight: Tensor | None = None) -> Tensor:
    """Number of pairs in which the chosen answer has the higher score; a tie counts 1/2. Divide by the number of pairs
    for a share.

    chosen, rejected, weight: [pairs]; weight 0 drops a pair. Scalar float32: sums of processes add up, shares do not.
    """
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return right.sum() if weight is None else right.masked_fill(weight == 0, 0.0).sum()
