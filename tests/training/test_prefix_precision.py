"""Under bf16 a prefix starts, moves and is handed over in float32; the network computes with its rounded copy."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models.heads import TokenLogProbs
from models.load import load_causal_lm
from training.utils.engine.build import build_engine
from training.utils.engine.configs import EngineOptions
from training.utils.engine.step import optimizer_step
from training.utils.engine.weights import trained_weights, whole_model
from training.utils.flags.steps import SFTArguments
from training.utils.run.process_group import Run

STAGES = (0, 1, 2, 3)


def train(base: Path, stage: int, output: Path) -> dict[str, torch.Tensor]:
    """The prefix as loaded, in the optimizer before and after training, and the module's own copy at the end."""
    args = SFTArguments(
        model_name_or_path=str(base), output_dir=str(output), zero_stage=stage, learning_rate=1e-3, dtype="bf16"
    )
    run = Run.start(args)
    options = EngineOptions.of(args)
    zero3 = options.loading_config(run)
    model = load_causal_lm(base, dtype=run.dtype, zero3_config=zero3, pre_seq_len=5)
    (name,) = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    loaded = model.get_parameter(name).detach().clone()
    engine = build_engine(TokenLogProbs(model), options, run, steps=3)
    started = trained_weights(engine, model)[name]
    ids = torch.arange(10, 28).view(2, 9)
    for _ in range(3):
        optimizer_step(engine, [ids], lambda batch: -engine(batch, torch.ones_like(batch)).mean(), run)
    with whole_model(engine) as whole:
        computed = whole.model.get_parameter(name).detach().clone()
    return {"loaded": loaded, "started": started, "trained": trained_weights(engine, model)[name], "computed": computed}


@pytest.fixture(scope="module")
def results(llama, tmp_path_factory):
    yield {stage: train(llama, stage, tmp_path_factory.mktemp("precision")) for stage in STAGES}
    dist.destroy_process_group()


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
