"""Models and process group of the tests of step 3."""

import pytest
import torch.distributed as dist

from tests.training.step3_ppo.small_ppo import write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An actor and a reward model; the process group that engines open is left at the end of the file."""
    yield write_models(tmp_path_factory.mktemp("models"))
    if dist.is_initialized():
        dist.destroy_process_group()
