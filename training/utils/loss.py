"""The losses of steps 1 and 2 and of DPO as pure functions of tensors.

Every loss is a sum divided by a ``denominator`` that the caller counts over the whole global batch (all micro-batches,
all processes), so that the gradient is the same however the batch is cut. Masks select by ``where``, never by
multiplication: NaN times 0 is NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sft_loss(log_probs: Tensor, target_mask: Tensor, denominator: float | Tensor) -> Tensor:
    """Return the cross-entropy of the target tokens: - sum over targets of log p / denominator. Maximum likelihood; Ouyang et al.
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
    """Return the number of pairs in which the chosen answer has the higher score; a tie counts 1/2. Divide by the number of pairs
    for a share.

    chosen, rejected, weight: [pairs]; weight 0 drops a pair. Scalar float32: sums of processes add up, shares do not.
    """
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return right.sum() if weight is None else right.masked_fill(weight == 0, 0.0).sum()


def outcomes(scores: Tensor, others: Tensor) -> Tensor:
    """Tell who wins each comparison: 1 where scores is higher, 0 where it is lower, 1/2 for a tie; [n] twice -> float64 [n].

    Scores apart by less than 1e-4 of their size tie: the same answer scored in another batch is rounded differently.
    """
    ties = torch.isclose(scores, others, rtol=1e-4, atol=1e-6)
    return (scores > others).double().masked_fill(ties, 0.5)


def sequence_log_probs(log_probs: Tensor, answer_mask: Tensor) -> Tensor:
    """Return log p(answer | prompt) = sum over the answer's tokens of log p(token | tokens before it), in nats.

    log_probs [batch, time], answer_mask [batch, time] bool -> float32 [batch]; 0 for a row without an answer.
    """
    return log_probs.float().masked_fill(~answer_mask.bool(), 0.0).sum(dim=1)


def implicit_rewards(log_probs: Tensor, ref_log_probs: Tensor, beta: float) -> Tensor:
    """Return beta · (log pi(y|x) - log pi_ref(y|x)): the reward that the policy pi is optimal for under a KL penalty of weight
    beta, but for a term of the prompt alone, which differences of answers lose (Rafailov et al. 2023, arXiv 2305.18290,
    eq. 5).

    log_probs, ref_log_probs: [rows], of whole answers. float32 [rows].
    """
    return beta * (log_probs.float() - ref_log_probs.float())


def dpo_loss(
    chosen: Tensor, rejected: Tensor, weight: Tensor, denominator: float | Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """- sum_i w_i [(1 - e) log sigmoid(c_i - r_i) + e log sigmoid(r_i - c_i)] / denominator, over implicit rewards.

    With e = 0 Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: the likelihood of Bradley and Terry where the policy is its
    own reward model. e = label_smoothing is the share of pairs taken to be the wrong way round (Mitchell 2023, "A note on
    DPO with noisy preferences"): the difference is drawn to log((1 - e) / e), no longer to infinity.

    chosen, rejected: [pairs], implicit_rewards of the answers; weight [pairs], 0 drops a pair; denominator: pairs of the
    global batch (>= 1). Scalar.
    """
    dropped = weight == 0
    difference = chosen.float().masked_fill(dropped, 0.0) - rejected.float().masked_fill(dropped, 0.0)
    loss = -(1.0 - label_smoothing) * F.logsigmoid(difference) - label_smoothing * F.logsigmoid(-difference)
    return (loss * weight.float()).sum() / denominator
