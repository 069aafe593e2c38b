"""The losses of steps 1 and 2 and of DPO against plain loops in double precision, and what must not change them."""

import math

import pytest
import torch

from training.utils.data.batching import collate_answer_pairs
from training.utils.loss import (
    bradley_terry_loss,
    dpo_loss,
    implicit_rewards,
    pair_accuracy,
    sequence_log_probs,
    sft_loss,
)

pytestmark = pytest.mark.fast
CHOSEN, REJECTED, WEIGHT = [1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 0.5, -3.0], [1.0, 1.0, 1.0, 0.0]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def random_batch():
    generator = torch.Generator().manual_seed(0)
    return -3 * torch.rand(5, 7, generator=generator), torch.rand(5, 7, generator=generator) < 0.5


# --- step 1 -----------------------------------------------------------------------------------------------------------


def test_sft_loss_is_the_mean_over_targets_however_the_batch_is_cut():
    """NaN outside the targets leaks neither into the loss nor into the gradient."""
    log_probs, mask = random_batch()
    targets = [log_probs[row, column].item() for row, column in mask.nonzero().tolist()]
    leaf = log_probs.masked_fill(~mask, math.nan).requires_grad_()
    loss = sft_loss(leaf, mask, len(targets))
    loss.backward()
    assert loss.item() == pytest.approx(-sum(targets) / len(targets), abs=1e-6)
    torch.testing.assert_close(leaf.grad, torch.where(mask, -1 / len(targets), 0.0))
    for sizes in ([1, 1, 1, 1, 1], [2, 3], [4, 1]):
        parts = zip(log_probs.split(sizes), mask.split(sizes), strict=True)
        torch.testing.assert_close(sum(sft_loss(*part, len(targets)) for part in parts), loss.detach())
    assert sft_loss(log_probs, torch.zeros_like(mask), 9).item() == 0.0


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margins", [None, [0.0, 0.5, 1.0, 0.25]])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_bradley_terry_against_a_loop(margins, center):
    total = 0.0
    for good, bad, weight, margin in zip(CHOSEN, REJECTED, WEIGHT, margins or [0.0] * 4, strict=True):
        total += weight * (-log_sigmoid(good - bad - margin) + center * (good + bad) ** 2)
    tensors = map(torch.tensor, (CHOSEN, REJECTED, WEIGHT))
    margin = None if margins is None else torch.tensor(margins)
    found = bradley_terry_loss(*tensors, 3, margin=margin, center_coef=center)
    assert found.item() == pytest.approx(total / 3, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_dpo_against_a_loop(smoothing):
    """Equation 7, pair by pair; without smoothing it is Bradley-Terry, with one half it knows no better answer."""
    total = 0.0
    for good, bad, weight in zip(CHOSEN, REJECTED, WEIGHT, strict=True):
        total -= weight * ((1 - smoothing) * log_sigmoid(good - bad) + smoothing * log_sigmoid(bad - good))
    chosen, rejected, weight = map(torch.tensor, (CHOSEN, REJECTED, WEIGHT))
    found = dpo_loss(chosen, rejected, weight, 3.0, smoothing)
    assert found.item() == pytest.approx(total / 3, abs=1e-6)
    swapped = dpo_loss(rejected, chosen, weight, 3.0, smoothing)
    assert (swapped.item() == pytest.approx(found.item(), abs=1e-3)) == (smoothing == 0.5)
    if not smoothing:
        torch.testing.assert_close(found, bradley_terry_loss(chosen, rejected, weight, 3.0))


def test_dpo_gradient_is_largest_where_the_reward_is_wrong():
    """- beta · sigmoid(r_rejected - r_chosen) on the chosen answer, the opposite on the rejected one (section 4)."""
    beta, references = 0.3, torch.tensor([-1.0, 2.0, 0.0, 5.0])
    chosen, rejected = (torch.tensor(values, requires_grad=True) for values in (CHOSEN, REJECTED))
    rewards = implicit_rewards(chosen, references, beta), implicit_rewards(rejected, references, beta)
    dpo_loss(*rewards, torch.tensor(WEIGHT), 3.0).backward()
    for pair in range(3):
        expected = beta / (1 + math.exp(beta * (CHOSEN[pair] - REJECTED[pair]))) / 3
        assert chosen.grad[pair].item() == pytest.approx(-expected, abs=1e-7)
        assert rejected.grad[pair].item() == pytest.approx(expected, abs=1e-7)
    assert chosen.grad[3] == rejected.grad[3] == 0.0


def test_smoothing_draws_the_difference_to_the_log_odds():
    best = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    dpo_loss(best, torch.zeros(1), torch.ones(1), 1.0, 0.1).backward()
    assert best.grad.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.detail(44)
@pytest.mark.ppo
@pytest.mark.parametrize("loss_of", [bradley_terry_loss, dpo_loss])
def test_losses_of_pairs_stay_finite(loss_of):
    """For any difference, where -log(sigmoid(x)) is infinite below about -103; with NaN in a dropped pair; from 16 bits."""
    chosen = torch.tensor([-500.0, 500.0, math.nan], requires_grad=True)
    loss = loss_of(chosen, torch.tensor([500.0, -500.0, math.nan]), torch.tensor([1.0, 1.0, 0.0]), 1)
    loss.backward()
    assert loss.item() == pytest.approx(1000.0)
    assert chosen.grad.tolist() == pytest.approx([-1.0, 0.0, 0.0])
    zeros = torch.zeros(4)
    assert loss_of(zeros, zeros, torch.ones(4), 4).item() == pytest.approx(math.log(2), abs=1e-6)
    loss = loss_of(torch.tensor([4.0, 1.0]).bfloat16(), zeros[:2].bfloat16(), torch.ones(2), 2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-(log_sigmoid(4) + log_sigmoid(1)) / 2, abs=1e-6)


@pytest.mark.detail(44)
@pytest.mark.ppo
def test_ties_count_one_half():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 4.0, -1.0])
    assert pair_accuracy(chosen, rejected).item() == 2.5  # tie, right, wrong, right
    assert pair_accuracy(chosen, rejected, torch.tensor([1.0, 0.0, 1.0, 1.0])).item() == 1.5


def test_sequence_log_probs_sum_over_the_answer_alone():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, math.nan, -5.0], [-6.0, -7.0, -8.0]], requires_grad=True)
    mask = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    found = sequence_log_probs(log_probs, mask)
    found.sum().backward()
    assert found.tolist() == [-5.0, -4.0, 0.0]
    assert torch.equal(log_probs.grad, mask.float())


def test_the_answer_mask_leaves_out_prompt_padding_and_fillers():
    rows = [
        {"chosen_ids": [1, 2, 3, 4], "rejected_ids": [1, 2, 5], "prompt_length": 2, "margin": None},
        {"chosen_ids": [6, 7], "rejected_ids": [8, 9, 10], "prompt_length": 0, "margin": None},
        {"chosen_ids": [6, 7], "rejected_ids": [6, 9, 10], "prompt_length": 1, "margin": None},
    ]
    batch = collate_answer_pairs(rows, [True, True, False], pad_id=0)
    # Nothing predicts the first token of a text.
    expected = ["0011", "0100", "0000", "0010", "0110", "0000"]
    assert ["".join(map(str, row)) for row in batch.answer_mask.int().tolist()] == expected
    assert batch.weight.tolist() == [1.0, 1.0, 0.0]
