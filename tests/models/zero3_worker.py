"""Two processes under ZeRO-3 train tiny models through the heads; test_zero3.py compares with one plain process."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.adapters.lora import add_lora, merged_state_dict
from models.heads import TokenLogProbs, TokenScores, at_last_token
from models.load import load_causal_lm, load_scalar_model
from models.save import save_model
from models.tokenizer import load_tokenizer
from tests.models.common import Stops
from training.utils.run.deepspeed_internals import forget_shared_memory_collectives, wait_for_all_gathers

STEPS = 2
LEARNING_RATE = 0.003


@dataclass(frozen=True)
class Case:
    """A checkpoint's family, which head, with LoRA or not, with gradient checkpointing or not, --quantization_bit."""

    family: str
    scalar: bool
    lora: bool
    recompute: bool
    bits: int = 0

    @property
    def name(self) -> str:
        kinds = [*["lora"] * self.lora, *[f"{self.bits}bit"] * bool(self.bits)]
        return "-".join([self.family, "scalar" if self.scalar else "causal", *kinds])


# Between them: each head with and without LoRA, Conv1D, both numbers of bits, integers made here and stored ones.
CASES = [
    Case("opt", scalar=False, lora=False, recompute=True),
    Case("qwen2", scalar=True, lora=False, recompute=False),
    Case("llama", scalar=False, lora=True, recompute=True, bits=8),
    Case("gpt2", scalar=True, lora=True, recompute=True),
    Case("chatglm2-int4", scalar=False, lora=True, recompute=True),
]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Four rows of twelve tokens and which of them are targets; in the last step the second half has none."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(7, 390, (4, 12), generator=generator)
    targets = torch.rand(4, 12, generator=generator) < torch.tensor([0.2, 0.2, 0.9, 0.9])[:, None]
    targets[:, 0] = False
    if step == STEPS - 1:
        targets[2:] = False
    return ids, targets


def load(case: Case, folder: Path, **options) -> torch.nn.Module:
    """The model of a case, the same on every process."""
    read = load_scalar_model if case.scalar else load_causal_lm
    options |= {"gradient_checkpointing": case.recompute, "quantization_bit": case.bits}
    model = read(folder / case.family, dtype=torch.float32, **options)
    torch.manual_seed(0)
    return add_lora(model, 4, 8) if case.lora else model


def train(case: Case, folder: Path) -> None:
    """Train one case under ZeRO-3; rank 0 saves the losses and the model."""
    import deepspeed
    import torch.distributed as dist

    rank = dist.get_rank()
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 40},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # the default is 1.0
    }
    model = load(case, folder, zero3_config=config)
    # four rows of logits at a time: the processes have different numbers of chunks
    head = TokenScores(model) if case.scalar else TokenLogProbs(model, chunk_logits=4 * 408)
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=head, optimizer=optimizer, config=config)
    losses = []
    for step in range(STEPS):
        ids, targets = batch(step)
        mine = slice(2 * rank, 2 * rank + 2)
        ids, wanted, mask = ids[mine], targets[mine], torch.ones_like(ids[mine])
        if rank == 1:  # other shapes as well
            ids, wanted, mask = (torch.nn.functional.pad(t, (0, 3)) for t in (ids, wanted, mask))
        if case.scalar:
            loss = (at_last_token(engine(ids, mask), mask) - 1).square().sum() / 4
        else:
            loss = -engine(ids, mask, target_mask=wanted).sum() / targets.sum()
        engine.backward(loss * 2)  # gradients are averaged over the two processes
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total)
    buffers = dict(model.named_buffers())
    state = {name: buffers[name] for name in model.state_dict() if name in buffers}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            state[name] = parameter.detach().clone()
    if rank == 0:
        state = merged_state_dict(model, state)
        tokenizer = load_tokenizer(folder / ("llama" if "chatglm" in case.family else case.family))
        save_model(model, tokenizer, Stops(), folder / case.name, state)
        torch.save(torch.stack(losses), folder / f"{case.name}.pt")
    dist.barrier()


def main() -> None:
    """Train every case; the argument is the folder with the checkpoints."""
    import deepspeed
    import torch.distributed as dist

    forget_shared_memory_collectives()
    wait_for_all_gathers()
    deepspeed.init_distributed("gloo", verbose=False)
    for case in CASES:
        train(case, Path(sys.argv[-1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
