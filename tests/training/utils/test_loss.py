"""The losses against plain loops in double precision, and what must not change them."""

import math

import pytest
import torch

from training.utils.loss import bradley_terry_loss, pair_accuracy, sft_loss

pytestmark = pytest.mark.fast


def random_batch(seed=0, batch=5, time=7):
    generator = torch.Generator().manual_seed(seed)
    log_probs = -3 * torch.rand(batch, time, generator=generator)
    mask = torch.rand(batch, time, generator=generator) < 0.5
    return log_probs, mask


def test_sft_loss_is_the_mean_over_targets():
    log_probs, mask = random_batch()
    total, count = 0.0, 0
    for row in range(5):
        for column in range(7):
            if mask[row, column]:
                total -= log_probs[row, column].item()
                count += 1
    assert sft_loss(log_probs, mask, count).item() == pytest.approx(total / count, abs=1e-6)


def test_sft_loss_and_gradient_do_not_depend_on_the_cut():
    log_probs, mask = random_batch()
    count = int(mask.sum())
    whole = log_probs.clone().requires_grad_()
    sft_loss(whole, mask, count).backward()
    for sizes in ([1, 1, 1, 1, 1], [2, 3], [4, 1]):
        parts = log_probs.clone().requires_grad_()
        losses = [sft_loss(p, m, count) for p, m in zip(parts.split(sizes), mask.split(sizes), strict=True)]
        sum(losses).backward()
        torch.testing.assert_close(parts.grad, whole.grad)


def test_nan_outside_the_targets_does_not_leak():
    log_probs, mask = random_batch()
    expected = sft_loss(log_probs, mask, 3)
    poisoned = log_probs.masked_fill(~mask, math.nan).requires_grad_()
    loss = sft_loss(poisoned, mask, 3)
    loss.backward()
    assert loss.item() == expected.item()
    assert (poisoned.grad[~mask] == 0).all()


def test_no_target_gives_zero():
    log_probs, mask = random_batch()
    assert sft_loss(log_probs, torch.zeros_like(mask), 9).item() == 0.0


@pytest.mark.parametrize("margins", [None, [0.0, 0.5, 1.0, 0.25]])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_bradley_terry_against_a_loop(margins, center):
    chosen, rejected, weight = [1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 0.5, -3.0], [1.0, 1.0, 1.0, 0.0]
    total = 0.0
    for i in range(4):
        margin = margins[i] if margins else 0.0
        loss = -math.log(1 / (1 + math.exp(-(chosen[i] - rejected[i] - margin))))
        total += weight[i] * (loss + center * (chosen[i] + rejected[i]) ** 2)
    found = bradley_terry_loss(
        torch.tensor(chosen),
        torch.tensor(rejected),
        torch.tensor(weight),
        3,
        margin=None if margins is None else torch.tensor(margins),
        center_coef=center,
    )
    assert found.item() == pytest.approx(total / 3, abs=1e-6)


def test_equal_scores_cost_ln_2():
    zeros = torch.zeros(4)
    assert bradley_terry_loss(zeros, zeros, torch.ones(4), 4).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.detail(44)
@pytest.mark.ppo
def test_bradley_terry_is_finite_for_any_difference():
    """-log(sigmoid(x)) would be infinite below about -103 in float32."""
    chosen = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([500.0, -500.0]), torch.ones(2), 1)
    loss.backward()
    assert loss.item() == pytest.approx(1000.0)
    assert chosen.grad.tolist() == pytest.approx([-1.0, 0.0])


def test_a_dropped_pair_may_be_nan():
    chosen = torch.tensor([1.0, math.nan], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([0.0, math.nan]), torch.tensor([1.0, 0.0]), 1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    assert chosen.grad[1] == 0


def test_sixteen_bit_scores_are_raised_to_float32():
    chosen = torch.tensor([4.0, 1.0], dtype=torch.bfloat16)
    loss = bradley_terry_loss(chosen, torch.zeros(2, dtype=torch.bfloat16), torch.ones(2), 2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((math.log1p(math.exp(-4)) + math.log1p(math.exp(-1))) / 2, abs=1e-6)


@pytest.mark.detail(44)
@pytest.mark.ppo
def test_ties_count_one_half():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 4.0, -1.0])
    assert pair_accuracy(chosen, rejected).item() == 2.5  # tie, right, wrong, right
    assert pair_accuracy(chosen, rejected, torch.tensor([1.0, 0.0, 1.0, 1.0])).item() == 1.5
