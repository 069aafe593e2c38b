"""The arithmetic of PPO against plain loops, enumeration and identities. Item numbers: the fifty details of a correct PPO."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.heads import chunk_log_probs
from training.step3_ppo.advantages import explained_variance, gae, whiten
from training.step3_ppo.objectives import (
    answer_mask,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    masked_sum,
    missing_end_penalty,
    normalize_scores,
    overlong_penalty,
    policy_loss,
    shaped_rewards,
    value_loss,
)

pytestmark = [pytest.mark.ppo, pytest.mark.fast]
NAN = float("nan")


def random_batch(seed: int = 0, rows: int = 5, width: int = 7) -> dict[str, Tensor]:
    """What one minibatch of PPO needs, with ragged lengths from 0 to width and NaN after the ends."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (rows,), generator=random)
    lengths[0], lengths[1] = width, 1
    mask = answer_mask(lengths, width)
    names = ("log_probs", "old_log_probs", "ref_log_probs", "values", "old_values", "rewards", "advantages", "returns")
    batch = {name: torch.randn(rows, width, generator=random).masked_fill(~mask, NAN) for name in names}
    return batch | {"mask": mask, "lengths": lengths, "scores": torch.randn(rows, generator=random)}


def valid(lengths: Tensor) -> list[tuple[int, int]]:
    """(row, column) of the valid tokens, counted by hand."""
    return [(row, column) for row, length in enumerate(lengths.tolist()) for column in range(length)]


def widened(x: Tensor) -> Tensor:
    """Three more columns outside the mask."""
    return torch.cat([x, x.new_full((len(x), 3), False if x.dtype == torch.bool else NAN)], dim=1)


def losses(batch: dict[str, Tensor], denominator: float, **changes: Tensor) -> tuple[Tensor, Tensor]:
    """Policy and value loss of a batch."""
    b = batch | changes
    policy, _ = policy_loss(b["log_probs"], b["old_log_probs"], b["advantages"], b["mask"], denominator)
    return policy, value_loss(b["values"], b["old_values"], b["returns"], b["mask"], denominator)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_sums_and_means_by_hand():
    """A mask is true on as many columns as the answer has tokens; NaN and infinity outside do not count; nothing gives 0."""
    mask = answer_mask(torch.tensor([3, 0, 1]), 4)
    assert mask.tolist() == [[True, True, True, False], [False] * 4, [True, False, False, False]]
    x = torch.tensor([[1.0, NAN], [2.5, float("inf")]])
    inside = torch.tensor([[True, False], [True, False]])
    assert masked_sum(x, inside).item() == 3.5 and masked_mean(x, inside).item() == 1.75
    assert masked_mean(x, torch.zeros_like(inside)).item() == 0.0
    assert masked_sum(x.half(), inside).dtype == torch.float32


@pytest.mark.detail(5, 8, 20)
def test_nothing_outside_the_mask_leaks_in():
    """NaN, zeros or noise behind the end token, and more columns: the same rewards, advantages and losses, and no gradient."""
    batch = random_batch()
    mask, lengths = batch["mask"], batch["lengths"]
    count = float(lengths.sum())

    def pipeline(change) -> list[Tensor]:
        b = {name: change(x) if x.shape == mask.shape else x for name, x in batch.items()}
        rewards = shaped_rewards(b["scores"], b["old_log_probs"], b["ref_log_probs"], b["mask"], 0.1)
        advantages, returns = gae(rewards, b["values"], b["mask"], 0.99, 0.9)
        found = losses(b, count, advantages=whiten(advantages, b["mask"]), returns=returns)
        return [rewards[:, : mask.shape[1]], advantages[:, : mask.shape[1]], returns[:, : mask.shape[1]], *found]

    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(9)) * 100
    expected = pipeline(lambda x: x)
    for change in (lambda x: x.masked_fill(~mask, 0.0), lambda x: torch.where(mask, x, noise.to(x.dtype) if x is not mask else x)):
        assert all(torch.equal(*pair) for pair in zip(pipeline(change), expected, strict=True))
    torch.testing.assert_close(pipeline(widened), expected)
    for name in ("log_probs", "values"):
        leaf = batch[name].clone().requires_grad_()
        sum(losses(batch, count, **{name: leaf})).backward()
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[~mask] == 0).all() and (leaf.grad[mask] != 0).any()


@pytest.mark.detail(7)
def test_rows_and_batches_without_a_token_count_nothing():
    """A row without a answer changes neither sum nor denominator; a batch of nothing is 0, with gradient 0."""
    batch = random_batch()
    empty = torch.zeros_like(batch["mask"])
    leaf = batch["log_probs"].clone().requires_grad_()
    loss, metrics = policy_loss(leaf, batch["old_log_probs"], batch["advantages"], empty, 0)
    loss.backward()
    assert loss.item() == 0.0 and (leaf.grad == 0).all()
    assert set(metrics.values()) == {0.0}
    assert value_loss(batch["values"], batch["old_values"], batch["returns"], empty, torch.tensor(0)).item() == 0.0
    rewards = shaped_rewards(batch["scores"], batch["log_probs"], batch["ref_log_probs"], empty, 0.1)
    assert (rewards == 0).all()
    advantages, returns = gae(rewards, batch["values"], empty)
    assert (advantages == 0).all() and (returns == 0).all()
    assert (whiten(batch["advantages"], empty) == 0).all()
    assert explained_variance(batch["values"], batch["returns"], empty).item() == 0.0


# --- KL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.detail(11, 12)
def test_estimators_over_a_small_vocabulary():
    """E[k1] = E[k3] = KL(p || q) by enumeration; k2 and k3 are never negative; all are 0 where p = q."""
    p = torch.tensor([0.5, 0.2, 0.2, 0.1])
    q = torch.tensor([0.1, 0.3, 0.2, 0.4])
    kl = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert (p * kl_k1(p.log(), q.log())).sum().item() == pytest.approx(kl, rel=1e-5)
    assert (p * kl_k3(p.log(), q.log())).sum().item() == pytest.approx(kl, rel=1e-5)
    d = torch.linspace(-30, 30, 101)
    zero = torch.zeros_like(d)
    for estimator in (kl_k2, kl_k3):
        assert (estimator(d, zero) >= 0).all() and estimator(d, zero).isfinite().all()
    for estimator in (kl_k1, kl_k2, kl_k3):
        assert (estimator(p.log(), p.log()) == 0).all()
    assert kl_k2(torch.tensor(3.0), torch.tensor(1.0)).item() == 2.0
    assert kl_k3(torch.tensor(1.0), torch.tensor(3.0)).item() == pytest.approx(math.e**2 - 3, rel=1e-6)
    # Computed in float32: a difference of 1/1024 vanishes in bf16.
    assert kl_k1(torch.tensor([-5.0]).bfloat16(), torch.tensor([-5.0 - 1 / 1024])).item() == 1 / 1024


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.detail(10, 15)
@pytest.mark.parametrize("seed", range(5))
def test_rewards_by_a_plain_loop(seed):
    """The score on the last valid token, the KL penalty on every valid one, the end token included;
    their sum is score - beta * sum of k1."""
    batch = random_batch(seed)
    rewards = shaped_rewards(batch["scores"], batch["old_log_probs"], batch["ref_log_probs"], batch["mask"], 0.3)
    for row, length in enumerate(batch["lengths"].tolist()):
        kl = [float(batch["old_log_probs"][row, t] - batch["ref_log_probs"][row, t]) for t in range(length)]
        expected = [-0.3 * k for k in kl]
        if expected:
            expected[-1] += float(batch["scores"][row])
            assert rewards[row].sum().item() == pytest.approx(float(batch["scores"][row]) - 0.3 * sum(kl), abs=1e-5)
        assert rewards[row].tolist() == pytest.approx(expected + [0.0] * (7 - length), abs=1e-6)


@pytest.mark.detail(17)
def test_scores_are_normalised_then_clipped():
    """Items 17, 18: (score - mean) / std, then the clip, with the share of scores that it changed; the KL comes after it."""
    scores, share = normalize_scores(torch.tensor([2.0, 12.0, 102.0, -98.0]), mean=2.0, std=10.0, clip=5.0)
    assert scores.tolist() == [0.0, 1.0, 5.0, -5.0] and share.item() == 0.5
    scores, share = normalize_scores(torch.tensor([102.0]), mean=2.0, std=10.0, clip=0.0)
    assert scores.tolist() == [10.0] and share.item() == 0.0
    log_probs = torch.full((1, 1), -1.0, requires_grad=True)
    rewards = shaped_rewards(torch.tensor([5.0]), log_probs, torch.full((1, 1), -101.0), torch.ones(1, 1), 1.0)
    assert rewards.item() == -95.0 and not rewards.requires_grad, "a number, not a loss"


@pytest.mark.detail(19)
def test_penalties_of_endings():
    """One for an answer that did not end, whatever its length; and a ramp over the last 4 tokens before the limit of 10."""
    assert missing_end_penalty(torch.ones(2), torch.tensor([True, False]), 0.75).tolist() == [1.0, 0.25]
    lengths = torch.tensor([1, 6, 7, 8, 9, 10])
    found = overlong_penalty(torch.full((6,), 3.0), lengths, limit=10, tokens=4, penalty=2.0)
    assert found.tolist() == [3.0, 3.0, 2.5, 2.0, 1.5, 1.0]
    assert overlong_penalty(torch.ones(6), lengths, 10, 0, 2.0).tolist() == [1.0] * 6


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.detail(29, 30, 39)
def test_policy_loss_and_its_metrics_by_a_plain_loop():
    """Max(-A rho, -A clip(rho)) over valid tokens, with separate bounds; ratio and KL (k2, k3) are summed over these only."""
    batch, total, steps = random_batch(3), 0.0, []
    for token in valid(batch["lengths"]):
        steps.append(float(batch["log_probs"][token] - batch["old_log_probs"][token]))
        ratio, advantage = math.exp(steps[-1]), float(batch["advantages"][token])
        total += max(-advantage * ratio, -advantage * min(max(ratio, 0.9), 1.3))
    tensors = (batch[name] for name in ("log_probs", "old_log_probs", "advantages", "mask"))
    loss, metrics = policy_loss(*tensors, 50.0, clip_low=0.1, clip_high=0.3)
    assert loss.item() == pytest.approx(total / 50.0, rel=1e-5)
    assert metrics["ratio"] == pytest.approx(sum(map(math.exp, steps)), rel=1e-5)
    assert metrics["approx_kl"] == pytest.approx(sum(s * s / 2 for s in steps), rel=1e-5)
    assert metrics["approx_kl_k3"] == pytest.approx(sum(math.exp(s) - 1 - s for s in steps), rel=1e-5)
    assert metrics["ratio_deviation"] == pytest.approx(max(abs(math.exp(s) - 1) for s in steps), rel=1e-5)


@pytest.mark.detail(30, 31)
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0, 3.5])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_where_the_gradient_is_zero(advantage, ratio, dual_clip):
    """Gone iff the token has moved beyond the bound in the direction its advantage asks for (with a dual
    clip also for A < 0 and rho > c), else -A rho; the clip share counts exactly these tokens."""
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    tensors = (torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1))
    loss, metrics = policy_loss(log_probs, *tensors, 1.0, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
    loss.backward()
    beyond = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
    beyond = beyond or (dual_clip is not None and advantage < 0 and ratio > dual_clip)
    assert log_probs.grad.item() == pytest.approx(0.0 if beyond else -advantage * ratio, rel=1e-5)
    assert metrics["clip_share"] == float(beyond)
    assert loss.item() <= (math.inf if dual_clip is None or advantage >= 0 else -dual_clip * advantage + 1e-6)


@pytest.mark.detail(29)
def test_a_far_ratio_stays_finite():
    """The log-ratio is clamped to +-20 before exp, which would overflow at 89."""
    log_probs = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss, metrics = policy_loss(log_probs, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(20.0), rel=1e-5)
    assert log_probs.grad.isfinite().all() and all(math.isfinite(value) for value in metrics.values())


@pytest.mark.detail(34)
def test_the_first_pass_over_fresh_experience():
    """The same log-probabilities give ratio 1 exactly, nothing clipped, no KL, and the policy gradient -A / n."""
    batch = random_batch()
    count = float(batch["lengths"].sum())
    leaf = batch["old_log_probs"].clone().requires_grad_()
    loss, metrics = policy_loss(leaf, batch["old_log_probs"], batch["advantages"], batch["mask"], count)
    loss.backward()
    nothing = {"clip_share": 0.0, "approx_kl": 0.0, "approx_kl_k3": 0.0, "ratio_deviation": 0.0}
    assert metrics == {"ratio": count} | nothing
    expected = torch.where(batch["mask"], -batch["advantages"] / count, 0.0)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.detail(32)
def test_value_loss_by_a_plain_loop():
    """Half the larger of the plain and the clipped square, the half once."""
    batch = random_batch(4)
    total = plain = 0.0
    for i in valid(batch["lengths"]):
        value, old, target = (float(batch[name][i]) for name in ("values", "old_values", "returns"))
        near = min(max(value, old - 0.2), old + 0.2)
        total += max((value - target) ** 2, (near - target) ** 2) / 2
        plain += (value - target) ** 2 / 2
    tensors = (batch["values"], batch["old_values"], batch["returns"], batch["mask"], 10.0)
    assert value_loss(*tensors, clip=0.2).item() == pytest.approx(total / 10.0, rel=1e-5)
    assert value_loss(*tensors, clip=0.0).item() == pytest.approx(plain / 10.0, rel=1e-5)


@pytest.mark.detail(32)
@pytest.mark.parametrize(
    ("value", "target", "moves"),
    [(1.5, 3.0, False), (1.5, 0.0, True), (1.1, 3.0, True), (0.5, -1.0, False), (0.5, 2.0, True)],
)
def test_where_the_critic_stops(value, target, moves):
    """No gradient where the value has moved from V_old = 1 by more than the clip towards the target already."""
    values = torch.tensor([[value]], requires_grad=True)
    value_loss(values, torch.ones(1, 1), torch.tensor([[target]]), torch.ones(1, 1), 1.0, clip=0.2).backward()
    assert values.grad.item() == pytest.approx(value - target if moves else 0.0)


@pytest.mark.detail(33)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_any_split_gives_the_same_gradient(cuts, seed):
    """Micro-batches of any sizes, each trimmed to its own width, add up to the loss and the gradient of the whole
    minibatch, because all divide by the token count of the whole."""
    rows = sum(cuts) + 1
    batch = random_batch(seed, rows=rows)
    count = float(batch["lengths"].sum())

    def gradients(parts: list[slice]) -> list[Tensor]:
        leaves = {name: batch[name].clone().requires_grad_() for name in ("log_probs", "values")}
        total = torch.zeros(2)
        for part in parts:
            width = max(1, int(batch["lengths"][part].max()))
            rows = {name: x[part, :width] if x.dim() == 2 else x[part] for name, x in (batch | leaves).items()}
            pair = torch.stack(losses(rows, count))
            pair.sum().backward()
            total = total + pair.detach()
        return [total, leaves["log_probs"].grad, leaves["values"].grad]

    ends = torch.tensor([*cuts, 1]).cumsum(0).tolist()
    split = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    torch.testing.assert_close(gradients(split), gradients([slice(0, rows)]), rtol=1e-5, atol=1e-6)


@pytest.mark.detail(38)
def test_entropy_is_masked_and_shares_the_denominator():
    """Logsumexp - sum p x equals - sum p log p; the bonus sums over valid tokens, split or whole."""
    hidden, weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.eye(4)
    _, entropy = chunk_log_probs(hidden, torch.zeros(6, dtype=torch.long), weight, None, with_entropy=True)
    probs = hidden.softmax(-1)
    torch.testing.assert_close(entropy, -(probs * probs.log()).sum(-1))
    grid, mask = entropy.view(2, 3).clone(), answer_mask(torch.tensor([2, 1]), 3)
    grid[1, 2] = NAN
    by_hand = float(entropy[0] + entropy[1] + entropy[3]) / 3
    assert masked_mean(grid, mask).item() == pytest.approx(by_hand, rel=1e-5)
    parts = masked_sum(grid[:1], mask[:1]) / 3 + masked_sum(grid[1:], mask[1:]) / 3
    assert parts.item() == pytest.approx(by_hand, rel=1e-5)
