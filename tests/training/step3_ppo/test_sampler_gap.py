"""Before the first update the sampler and the training forward must agree; if they do not, a run says so once."""

import logging

import pytest
import torch

from training.step3_ppo.rollout import SAMPLER_GAP, SAMPLER_GAP_HALF, warn_of_sampler

pytestmark = pytest.mark.ppo


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
    """Item 34, at the start of each run: |log p| of sampler and training forward, 1e-3 in float32, 5e-2 in half."""
    said = []
    monkeypatch.setattr(logging.getLogger("sanbu"), "warning", said.append)
    warn_of_sampler(gap, dtype)
    assert bool(said) is warned
    assert all("--attn_implementation eager" in sentence for sentence in said)
