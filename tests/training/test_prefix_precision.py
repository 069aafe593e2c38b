"""Under bf16 a prefix starts, moves and is handed over in float32; the network computes with its rounded copy."""

import pytest
import torch

from tests.launching import succeed
from tests.tiny import tiny_checkpoint
from tests.training.prefix_worker import STAGES

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    succeed("tests.training.prefix_worker", [str(tiny_checkpoint(folder / "base", "llama")), str(folder)])
    return {stage: torch.load(folder / f"{stage}.pt") for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizer_holds_the_prefix_in_float32(results, stage):
    found = results[stage]
    assert {found[name].dtype for name in ("loaded", "started", "trained")} == {torch.float32}
    assert torch.equal(found["started"], found["loaded"])  # not rounded on the way in
    assert not torch.equal(found["loaded"].bfloat16().float(), found["loaded"])
    moved = (found["trained"] - found["loaded"]).abs()
    assert (moved > 0).float().mean() > 0.9 and moved.max() < 5e-3  # by three steps of a rate of at most 1e-3
    assert found["computed"].dtype == torch.bfloat16
    assert torch.equal(found["computed"], found["trained"].bfloat16())


def test_every_stage_starts_from_the_same_prefix(results):
    for stage in STAGES[1:]:
        assert torch.equal(results[stage]["loaded"], results[0]["loaded"])
        torch.testing.assert_close(results[stage]["trained"], results[0]["trained"], atol=2e-3, rtol=0)
