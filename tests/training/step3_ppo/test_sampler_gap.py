"""Before the first update the sampler and the training forward must agree; if they do not, a run says so once. Where they
do in float32, later rollouts spare the forward.
"""

import json
import logging

import pytest
import torch

from tests.training.step3_ppo.small_ppo import build, rollout
from training.step3_ppo import rollout as module
from training.step3_ppo.rollout import SAMPLER_GAP, SAMPLER_GAP_HALF, warn_of_sampler

pytestmark = pytest.mark.ppo


@pytest.mark.detail(49)
@pytest.mark.parametrize(
    ("gap", "dtype", "warned"),
    [
        (SAMPLER_GAP / 2, torch.float32, False),
        (SAMPLER_GAP * 2, torch.float32, True),
        (SAMPLER_GAP * 2, torch.bfloat16, False),
        (SAMPLER_GAP_HALF * 2, torch.float16, True),
        (float("nan"), torch.float32, True),
    ],
)
def test_a_gap_beyond_rounding_is_told(gap, dtype, warned, monkeypatch):
    """At the start of each run: |log p| of sampler and training forward, 1e-3 in float32, 5e-2 in half."""
    said = []
    monkeypatch.setattr(logging.getLogger("sanbu"), "warning", said.append)
    warn_of_sampler(gap, dtype)
    assert bool(said) is warned
    assert all("--attn_implementation eager" in sentence for sentence in said)


def forwards(trainer) -> list[bool]:
    """Grows by an entry with each forward of the actor's engine that keeps no graph."""
    found: list[bool] = []
    trainer.engine.actor.module.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else found.append(True))
    return found


@pytest.mark.detail(34)
def test_later_rollouts_take_the_sampler_s_log_probs_and_a_resumed_run_does_as_well(models, tmp_path):
    """Against a run that computes them again."""
    trainer, plain = build(models, tmp_path), build(models, tmp_path / "plain", "--old_log_probs", "forward")
    calls, plain_calls = forwards(trainer), forwards(plain)
    for number in (1, 2, 3):
        found, expected = rollout(trainer, number), rollout(plain, number)
        assert (len(calls), len(plain_calls)) == (1, number), "the first rollout is looked at, and no other"
        torch.testing.assert_close(found.old_log_probs, expected.old_log_probs, atol=1e-5, rtol=0)
        assert torch.equal(found.old_log_probs, found.log_probs if number > 1 else expected.old_log_probs)
        assert ("sampler_gap" in found.metrics) is (number == 1)
        assert trainer.train_rlhf(found, number)["first_ratio_deviation"] < 1e-5
        plain.train_rlhf(expected, number)
    resumed = build(models, tmp_path / "resumed")
    resumed.load_state_dict(json.loads(json.dumps(trainer.state_dict())))
    calls = forwards(resumed)
    again = rollout(resumed, 4)
    assert len(calls) == 1, "a process looks once"
    assert "sampler_gap" not in again.metrics, "curves of a resumed run have no point more"
    assert torch.equal(again.old_log_probs, again.log_probs)


def test_a_sampler_that_differs_is_not_trusted(models, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRUSTED_GAP", 0.0)
    trainer = build(models, tmp_path)
    calls = forwards(trainer)
    for number in (1, 2):
        experience = rollout(trainer, number)
        assert len(calls) == number and experience.sampler_gap > 0
        assert not torch.equal(experience.old_log_probs, experience.log_probs)
