"""Where a KL penalty goes, which gradient it has, and what keeps it in bounds. Expectations are enumerated, not sampled."""


import pytest
import torch
from torch import Tensor

from training.step3_ppo.objectives import adapted_kl_coef, aggregate, kl_k1, kl_k2, kl_k3, kl_loss, loss_denominator

pytestmark = [pytest.mark.ppo, pytest.mark.fast]
LOGITS = torch.tensor([1.0, -0.5, 0.3, -2.0])
REFERENCE = torch.tensor([0.2, 0.4, -1.0, 0.1]).log_softmax(0)


def exact_gradient() -> Tensor:
    """The gradient of KL(p || q) = sum p log(p / q) in the logits of p, by differentiating the sum itself."""
    logits = LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    (log_probs.exp() * (log_probs - REFERENCE)).sum().backward()
    return logits.grad


def expected_gradient(loss_of) -> Tensor:
    """The mean over tokens drawn from p of the gradient of loss_of(log p(token), log q(token)): each token's loss, weighed
    by its probability as a number.
    """
    logits = LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    (log_probs.detach().exp() * loss_of(log_probs, REFERENCE)).sum().backward()
    return logits.grad


def token_losses(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return kl_loss of each token alone."""
    one = torch.ones(1, 1, dtype=torch.bool)
    pairs = zip(log_probs, reference, strict=True)
    return torch.stack([kl_loss(a.view(1, 1), b.view(1, 1), one, 1.0) for a, b in pairs])


@pytest.mark.detail(13)
def test_the_loss_has_the_gradient_of_the_kl():
    """The value is k1's, and the expected gradient that of KL(p || q)."""
    torch.testing.assert_close(expected_gradient(token_losses), exact_gradient(), rtol=1e-5, atol=1e-6)
    values = token_losses(LOGITS.log_softmax(0), REFERENCE)
    torch.testing.assert_close(values, kl_k1(LOGITS.log_softmax(0), REFERENCE))


@pytest.mark.detail(13)
def test_differentiating_k1_or_k3_is_wrong():
    """K1's gradient has mean 0; k3's is that of the other direction, KL(q || p); only k2's is right."""
    torch.testing.assert_close(expected_gradient(kl_k1), torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(expected_gradient(kl_k2), exact_gradient(), rtol=1e-5, atol=1e-6)
    logits = LOGITS.clone().requires_grad_()
    (REFERENCE.exp() * (REFERENCE - logits.log_softmax(0))).sum().backward()
    torch.testing.assert_close(expected_gradient(kl_k3), logits.grad, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits.grad, exact_gradient(), atol=0.05)


@pytest.mark.detail(13)
def test_in_the_reward_k1_is_right():
    """A reward of -k as a number, times grad log p: for k1 that is minus the KL's gradient, for k3 it is not."""
    for estimator, right in ((kl_k1, True), (kl_k3, False)):
        found = expected_gradient(lambda a, b, estimate=estimator: estimate(a, b).detach() * a)
        assert torch.allclose(found, exact_gradient(), atol=1e-6) == right


@pytest.mark.detail(8)
def test_the_loss_ignores_the_reference_outside_the_mask_and_its_gradient():
    """NaN outside does not leak, and nothing is learned by the reference."""
    leaf, reference = (torch.randn(2, 3).requires_grad_() for _ in range(2))
    nan = torch.tensor([[0.0, 0.0, float("nan")], [0.0, float("nan"), float("nan")]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = kl_loss(leaf + nan, reference + nan, mask, 3.0)
    loss.backward()
    assert loss.isfinite() and (leaf.grad[mask == 0] == 0).all() and reference.grad is None


@pytest.mark.detail(16)
@pytest.mark.parametrize("kl", [0.0, 1.0, 5.9, 6.0, 6.3, 9.0, 1e6])
def test_the_coefficient_moves_towards_the_target(kl):
    """Up where the KL is above the target, down below, by at most 20 % per horizon of episodes, monotone in KL."""
    after = adapted_kl_coef(0.1, kl, target=6.0, episodes=64, horizon=10_000)
    error = max(-0.2, min(0.2, kl / 6.0 - 1))
    assert after == pytest.approx(0.1 * (1 + error * 64 / 10_000))
    assert (after > 0.1) == (kl > 6.0) and (after < 0.1) == (kl < 6.0)
    assert abs(after / 0.1 - 1) <= 0.2 * 64 / 10_000 + 1e-12
    assert adapted_kl_coef(0.1, kl + 0.1, 6.0, 64, 10_000) >= after
    assert adapted_kl_coef(0.1, kl, 6.0, episodes=10**6, horizon=10) > 0


# --- reduction --------------------------------------------------------------------------------------------------------


@pytest.mark.detail(7)
def test_means_over_tokens_and_over_answers():
    """Item 33: "token" weighs every token alike, "sequence" every answer; an answer without a token counts in neither."""
    losses = torch.tensor([[6.0, float("nan"), 0.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    assert loss_denominator(mask) == 4.0 and loss_denominator(mask, "sequence") == 2.0
    assert aggregate(losses, mask, 4.0).item() == 3.0
    assert aggregate(losses, mask, 2.0, "sequence").item() == 4.0  # (6 + 2) / 2
    nothing = torch.zeros_like(mask)
    assert loss_denominator(nothing, "sequence") == 0.0
    for reduction in ("token", "sequence"):
        assert aggregate(losses, nothing, 0.0, reduction).item() == 0.0


@pytest.mark.detail(33)
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_either_mean_is_the_same_in_any_micro_batches(reduction):
    """The parts of a minibatch, each trimmed to its width, add up to the whole."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 2, 1, 4])
    losses, mask = torch.randn(4, 5, generator=generator), torch.arange(5) < lengths[:, None]
    count = loss_denominator(mask, reduction)
    cuts = ((slice(0, 1), 5), (slice(1, 3), 2), (slice(3, 4), 4))
    parts = [aggregate(losses[rows, :width], mask[rows, :width], count, reduction) for rows, width in cuts]
    torch.testing.assert_close(sum(parts), aggregate(losses, mask, count, reduction))
