"""The arithmetic of PPO as pure functions of tensors: KL, rewards, losses (advantages.py has the rest). All is float32.

Shapes: [batch, time] over the answer, column 0 its first token. ``mask`` is true on answer tokens, the end token
included, and false after them. What stands outside the mask never counts, NaN included: it is replaced by ``where``, since
NaN times 0 is NaN.

Losses are sums divided by ``denominator``, the number of valid tokens (reduction "sequence": of answers) of the whole
global minibatch: the losses of all micro-batches and processes add up to the mean, however the minibatch was cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from training.step3_ppo.experience import Experience
    from training.utils.flags.steps import PPOArguments

Reduction = Literal["token", "sequence"]

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: a ratio beyond that is no information, and exp(89) is infinite


# --- masks ------------------------------------------------------------------------------------------------------------


def answer_mask(lengths: Tensor, width: int) -> Tensor:
    """Turn lengths [batch], the end token counted, into bool [batch, width], true on the first lengths[i] columns of row i."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of x where mask is true. Scalar float32."""
    return x.float().where(mask.bool(), 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of x where mask is true; 0 if that is nowhere. Scalar float32."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def loss_denominator(mask: Tensor, reduction: Reduction = "token") -> float:
    """Return the divisor of the losses of a global minibatch with this mask [batch, time]: its valid tokens, or its answers
    that have any.
    """
    mask = mask.bool()
    return float(mask.sum() if reduction == "token" else mask.any(dim=1).sum())


def aggregate(losses: Tensor, mask: Tensor, denominator: float | Tensor, reduction: Reduction = "token") -> Tensor:
    """Return the share of these rows in the mean over the global minibatch: over its tokens, sum of losses / denominator; or
    ("sequence") over its answers, sum over rows of the mean of a row's losses / denominator, so that the tokens of a short
    answer weigh more.

    losses, mask [batch, time]; denominator: loss_denominator of the whole minibatch. A minibatch without a valid token
    (0 / 0) gives 0. Scalar float32.
    """
    mask = mask.bool()
    losses = losses.float().where(mask, 0.0)
    if reduction == "sequence":
        losses = losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return losses.sum() / torch.as_tensor(denominator, dtype=torch.float32, device=losses.device).clamp(min=1.0)


# --- KL divergence ----------------------------------------------------------------------------------------------------
# With d = log p(token) - log q(token) for a token drawn from p, all three estimate KL(p || q): Schulman, "Approximating
# KL Divergence", joschu.net/blog/kl-approx.html.


def kl_k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Return d: unbiased, of either sign. Any shape, kept."""
    return log_probs.float() - ref_log_probs.float()


def kl_k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Return d^2 / 2: biased, never negative. Any shape, kept."""
    return kl_k1(log_probs, ref_log_probs).square() / 2


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Return exp(-d) - 1 + d: unbiased, never negative. d is clamped to +-20, where exp is finite. Any shape, kept."""
    d = kl_k1(log_probs, ref_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-d) + d


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return k1 at every token, 0 outside the mask. All [batch, time]."""
    return kl_k1(log_probs, ref_log_probs).where(mask.bool(), 0.0)


def kl_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    denominator: float | Tensor,
    reduction: Reduction = "token",
) -> Tensor:
    """Return a KL penalty to add to the policy loss: the value is k1's, the gradient k2's, d * grad log p.

    In expectation over tokens drawn from p, d * grad log p is the gradient of KL(p || q) (the score function's mean is 0).
    Differentiating k1 gives grad log p, zero on average; differentiating k3 gives the gradient of KL(q || p), the other
    direction. As a penalty in the reward it is k1 whose policy gradient is right. After the first minibatch the tokens come
    from an older p, and this is as near as the ratio is to 1.
    All tensors [batch, time]; the gradient goes to log_probs only.
    """
    log_probs = log_probs.float().where(mask.bool(), 0.0)
    d = kl_estimate(log_probs, ref_log_probs, mask).detach()
    return aggregate(d + d * (log_probs - log_probs.detach()), mask, denominator, reduction)


def adapted_kl_coef(coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """Return the coefficient after a rollout (Ziegler et al. 2019, arXiv 1909.08593, section 2.2):

        coef * (1 + e * episodes / horizon)  with  e = clip(kl / target - 1, -0.2, 0.2)

    kl: mean over the rollout's answers of their summed k1, in nats; target > 0 in the same unit. The factor stays positive
    also where a rollout has more than 5 horizons of episodes.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * max(1.0 + error * episodes / horizon, 0.1)


# --- rewards ----------------------------------------------------------------------------------------------------------


def normalize_scores(scores: Tensor, mean: float, std: float, clip: float) -> tuple[Tensor, Tensor]:
    """(scores - mean) / std, clipped to +-clip. mean and std (> 0): the reward model's over its training data.

    scores [batch] -> scores [batch], and the share of them that the clip changed (scalar). clip 0 or less: no clipping.
    """
    normalized = (scores.float() - mean) / std
    if clip <= 0:
        return normalized, torch.zeros((), device=scores.device)
    return normalized.clamp(-clip, clip), (normalized.abs() > clip).float().mean()


def missing_end_penalty(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Take ``penalty`` off the score of every answer that did not end in a stop token, whatever its length.

    scores [batch], ended [batch] bool -> [batch].
    """
    return scores.float().where(ended.bool(), scores.float() - penalty)


def overlong_penalty(scores: Tensor, lengths: Tensor, limit: int, tokens: int, penalty: float) -> Tensor:
    """Take up to ``penalty`` off the score of a long answer (DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 13):

        penalty * clip((length - (limit - tokens)) / tokens, 0, 1)

    nothing up to ``tokens`` before the limit, then in a straight line to all of it at the limit. scores, lengths [batch]
    (the end token counted) -> [batch]. tokens 0 or less: no penalty.
    """
    if tokens <= 0:
        return scores.float()
    return scores.float() - penalty * ((lengths - (limit - tokens)) / tokens).clamp(0.0, 1.0)


@torch.no_grad()
def shaped_rewards(scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return r_t = -kl_coef * k1_t on every valid token, plus the score on the last one (Ziegler et al. 2019, arXiv 1909.08593,
    eq. 2), so that sum_t r_t = score - kl_coef * sum_t k1_t.

    scores [batch]; log_probs of the policy that sampled, ref_log_probs and mask [batch, time] -> [batch, time], 0 outside
    the mask. A row without a valid token gets nothing.
    """
    mask = mask.bool()
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = columns.where(mask, -1).amax(dim=1, keepdim=True)
    kl = kl_estimate(log_probs, ref_log_probs, mask)
    return scores.float()[:, None].where(columns == last, 0.0) - kl_coef * kl


# --- losses -----------------------------------------------------------------------------------------------------------


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: float | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    reduction: Reduction = "token",
) -> tuple[Tensor, dict[str, float]]:
    """Compute the clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), with rho = exp(log_probs - old_log_probs):

        sum over valid tokens of max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) / denominator

    or, with another reduction, their aggregate().
    dual_clip c > 1 also bounds the loss of a token with A < 0 by -c A (Ye et al. 2020, arXiv 1912.09729, eq. 5).
    All tensors [batch, time]; the gradient goes to log_probs only. Returns the loss (scalar) and, over this call's valid
    tokens, the sums "ratio", "clip_share" (tokens whose gradient the clip removed), "approx_kl" (k2 of the step from old to
    new) and "approx_kl_k3", and the maximum "ratio_deviation" of |rho - 1|. Divide sums by the number of tokens for means.
    """
    mask = mask.bool()
    log_ratio = log_probs.float().where(mask, 0.0) - old_log_probs.detach().float().where(mask, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = advantages.detach().float().where(mask, 0.0)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = torch.max(plain, bounded)
    clipped = bounded > plain
    if dual_clip is not None:
        most = -dual_clip * advantages
        beyond = (advantages < 0) & (losses > most)
        losses, clipped = losses.where(~beyond, most), clipped | beyond
    with torch.no_grad():
        metrics = torch.stack([
            ratio.where(mask, 0.0).sum(),
            clipped.sum().float(),
            kl_k2(log_ratio, torch.zeros_like(log_ratio)).sum(),
            kl_k3(-log_ratio, torch.zeros_like(log_ratio)).sum(),  # the tokens were drawn from the old policy: d = old - new
            torch.cat([(ratio - 1.0).abs().flatten(), ratio.new_zeros(1)]).max(),  # of no tokens at all: 0
        ]).tolist()  # fmt: skip
    names = ("ratio", "clip_share", "approx_kl", "approx_kl_k3", "ratio_deviation")
    return aggregate(losses, mask, denominator, reduction), dict(zip(names, metrics, strict=True))


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    denominator: float | Tensor,
    clip: float = 0.2,
    reduction: Reduction = "token",
) -> Tensor:
    """Compute the clipped regression of the critic (as in OpenAI's baselines and Ziegler et al. 2019):

        sum over valid tokens of 1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / denominator

    or, with another reduction, their aggregate(). All tensors [batch, time]; the gradient goes to values only. clip 0 or
    less: no clipping. Scalar.
    """
    mask = mask.bool()
    values = values.float().where(mask, 0.0)
    old_values, returns = (x.detach().float().where(mask, 0.0) for x in (old_values, returns))
    losses = (values - returns).square()
    if clip > 0:
        near = old_values + (values - old_values).clamp(-clip, clip)
        losses = torch.max(losses, (near - returns).square())
    return aggregate(0.5 * losses, mask, denominator, reduction)


def actor_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Experience,
    denominator: float | Tensor,
    kl_coef: float,
    args: PPOArguments,
) -> tuple[Tensor, dict[str, float]]:
    """Return what the actor minimises: the policy loss, the KL penalty and the entropy bonus where the flags ask for them.

    A further term is added here, its flag in training/utils/flags/ppo.py; whatever it puts into the metrics is logged.
    log_probs, entropy [batch, time]: of the actor now, on the answers of rows; entropy None without a bonus. Returns the loss
    (scalar) and sums over the valid tokens; the trainer divides them by the number of tokens, "ratio_deviation" excepted.
    """
    mask, reduction = rows.action_mask, args.loss_reduction
    loss, metrics = policy_loss(
        log_probs,
        rows.old_log_probs,
        rows.advantages,
        mask,
        denominator,
        clip_low=args.cliprange_low,
        clip_high=args.cliprange_high,
        dual_clip=args.dual_clip or None,
        reduction=reduction,
    )
    if args.kl_in == "loss":
        loss = loss + kl_coef * kl_loss(log_probs, rows.ref_log_probs, mask, denominator, reduction)
        metrics["kl_per_token"] = float(kl_estimate(log_probs.detach(), rows.ref_log_probs, mask).sum())
    if entropy is not None:
        loss = loss - args.entropy_coef * aggregate(entropy, mask, denominator, reduction)
        metrics["entropy"] = float(masked_sum(entropy.detach(), mask))
    return loss, metrics
