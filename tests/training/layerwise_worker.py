"""Two processes under ZeRO-3 answer prompts with gathered and with split weights; test_layerwise.py compares."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from inference.engine import generate_many
from models.adapters.lora import add_lora
from models.heads import TokenLogProbs, base_model
from models.load import load_causal_lm
from tests.models.test_chatglm import TINY
from tests.models.test_chatglm import prompts as chatglm_prompts
from training.utils.engine.build import build_engine, build_frozen
from training.utils.engine.configs import EngineOptions
from training.utils.engine.step import optimizer_step
from training.utils.engine.weights import layerwise, whole_model
from training.utils.flags.steps import SFTArguments
from training.utils.run.process_group import Run

LENGTHS = ((5, 2, 9, 1, 7), (4, 3))  # prompts of each process: not equally many
STOPS = range(8, 90)
SETTINGS = {"max_new_tokens": 10, "stop_token_ids": STOPS, "pad_token_id": 3, "temperature": 3.0}


@dataclass(frozen=True)
class Case:
    """A family, what is trained, the size up to which DeepSpeed keeps weights whole, frozen: an engine that never trains."""

    family: str
    trained: str = "all"  # all | lora | prefix
    persist: int = 0
    frozen: bool = False

    @property
    def name(self) -> str:
        return f"{self.family}-{self.trained}-{self.persist}{'-frozen' * self.frozen}"


CASES = [
    Case("llama"), Case("opt", "lora", 500), Case("bloom", frozen=True), Case("chatglm-6b", "prefix", 500),
    Case("chatglm2-6b", "prefix"),
]  # fmt: skip


def questions(family: str, rank: int) -> list[list[int]]:
    """The prompts of a process."""
    if family in TINY:
        return chatglm_prompts(family, LENGTHS[rank])
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(8, 400, (length,), generator=generator).tolist() for length in LENGTHS[rank]]


def answers(model, family: str, rank: int) -> dict[str, list]:
    """Greedy and sampled answers, two at once, with seeds that belong to prompt and process."""
    prompts = questions(family, rank)
    found = {}
    for greedy in (True, False):
        seeds = [10 * rank + row for row in range(len(prompts))]
        made = generate_many(model, prompts, max_batch=2, row_seeds=seeds, greedy=greedy, **SETTINGS)
        found["greedy" if greedy else "sampled"] = (made.sequences, made.lengths, made.log_probs)
    return found


def one_case(case: Case, folder: Path) -> dict:
    """What gathered and split weights answer, how much of the weights was whole meanwhile, and that training goes on."""
    config = folder / f"persist-{case.persist}.json"
    args = SFTArguments(
        model_name_or_path=str(folder / case.family), output_dir=str(folder / "out"), zero_stage=3, learning_rate=1e-3,
        dtype="fp32", deepspeed_config=str(config),
    )  # fmt: skip
    run, options = Run.start(args), EngineOptions.of(args)
    zero3 = options.loading_config(run)
    prefix = {"pre_seq_len": 5} if case.trained == "prefix" else {}
    model = load_causal_lm(args.model_name_or_path, dtype=run.dtype, zero3_config=zero3, seed=1, **prefix)
    if case.trained == "lora":
        torch.manual_seed(0)
        model = add_lora(model, 4, 8)
    if case.frozen:
        engine = build_frozen(TokenLogProbs(model), run, stage=3, offload=False)
    else:
        engine = build_engine(TokenLogProbs(model), options, run, steps=3)
    ids = torch.tensor(chatglm_prompts(case.family, (7, 7)) if case.family in TINY else [[*range(10, 19)], [*range(20, 29)]])
    losses = []

    def learn() -> None:
        if not case.frozen:
            engine.train()
            losses.append(optimizer_step(engine, [ids], lambda batch: -engine(batch, torch.ones_like(batch)).mean(), run))

    def score() -> torch.Tensor:
        engine.eval()
        with torch.no_grad():
            return engine(ids, torch.ones_like(ids))

    learn()
    before = score()
    with whole_model(engine) as whole:
        gathered = answers(whole.model, case.family, run.rank)
    parameters = list(engine.module.parameters())
    passes, whole_now = [], []
    hooks = [base_model(model).register_forward_hook(lambda *_: passes.append(1))]
    for module in model.modules():  # behind DeepSpeed's own hooks: what is whole when a layer runs
        hooks.append(module.register_forward_pre_hook(lambda *_: whole_now.append(sum(p.numel() for p in parameters))))
    with layerwise(engine) as split:
        fetched = answers(split.model, case.family, run.rank)
    for hook in hooks:
        hook.remove()
    after = score()
    learn()
    largest = max(sum(p.ds_numel for p in module.parameters(recurse=False)) for module in model.modules())
    return {
        "gathered": gathered, "layerwise": fetched, "scores": (before, after), "losses": losses, "passes": len(passes),
        "whole": max(whole_now), "total": sum(p.ds_numel for p in parameters), "largest": largest,
        "persisted": sum(p.ds_numel for p in parameters if p.ds_persist or (case.trained == "prefix" and p.requires_grad)),
    }  # fmt: skip


def turns(run: Run) -> list[float]:
    """When this process was inside, in its turn and then not in turn."""
    times = []
    for needed in (True, False):
        run.barrier()
        with run.in_turn(needed):
            times.append(time.monotonic())
            time.sleep(0.3)
            times.append(time.monotonic())
    return times


def main() -> None:
    """Argument: the folder with the checkpoints, which gets the results."""
    folder = Path(sys.argv[-1])
    run = Run.start(SFTArguments(model_name_or_path="none", output_dir=str(folder / "out"), dtype="fp32"))
    torch.save(turns(run), folder / f"turns-{run.rank}.pt")
    for case in CASES:
        found = one_case(case, folder)
        torch.save(found, folder / f"{case.name}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
