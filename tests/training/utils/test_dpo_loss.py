"""The loss of DPO against a plain loop in double precision, its identities, and which tokens count."""

import math

import pytest
import torch

from training.utils.data.batching import collate_answer_pairs
from training.utils.loss import bradley_terry_loss, dpo_loss, implicit_rewards, sequence_log_probs

pytestmark = pytest.mark.fast

BETA = 0.3
LOG_PROBS = {
    "chosen": [-12.0, -3.5, -40.0, -7.0],
    "rejected": [-10.0, -9.0, -41.0, -6.0],
    "ref_chosen": [-13.0, -3.0, -38.0, -7.5],
    "ref_rejected": [-10.5, -8.0, -39.5, -2.0],
}
WEIGHT = [1.0, 1.0, 1.0, 0.0]


def tensors(requires_grad: bool = False) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values, requires_grad=requires_grad) for name, values in LOG_PROBS.items()}


def loss_of(log_probs: dict[str, torch.Tensor], denominator: float = 3.0, smoothing: float = 0.0, weight=None) -> torch.Tensor:
    """The loss as main.py computes it."""
    rewards = [implicit_rewards(log_probs[name], log_probs[f"ref_{name}"], BETA) for name in ("chosen", "rejected")]
    return dpo_loss(*rewards, torch.tensor(weight or WEIGHT), denominator, smoothing)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_against_a_loop(smoothing):
    """Equation 7, pair by pair; the last pair has no weight."""
    total = 0.0
    for place in range(3):
        row = {name: values[place] for name, values in LOG_PROBS.items()}
        difference = BETA * (row["chosen"] - row["ref_chosen"]) - BETA * (row["rejected"] - row["ref_rejected"])
        total -= (1 - smoothing) * log_sigmoid(difference) + smoothing * log_sigmoid(-difference)
    assert loss_of(tensors(), smoothing=smoothing).item() == pytest.approx(total / 3, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_policy_that_is_its_reference_loses_log_2(smoothing):
    same = tensors()
    same |= {f"ref_{name}": same[name] for name in ("chosen", "rejected")}
    assert loss_of(same, smoothing=smoothing).item() == pytest.approx(math.log(2), abs=1e-6)


def test_gradient_raises_the_chosen_and_lowers_the_rejected_answer_most_where_the_reward_is_wrong():
    """- beta · sigmoid(r_rejected - r_chosen) on the chosen answer, the opposite on the rejected one (section 4)."""
    log_probs = tensors(requires_grad=True)
    loss_of(log_probs).backward()
    for place in range(3):
        row = {name: values[place] for name, values in LOG_PROBS.items()}
        difference = BETA * (row["chosen"] - row["ref_chosen"] - row["rejected"] + row["ref_rejected"])
        expected = BETA / (1 + math.exp(difference)) / 3
        assert log_probs["chosen"].grad[place].item() == pytest.approx(-expected, abs=1e-7)
        assert log_probs["rejected"].grad[place].item() == pytest.approx(expected, abs=1e-7)
    assert log_probs["chosen"].grad[3] == log_probs["rejected"].grad[3] == 0.0


def test_without_smoothing_it_is_bradley_terry_on_implicit_rewards():
    log_probs = tensors()
    rewards = [implicit_rewards(log_probs[name], log_probs[f"ref_{name}"], BETA) for name in ("chosen", "rejected")]
    torch.testing.assert_close(loss_of(log_probs), bradley_terry_loss(*rewards, torch.tensor(WEIGHT), 3.0))


def test_smoothing_of_one_half_does_not_know_which_answer_is_better():
    log_probs = tensors()
    swapped = {name.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected"): values
               for name, values in log_probs.items()}  # fmt: skip
    torch.testing.assert_close(loss_of(log_probs, smoothing=0.5), loss_of(swapped, smoothing=0.5))
    assert loss_of(log_probs).item() != pytest.approx(loss_of(swapped).item(), abs=1e-3)


def test_smoothing_draws_the_difference_to_the_log_odds():
    smoothing, one = 0.1, torch.ones(1)
    best = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    dpo_loss(best, torch.zeros(1), one, 1.0, smoothing).backward()
    assert best.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_far_differences_and_nan_in_a_dropped_pair_stay_finite():
    chosen = torch.tensor([-1000.0, 1000.0, math.nan], requires_grad=True)
    loss = dpo_loss(chosen, torch.zeros(3), torch.tensor([1.0, 1.0, 0.0]), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(500.0)
    assert chosen.grad.tolist() == pytest.approx([-0.5, 0.0, 0.0])


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
    batch = collate_answer_pairs(rows, [True, True, False], pad_id=0).to("cpu")
    assert batch.answer_mask.int().tolist() == [
        [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0],   # nothing predicts the first token of a text
        [0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0],
    ]  # fmt: skip
    assert batch.weight.tolist() == [1.0, 1.0, 0.0]
