"""Advantages without a critic, whitening that keeps the mean, weights for a sampler of other numbers: against plain loops."""

import math
import statistics

import pytest
import torch

from training.step3_ppo.advantages import (
    equal_groups,
    gae,
    grpo,
    rewards_to_come,
    rloo,
    whiten,
)
from training.step3_ppo.objectives import overlong_penalty

pytestmark = [pytest.mark.ppo, pytest.mark.fast]
NAN = float("nan")
LENGTHS = [4, 1, 3, 2, 4, 2]
GROUP = torch.tensor([7, 3, 7, 3, 7, 3])  # rows of a group need not stand together
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]


def rewards(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).masked_fill(~MASK, NAN)


def totals(x: torch.Tensor) -> list[float]:
    return [sum(x[row, :length].tolist()) for row, length in enumerate(LENGTHS)]


def members(row: int) -> list[int]:
    return [other for other in range(6) if GROUP[other] == GROUP[row]]


@pytest.mark.detail(28)
@pytest.mark.parametrize("seed", range(3))
def test_rloo_by_hand(seed):
    """The reward of an answer less the mean of the others to its prompt = n / (n - 1) (R - mean)."""
    x = rewards(seed)
    whole = totals(x)
    found = rloo(x, MASK, GROUP)
    for row, length in enumerate(LENGTHS):
        others = [whole[other] for other in members(row) if other != row]
        expected = whole[row] - statistics.fmean(others)
        assert expected == pytest.approx(3 / 2 * (whole[row] - statistics.fmean([whole[i] for i in members(row)])))
        assert found[row].tolist() == pytest.approx([expected] * length + [0.0] * (4 - length), abs=1e-5)


@pytest.mark.detail(28)
@pytest.mark.parametrize("seed", range(3))
def test_grpo_by_hand(seed):
    """Item 28: (R - mean) / (std + epsilon) over the group, on every token of the answer."""
    x = rewards(seed)
    whole = totals(x)
    found = grpo(x, MASK, GROUP, epsilon=1e-4)
    for row, length in enumerate(LENGTHS):
        group = [whole[i] for i in members(row)]
        expected = (whole[row] - statistics.fmean(group)) / (statistics.pstdev(group) + 1e-4)
        assert found[row].tolist() == pytest.approx([expected] * length + [0.0] * (4 - length), abs=1e-4)


@pytest.mark.detail(28)
@pytest.mark.parametrize("method", [grpo, rloo])
def test_groups_stay_groups_in_any_order(method):
    """Shuffled rows and other names of the groups change nothing; a group's advantages add up to 0."""
    x = rewards()
    found = method(x, MASK, GROUP)
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    torch.testing.assert_close(method(x[order], MASK[order], GROUP[order] * 10 + 1), found[order])
    for name in (3, 7):
        assert found[name == GROUP][:, 0].sum().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.detail(28)
@pytest.mark.parametrize("method", [grpo, rloo])
def test_one_answer_or_equal_answers_teach_nothing(method):
    """A group of one gives 0, not NaN; so do equal rewards, up to what rounding leaves of 0."""
    x = torch.tensor([[0.1, 0.2], [0.3, 0.0], [5.0, NAN]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    found = method(x, mask, torch.tensor([0, 0, 1]))
    assert found.abs().max() < 1e-3
    assert equal_groups(x, mask, torch.tensor([0, 0, 1])).item() == 1.0
    assert equal_groups(x + torch.tensor([[0.0], [1.0], [0.0]]), mask, torch.tensor([0, 0, 1])).item() == 0.5


@pytest.mark.detail(26)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_rewards_to_come_by_hand(gamma):
    """REINFORCE++ sums the rewards that follow, as GAE does with lambda 1 and a critic that says 0."""
    x = rewards()
    found = rewards_to_come(x, MASK, gamma)
    for row, length in enumerate(LENGTHS):
        expected = [sum(gamma ** (s - t) * float(x[row, s]) for s in range(t, length)) for t in range(length)]
        assert found[row].tolist() == pytest.approx(expected + [0.0] * (4 - length), abs=1e-5)
    torch.testing.assert_close(found, gae(x, torch.zeros(6, 4), MASK, gamma, 1.0)[0])


@pytest.mark.detail(22)
def test_reward_whitening_keeps_the_mean():
    """Variance 1 over all valid tokens, the mean as it was."""
    x = rewards() * 5 + 2
    found = whiten(x, MASK, keep_mean=True)[MASK]
    assert found.mean().item() == pytest.approx(x[MASK].mean().item(), rel=1e-5)
    assert found.var(unbiased=False).item() == pytest.approx(1.0, rel=1e-4)
    spread = math.sqrt(float(x[MASK].var(unbiased=False)))
    torch.testing.assert_close(found, (x[MASK] - x[MASK].mean()) / spread + x[MASK].mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.detail(19)
def test_overlong_penalty_is_a_ramp():
    """Nothing until 4 tokens before the limit of 10, then a quarter a token, all of it at the limit."""
    lengths = torch.tensor([1, 6, 7, 8, 9, 10])
    found = overlong_penalty(torch.full((6,), 3.0), lengths, limit=10, tokens=4, penalty=2.0)
    assert found.tolist() == [3.0, 3.0, 2.5, 2.0, 1.5, 1.0]
    assert overlong_penalty(torch.ones(6), lengths, 10, 0, 2.0).tolist() == [1.0] * 6
