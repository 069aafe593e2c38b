"""The arithmetic of PPO as pure functions of tensors: rewards, advantages, losses. Everything is float32.

Shapes: [batch, time] over the response, column 0 its first token. ``mask`` is true on response tokens, the end token
included, and false after them. What stands outside the mask never counts, NaN included: it is replaced by ``where``, since
NaN times 0 is NaN.

Losses are sums divided by ``denominator``, the number of valid tokens of the whole global minibatch: the losses of all
micro-batches and processes add up to the mean over tokens, however the minibatch was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: a ratio beyond that is no information, and exp(89) is infinite


# --- masks ------------------------------------------------------------------------------------------------------------


def response_mask(lengths: Tensor, width: int) -> Tensor:
    """lengths [batch], the end token counted -> bool [batch, width], true on the first lengths[i] columns of row i."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask is true. Scalar float32."""
    return x.float().where(mask.bool(), 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is true; 0 if that is nowhere. Scalar float32."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def per_token(total: Tensor, denominator: float | Tensor) -> Tensor:
    """total / denominator; a minibatch without a valid token (0 / 0) gives 0."""
    return total / torch.as_tensor(denominator, dtype=torch.float32, device=total.device).clamp(min=1.0)


# --- KL divergence ----------------------------------------------------------------------------------------------------
# With d = log p(token) - log q(token) for a token drawn from p, all three estimate KL(p || q): Schulman, "Approximating
# KL Divergence", joschu.net/blog/kl-approx.html.


def kl_k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """d: unbiased, of either sign. Any shape, kept."""
    return log_probs.float() - ref_log_probs.float()


def kl_k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative. Any shape, kept."""
    return kl_k1(log_probs, ref_log_probs).square() / 2


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased, never negative. d is clamped to +-20, where exp is finite. Any shape, kept."""
    d = kl_k1(log_probs, ref_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-d) + d


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
    """Take ``penalty`` off the score of every response that did not end in a stop token, whatever its length.

    scores [batch], ended [batch] bool -> [batch].
    """
    return scores.float().where(ended.bool(), scores.float() - penalty)


@torch.no_grad()
def shaped_rewards(scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * k1_t on every valid token, plus the score on the last one (Ziegler et al. 2019, arXiv 1909.08593,
    eq. 2), so that sum_t r_t = score - kl_coef * sum_t k1_t.

    scores [batch]; log_probs of the policy that sampled, ref_log_probs and mask [batch, time] -> [batch, time], 0 outside
    the mask. A row without a valid token gets nothing.
    """
    mask = mask.bool()
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = columns.where(mask, -1).amax(dim=1, keepdim=True)
    penalty = (-kl_coef * kl_k1(log_probs, ref_log_probs)).where(mask, 0.0)
    return penalty + scores.float()[:, None].where(columns == last, 0.0)


# --- advantages -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) over responses:

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    returns_t = A_t + V_t

    rewards, values, mask [batch, time]; values[:, t] is the critic's before token t. The value after the last valid token
    is 0, whether the response ended or was cut off. A hole in the mask is passed over: t+1 is the next valid token.
    Returns advantages and returns, [batch, time], 0 outside the mask.
    """
    mask = mask.bool()
    rewards, values = rewards.float().where(mask, 0.0), values.float().where(mask, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    return advantages.where(mask, 0.0), (advantages + values).where(mask, 0.0)


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all valid tokens; var is the population's (divided by n, not n - 1).

    x, mask [batch, time] -> [batch, time], 0 outside the mask. Give it the whole rollout of all processes, once. With
    fewer than two valid tokens there is no spread to divide by: x stays as it is.
    """
    mask = mask.bool()
    x = x.float().where(mask, 0.0)
    if mask.sum() < 2:
        return x
    centred = x - masked_mean(x, mask)
    return (centred * torch.rsqrt(masked_mean(centred.square(), mask) + 1e-8)).where(mask, 0.0)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - var(returns - values) / var(returns) over valid tokens: 1 is a perfect critic, 0 one that knows the mean, less is
    worse than that. values, returns, mask [batch, time] -> scalar; 0 where the returns do not vary.
    """

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    spread = variance(returns.float())
    explained = 1.0 - variance(returns.float() - values.float()) / spread
    return explained.where(spread > 0, 0.0)


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
) -> tuple[Tensor, dict[str, float]]:
    """The clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), with rho = exp(log_probs - old_log_probs):

        sum over valid tokens of max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) / denominator

    dual_clip c > 1 also bounds the loss of a token with A < 0 by -c A (Ye et al. 2020, arXiv 1912.09729, eq. 5).
    All tensors [batch, time]; the gradient goes to log_probs only. Returns the loss (scalar) and, over this call's valid
    tokens, the sums "ratio", "clip_share" (tokens whose gradient the clip removed), "approx_kl" (k2 of the step from old to
    new) and "approx_kl_k3", and the maximum "ratio_deviation" of |rho - 1|. Divide sums by the denominator for means.
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
        figures = torch.stack([
            ratio.where(mask, 0.0).sum(),
            clipped.sum().float(),
            kl_k2(log_ratio, torch.zeros_like(log_ratio)).sum(),
            kl_k3(-log_ratio, torch.zeros_like(log_ratio)).sum(),  # the tokens were drawn from the old policy: d = old - new
            torch.cat([(ratio - 1.0).abs().flatten(), ratio.new_zeros(1)]).max(),  # of no tokens at all: 0
        ]).tolist()  # fmt: skip
    names = ("ratio", "clip_share", "approx_kl", "approx_kl_k3", "ratio_deviation")
    return per_token(losses.where(mask, 0.0).sum(), denominator), dict(zip(names, figures, strict=True))


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, denominator: float | Tensor, clip: float = 0.2
) -> Tensor:
    """The clipped regression of the critic (as in OpenAI's baselines and Ziegler et al. 2019):

        sum over valid tokens of 1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / denominator

    All tensors [batch, time]; the gradient goes to values only. clip 0 or less: no clipping. Scalar.
    """
    mask = mask.bool()
    values = values.float().where(mask, 0.0)
    old_values, returns = (x.detach().float().where(mask, 0.0) for x in (old_values, returns))
    losses = (values - returns).square()
    if clip > 0:
        near = old_values + (values - old_values).clamp(-clip, clip)
        losses = torch.max(losses, (near - returns).square())
    return per_token(0.5 * losses.sum(), denominator)
