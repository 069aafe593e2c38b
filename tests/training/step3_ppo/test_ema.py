"""The moving average of the actor, in float32 from what the optimizer moves, against the formula as a plain loop."""

import pytest
import torch

from errors import UserError
from models.load import load_causal_lm
from tests.training.step3_ppo.small_ppo import build, parsed, rollout
from training.utils.engine.checkpoint import Checkpoint, export
from training.utils.engine.weights import trained_weights

pytestmark = pytest.mark.ppo
DECAY = 0.8


def averaged(models, output, *flags):
    return build(models, output, "--enable_ema", "--ema_decay", str(DECAY), *flags)


def now(trainer) -> dict[str, torch.Tensor]:
    return trained_weights(trainer.engine.actor, trainer.engine.actor.module.model)


CASES = [("fp32", 0, 0), ("fp32", 2, 0), ("fp32", 3, 0), ("bf16", 0, 0), ("bf16", 1, 0), ("bf16", 3, 4)]


@pytest.mark.detail(46)
@pytest.mark.parametrize(("dtype", "stage", "lora"), CASES)
def test_equals_the_plain_loop_over_the_weights_after_each_step(models, tmp_path, dtype, stage, lora):
    rate = " --actor_lora_learning_rate 1e-3" if lora else ""
    trainer = averaged(models, tmp_path, f"--dtype {dtype} --actor_zero_stage {stage} --actor_lora_dim {lora}{rate}")
    expected = {name: value.double() for name, value in now(trainer).items()}
    start = {name: value.clone() for name, value in expected.items()}
    for number in (1, 2, 3):
        trainer.train_rlhf(rollout(trainer, number), number)
        for name, value in now(trainer).items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * value.double()
    found = trainer.engine.actor_ema.weights()
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found) == bool(lora)
    for name, value in found.items():
        assert value.dtype == torch.float32 and value.device.type == "cpu"
        torch.testing.assert_close(value.double(), expected[name], atol=1e-8, rtol=3e-7)
    assert any(not torch.equal(start[name], expected[name]) for name in start)


def test_weights_that_rest_and_skipped_steps_move_no_average(models, tmp_path, monkeypatch):
    """To the last bit."""
    rests = averaged(models, tmp_path / "rests", "--actor_learning_rate 0")
    skips = averaged(models, tmp_path / "skips")
    monkeypatch.setattr(skips.engine.actor, "was_step_applied", lambda: False)
    for trainer in (rests, skips):
        start = now(trainer)
        for number in (1, 2):
            trainer.train_rlhf(rollout(trainer, number), number)
        assert all(torch.equal(start[name], value) for name, value in trainer.engine.actor_ema.weights().items())


@pytest.mark.parametrize("lora", [0, 4])
def test_saved_as_a_model_of_its_own_while_the_actor_stays(models, tmp_path, lora):
    trainer = averaged(models, tmp_path, "--actor_lora_dim", str(lora))
    engine, run = trainer.engine, trainer.run
    trainer.train_rlhf(rollout(trainer, 1), 1)
    actor = now(trainer)
    export(engine.actor, engine.tokenizer, engine.template, tmp_path / "actor", run)
    export(engine.actor, engine.tokenizer, engine.template, tmp_path / "ema", run, engine.actor_ema.weights())
    assert all(torch.equal(actor[name], value) for name, value in now(trainer).items())
    assert (tmp_path / "ema" / "adapter").is_dir() == bool(lora)
    start, last, average = (
        load_causal_lm(folder, dtype=torch.float32).state_dict() for folder in (models[0], tmp_path / "actor", tmp_path / "ema")
    )
    if lora:
        assert not torch.equal(last["model.layers.0.self_attn.q_proj.weight"], average["model.layers.0.self_attn.q_proj.weight"])
        return
    for name, value in average.items():   # one step: the average is the mixture of its two ends
        torch.testing.assert_close(value, DECAY * start[name] + (1 - DECAY) * last[name], atol=1e-7, rtol=1e-6)


def test_an_average_of_other_parameters_is_refused(models, tmp_path):
    whole = averaged(models, tmp_path)
    Checkpoint(whole.run, {}, {}, {}, averages={"actor_ema": whole.engine.actor_ema}).save(2)
    small = averaged(models, tmp_path, "--resume --actor_lora_dim 4")
    with pytest.raises(UserError, match=r"actor_ema lacks \d+ elements .average. of .*lora"):
        Checkpoint(small.run, {}, {}, {}, averages={"actor_ema": small.engine.actor_ema}).resume()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--ema_decay 0.9", "--ema_decay has no effect without --enable_ema"),
        ("--enable_ema --ema_decay 1.0", "--ema_decay 1.0: must be 0 or more and less than 1"),
    ],
)
def test_flags(words, sentence):
    with pytest.raises(UserError, match=sentence):
        parsed(words)
