"""The learning rates are those of transformers' schedules."""

from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from training.utils.engine.schedule import rate_share
from training.utils.flags.common import Schedule

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 7)])
def test_rates_are_those_of_transformers(schedule, warmup, total):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total + 3):
        (share,) = (known(step) for known in theirs.lr_lambdas)
        assert rate_share(schedule, step, warmup, total) == pytest.approx(share, rel=1e-12), step
