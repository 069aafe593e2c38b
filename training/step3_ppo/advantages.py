"""How good a token was, as pure functions of tensors: with a critic (GAE), or by comparing answers. Everything is float32.

Shapes and masks as in objectives.py: [batch, time] over the answer. Give every function the whole rollout of all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.step3_ppo.objectives import masked_mean


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16) over answers:

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    returns_t = A_t + V_t

    rewards, values, mask [batch, time]; values[:, t] is the critic's before token t. The value after the last valid token
    is 0, whether the answer ended or was cut off. A hole in the mask is passed over: t+1 is the next valid token.
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
def rewards_to_come(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """A_t = sum_{s >= t} gamma^(s - t) r_s (REINFORCE++, Hu 2025, arXiv 2501.03262, with the KL penalty in r): what GAE at
    lambda 1 gives to a critic that says 0. Its baseline is the mean over the whole rollout, which whitening takes off.

    rewards, mask [batch, time] -> [batch, time], 0 outside the mask.
    """
    return gae(rewards, torch.zeros_like(rewards, dtype=torch.float32), mask, gamma, lam=1.0)[0]


@torch.no_grad()
def grpo(rewards: Tensor, mask: Tensor, group: Tensor, epsilon: float = 1e-4) -> Tensor:
    """A_t = (R - mean) / (std + epsilon) on every token of an answer with reward R, mean and std over the answers to the
    same prompt (GRPO, Shao et al. 2024, arXiv 2402.03300, section 4.1.2). std is the population's. Answers of equal reward
    get 0, and so does an answer alone.

    rewards, mask [batch, time], R = sum of a row's rewards; group [batch]: equal where the prompt is the same. -> [batch, time].
    """
    totals, mean, count, index = _groups(rewards, mask, group)
    centred = totals - mean[index]
    variance = torch.zeros_like(mean).index_add(0, index, centred.square()) / count
    # Rounding leaves 1e-7 of a mean of equal rewards; divided by epsilon that must stay small.
    return _spread(centred / (variance.sqrt() + epsilon)[index], mask)


@torch.no_grad()
def rloo(rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """A_t = R - mean of the other answers' R = n / (n - 1) (R - mean) on every token of an answer, over the n answers to the
    same prompt (leave one out: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740). An answer alone gets 0.

    rewards, mask [batch, time], R = sum of a row's rewards; group [batch]: equal where the prompt is the same. -> [batch, time].
    """
    totals, mean, count, index = _groups(rewards, mask, group)
    factor = count / (count - 1).clamp(min=1)
    return _spread((totals - mean[index]) * factor[index], mask)


@torch.no_grad()
def equal_groups(rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """Return the share of the groups whose answers all have the same reward, to 1e-6: they teach nothing. Shapes as grpo's."""
    totals, mean, _, index = _groups(rewards, mask, group)
    differ = torch.zeros_like(mean).index_add(0, index, ((totals - mean[index]).abs() > 1e-6).float())
    return (differ == 0).float().mean()


def _groups(rewards: Tensor, mask: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each row's summed reward, the mean and size of each group, and the number of each row's group. The rows of a group
    may stand anywhere.
    """
    totals = rewards.float().where(mask.bool(), 0.0).sum(dim=1)
    _, index = torch.unique(group, return_inverse=True)
    count = torch.bincount(index).float()
    mean = torch.zeros_like(count).index_add(0, index, totals) / count
    return totals, mean, count, index


def _spread(row_values: Tensor, mask: Tensor) -> Tensor:
    """Spread [batch] to [batch, time]: the same on every valid token, 0 elsewhere."""
    return row_values[:, None].where(mask.bool(), 0.0)


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, keep_mean: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all valid tokens; var is the population's (divided by n, not n - 1). keep_mean
    adds the mean again afterwards (rewards: what is good on average stays good).

    x, mask [batch, time] -> [batch, time], 0 outside the mask. Give it the whole rollout of all processes, once. With
    fewer than two valid tokens there is no spread to divide by: x stays as it is.
    """
    mask = mask.bool()
    x = x.float().where(mask, 0.0)
    if mask.sum() < 2:
        return x
    mean = masked_mean(x, mask)
    centred = x - mean
    whitened = centred * torch.rsqrt(masked_mean(centred.square(), mask) + 1e-8)
    return (whitened + mean if keep_mean else whitened).where(mask, 0.0)


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
