"""Advantages with and without a critic, and whitening: against plain loops."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.step3_ppo.advantages import equal_groups, explained_variance, gae, grpo, rewards_to_come, rloo, whiten

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
def test_rloo_and_grpo_by_hand(seed):
    """On every token of an answer: its reward less the mean of the others to its prompt = n / (n - 1) (R - mean); or item 28,
    (R - mean) / (std + epsilon) over the group.
    """
    x = rewards(seed)
    whole = totals(x)
    found = rloo(x, MASK, GROUP), grpo(x, MASK, GROUP, epsilon=1e-4)
    for row, length in enumerate(LENGTHS):
        group = [whole[other] for other in members(row)]
        others = [whole[other] for other in members(row) if other != row]
        left_out = whole[row] - statistics.fmean(others)
        normalised = (whole[row] - statistics.fmean(group)) / (statistics.pstdev(group) + 1e-4)
        for values, expected in zip(found, (left_out, normalised), strict=True):
            assert values[row].tolist() == pytest.approx([expected] * length + [0.0] * (4 - length), abs=1e-4)


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


# --- with a critic ----------------------------------------------------------------------------------------------------


@pytest.mark.detail(23, 25, 26)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_by_the_double_sum(gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} with the value 0 after the end; returns are advantages plus the old values."""
    for seed in range(3):
        x, values = rewards(seed), rewards(seed + 100)
        advantages, returns = gae(x, values, MASK, gamma, lam)
        for row, length in enumerate(LENGTHS):
            r, v = x[row, :length].tolist(), values[row, :length].tolist()
            deltas = [now + gamma * after - value for now, value, after in zip(r, v, [*v[1:], 0.0], strict=True)]
            sums = [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]
            outside = [0.0] * (4 - length)
            assert advantages[row].tolist() == pytest.approx(sums + outside, abs=1e-5)
            assert returns[row].tolist() == pytest.approx([a + b for a, b in zip(sums, v, strict=True)] + outside, abs=1e-5)


@pytest.mark.detail(24)
@given(st.integers(0, 2**31), st.lists(st.booleans(), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_masked_columns_may_be_deleted(seed, holes):
    """Also inside an answer (the output of a tool) a masked column changes no advantage."""
    keep = torch.tensor(holes)
    x, values = torch.randn(2, 1, len(holes), generator=torch.Generator().manual_seed(seed))
    advantages, returns = gae(x, values, keep[None], 0.97, 0.9)
    assert (advantages[:, ~keep] == 0).all() and (returns[:, ~keep] == 0).all()
    if keep.any():
        short = gae(x[:, keep], values[:, keep], torch.ones(1, int(keep.sum())), 0.97, 0.9)
        torch.testing.assert_close((advantages[:, keep], returns[:, keep]), short)


def test_explained_variance():
    """1 for the returns themselves, also shifted; 0 for a constant; below 0 for their opposite."""
    returns = torch.tensor([[1.0, 2.0, 4.0, NAN]])
    mask = torch.tensor([[1, 1, 1, 0]])
    for values, expected in ((returns, 1.0), (returns + 7, 1.0), (torch.full((1, 4), 3.0), 0.0), (-returns, -3.0)):
        assert explained_variance(values, returns, mask).item() == pytest.approx(expected, abs=1e-5)
    assert explained_variance(returns, torch.ones(1, 4), mask).item() == 0.0


# --- whitening --------------------------------------------------------------------------------------------------------


@pytest.mark.detail(22, 27)
def test_whitening_of_a_whole_rollout():
    """Mean 0 (or, for rewards, as it was) and population variance 1 over all valid tokens together, in any order of rows."""
    x = rewards() * 5 + 2
    valid = x[MASK]
    expected = (valid - valid.mean()) / math.sqrt(float(valid.var(unbiased=False)))
    whole = whiten(x, MASK)
    torch.testing.assert_close(whole[MASK], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whiten(x, MASK, keep_mean=True)[MASK], expected + valid.mean(), rtol=1e-4, atol=1e-5)
    assert (whole[~MASK] == 0).all()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(whiten(x[order], MASK[order]), whole[order])
    # One token has no spread, nothing is divided; equal tokens whiten to 0, not to NaN.
    assert whiten(torch.tensor([[3.0, NAN]]), torch.tensor([[1, 0]])).tolist() == [[3.0, 0.0]]
    assert whiten(torch.full((2, 2), 3.0), torch.ones(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
