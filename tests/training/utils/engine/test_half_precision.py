"""float16: the loss is scaled under every ZeRO stage; gradients cut off at the largest number keep a step from being taken.

The chip is played: a hook saturates float16 gradients and raises the flag, as the Ascend 910A does. DeepSpeed is real.
"""

import json

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from models.device import DTYPES, PLATFORMS
from training.utils.engine import half_precision
from training.utils.engine.build import build_engine
from training.utils.engine.configs import EngineOptions
from training.utils.engine.extras import extras
from training.utils.engine.state import (
    SavedTensors,
    engine_facts,
    engine_tensors,
    read_engine,
    set_engine_facts,
    write_tensors,
)
from training.utils.engine.step import optimizer_metrics, optimizer_step
from training.utils.engine.weights import trained_weights
from training.utils.flags.steps import SFTArguments
from training.utils.run.deepspeed_internals import as_if_overflowed, has_overflow
from training.utils.run.process_group import join_process_group

LARGEST = torch.finfo(torch.float16).max


class Chip:
    """What torch_npu tells about a 910A."""

    def __init__(self, monkeypatch, seen: bool = True) -> None:
        self.raised, self.cleared = False, 0
        monkeypatch.setattr(half_precision, "saturates", lambda: seen)
        monkeypatch.setattr(half_precision, "clear_overflow_flag", self.clear)
        monkeypatch.setattr(half_precision, "overflow_flag", lambda: self.raised)

    def clear(self) -> None:
        self.raised, self.cleared = False, self.cleared + 1

    def compute(self, gradient: torch.Tensor) -> torch.Tensor:
        self.raised |= not torch.isfinite(gradient).all().item()
        return torch.nan_to_num(gradient, nan=0.0, posinf=LARGEST, neginf=-LARGEST)


class Model(torch.nn.Module):
    """Two weights; the chip computes what flows back into them."""

    def __init__(self, chip: Chip) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.chip = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1), chip
        for parameter in self.parameters():
            parameter.register_hook(chip.compute)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(inputs)
        scores = self.outer(hidden)
        for tensor in (hidden, scores):
            tensor.register_hook(self.chip.compute)
        return scores


class Alone:
    """A run of one process."""

    world_size = 1
    dtype = torch.float16

    @staticmethod
    def agree(loss: float) -> float:
        return loss


@pytest.fixture(scope="module", autouse=True)
def group():
    join_process_group(PLATFORMS["cpu"])
    yield
    dist.destroy_process_group()


@pytest.fixture
def half(monkeypatch):
    """Nobody trains in float16 on a CPU and DeepSpeed refuses it; the arithmetic works."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(type(get_accelerator()), "supported_dtypes", lambda self: list(DTYPES.values()))  # DeepSpeed 0.14


def engine_of(chip: Chip, stage: int, **more):
    args = SFTArguments(
        model_name_or_path="unused", output_dir="unused", learning_rate=0.1, weight_decay=0.0, lr_scheduler_type="constant",
        num_warmup_steps=0, max_grad_norm=0.0, zero_stage=stage, **more,
    )
    return build_engine(Model(chip).half(), EngineOptions.of(args), Alone, steps=10)


def train(engine, *factors: float) -> tuple[dict[str, torch.Tensor], float, float, int]:
    """One optimizer step over a micro-batch for each factor of the loss.

    Returns weights and loss scale before, loss scale after, and the number of steps that were left out so far.
    """
    before, scale = trained_weights(engine, engine.module), engine.optimizer.loss_scale
    inputs = torch.ones(2, 4, dtype=torch.float16)
    optimizer_step(engine, factors, lambda factor: engine(inputs).float().mean() * factor, Alone)
    return before, scale, engine.optimizer.loss_scale, engine.skipped_steps


def moved(engine, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(before[name], value) for name, value in trained_weights(engine, engine.module).items())


SOUND, TOO_LARGE = 1e-3, 50.0   # at the first loss scale, 65536, the second gives gradients of some 800,000


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_small_gradients_move_the_weights_as_in_float32(half, monkeypatch, stage):
    """1e-8 of a gradient is nothing in float16, and something at 65536 times its size."""
    engine = engine_of(Chip(monkeypatch, seen=False), stage)
    exact = Model(Chip(monkeypatch, seen=False))
    optimizer = torch.optim.AdamW(exact.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    if stage == 0:   # DeepSpeed's optimizer takes a step with gradients of zero when it is made
        for parameter in exact.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for factor in (1e-6, 3e-7):
        train(engine, factor)
        optimizer.zero_grad()
        (exact(torch.ones(2, 4)).mean() * factor).backward()
        norm = torch.nn.utils.clip_grad_norm_(exact.parameters(), float("inf"))
        assert optimizer_metrics(engine)["grad_norm"] == pytest.approx(norm.item(), rel=0.02)
        optimizer.step()
    for name, weight in trained_weights(engine, engine.module).items():
        torch.testing.assert_close(weight, exact.get_parameter(name), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_whose_gradients_saturated_is_left_out_and_the_scale_goes_down(half, monkeypatch, stage):
    chip = Chip(monkeypatch)
    engine = engine_of(chip, stage)
    before, *_ = train(engine, SOUND)
    assert moved(engine, before) and engine.skipped_steps == 0
    for count in (1, 2):   # the first uses up DeepSpeed's patience
        before, scale, after, skipped = train(engine, TOO_LARGE)
        assert not moved(engine, before) and skipped == count
    assert after < scale
    before, *_ , skipped = train(engine, SOUND)
    assert moved(engine, before) and skipped == 2, "the step after it is an ordinary one"


def test_one_micro_batch_of_many_is_enough_and_the_next_step_starts_anew(half, monkeypatch):
    chip = Chip(monkeypatch)
    engine = engine_of(chip, 1)
    for order in ((TOO_LARGE, SOUND), (SOUND, TOO_LARGE)):
        before, *_ = train(engine, *order)
        assert not moved(engine, before)
    assert chip.cleared == 4, "before each backward pass"
    before, *_ = train(engine, SOUND, SOUND)
    assert moved(engine, before)


def test_what_overflows_in_the_forward_pass_alone_does_not_count(half, monkeypatch):
    chip = Chip(monkeypatch)
    engine = engine_of(chip, 1)
    engine.module.register_forward_hook(lambda *_: setattr(chip, "raised", True))
    before, *_ = train(engine, SOUND)
    assert moved(engine, before)


def test_without_the_watch_deepspeed_takes_the_step(half, monkeypatch):
    """Why the watch is there: no infinity is found, and weights move by gradients that were cut off."""
    engine = engine_of(Chip(monkeypatch, seen=False), 1)
    assert extras(engine).saturation is None
    before, *_, skipped = train(engine, TOO_LARGE)
    assert moved(engine, before) and skipped == 0


def test_the_watch_is_still_there_after_a_step_that_was_left_out_for_another_engine(half, monkeypatch):
    chip = Chip(monkeypatch)
    engine = engine_of(chip, 0)
    with as_if_overflowed(engine.optimizer):
        before, scale, after, skipped = train(engine, SOUND)
    assert not moved(engine, before) and (after, skipped) == (scale, 1)
    assert not has_overflow(engine.optimizer)
    extras(engine).saturation.seen = True
    assert has_overflow(engine.optimizer)


@pytest.mark.parametrize(("then", "now"), [(0, 0), (1, 3), (3, 2), (2, 1), (0, 2), (3, 0)])
def test_the_loss_scale_goes_on_where_the_checkpoint_left_it(half, monkeypatch, tmp_path, then, now):
    """Saved after overflows and resumed under another ZeRO stage: the steps, the scale and its next changes are the same."""
    (tmp_path / "ds.json").write_text('{"fp16": {"loss_scale_window": 3}}')
    chip, more = Chip(monkeypatch), {"deepspeed_config": str(tmp_path / "ds.json")}
    whole, resumed = engine_of(chip, then, **more), engine_of(chip, now, **more)
    first = whole.optimizer.loss_scale
    for factor in (SOUND, TOO_LARGE, TOO_LARGE, TOO_LARGE):
        train(whole, factor)
    assert whole.optimizer.loss_scale < first and whole.skipped_steps == 3
    list(write_tensors(tmp_path, 0, engine_tensors(whole, keeps_disk=True)))
    read_engine(resumed, SavedTensors(tmp_path))
    set_engine_facts(resumed, json.loads(json.dumps(engine_facts(whole))), resized=False)
    kind = bool(then) == bool(now)  # without ZeRO there is no patience, and DeepSpeed counts to the window otherwise
    scales = set()
    for factor in (SOUND, SOUND, SOUND, SOUND, TOO_LARGE, TOO_LARGE, SOUND) if kind else (SOUND, SOUND):
        of_whole, of_resumed = train(whole, factor), train(resumed, factor)
        assert of_resumed[1:] == of_whole[1:]
        scales.add(of_whole[2])
        for name, weight in trained_weights(whole, whole.module).items():
            torch.testing.assert_close(trained_weights(resumed, resumed.module)[name], weight, rtol=1e-3, atol=1e-3)
    assert len(scales) > 1 or not kind, "the scale has risen and fallen"
