"""One process trains a prefix for three steps in bf16 under every ZeRO stage; test_prefix_precision.py looks at the result."""

import sys
from pathlib import Path

import torch

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


def main() -> None:
    """Arguments: the checkpoint, and the folder for the results."""
    base, output = map(Path, sys.argv[1:3])
    for stage in STAGES:
        torch.save(train(base, stage, output), output / f"{stage}.pt")


if __name__ == "__main__":
    main()
