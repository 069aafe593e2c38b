"""Under fp16, an overflow of the actor or of the critic keeps both from their step, weights and schedules alike.

Nobody trains in fp16 on a CPU, and DeepSpeed and we refuse it; the refusals are taken away here, the arithmetic works.
"""

import pytest
import torch
from deepspeed.accelerator import get_accelerator

import training.utils.run.process_group
from tests.training.step3_ppo.small_ppo import build, rollout
from training.utils.engine.weights import trained_weights

pytestmark = pytest.mark.ppo
OTHER = {"actor": "critic", "critic": "actor"}


@pytest.fixture
def half(models, tmp_path, monkeypatch):
    """Builds trainers in fp16."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(training.utils.run.process_group, "resolve_dtype", lambda *_: torch.float16)

    def trainer(stage: int, *flags: str):
        stages = f"--actor_zero_stage {stage} --critic_zero_stage {stage}"
        return build(models, tmp_path, "--dtype fp16 --enable_ema", stages, *flags)

    return trainer


def state(engine) -> tuple:
    """Weights as the optimizer has them, learning rate, loss scale, steps left out."""
    return trained_weights(engine, engine.module.model), engine.get_lr(), engine.optimizer.loss_scale, engine.skipped_steps


def moved(before: tuple, after: tuple) -> bool:
    """Whether weights and learning rate moved: both or neither."""
    weights = any(not torch.equal(before[0][name], value) for name, value in after[0].items())
    assert weights == (before[1] != after[1])
    return weights


def train_with_overflow(trainer, role: str, number: int, monkeypatch) -> None:
    """One step whose loss is finite but has gradients of one role that fp16 cannot hold."""
    plain = getattr(trainer, f"_{role}_loss")
    larger = lambda found: (found[0] * 1e9, found[1]) if isinstance(found, tuple) else found * 1e9  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(trainer, f"_{role}_loss", lambda *arguments: larger(plain(*arguments)))
        trainer.train_rlhf(rollout(trainer, number), number)


@pytest.mark.detail(42)
@pytest.mark.parametrize(("stage", "role"), [(0, "actor"), (1, "critic"), (2, "actor"), (3, "critic")])
def test_neither_steps_when_one_overflows(half, monkeypatch, stage, role):
    trainer = half(stage, "--align_overflow")
    engines = {"actor": trainer.engine.actor, "critic": trainer.engine.critic}
    before = {name: state(engine) for name, engine in engines.items()}
    average = trainer.engine.actor_ema.weights()
    # Twice: the first overflow uses up DeepSpeed's patience, the second lowers the scale. The same rollout, because in another
    # the gradients of the role that should be sound may be too large for the first scale.
    for number in (1, 1):
        train_with_overflow(trainer, role, number, monkeypatch)
    after = {name: state(engine) for name, engine in engines.items()}
    for name in engines:
        assert not moved(before[name], after[name]) and after[name][3] == 2
    assert after[role][2] < before[role][2]
    assert after[OTHER[role]][2] == before[OTHER[role]][2], "its gradients were sound"
    assert all(torch.equal(average[name], value) for name, value in trainer.engine.actor_ema.weights().items())

    trainer.train_rlhf(rollout(trainer, 3), 3)
    for name, engine in engines.items():
        assert moved(after[name], state(engine)) and engine.skipped_steps == 2, "the step after it is an ordinary one"


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_without_the_flag_the_other_one_steps(half, monkeypatch, role):
    trainer = half(1)
    before = {name: state(getattr(trainer.engine, name)) for name in OTHER}
    train_with_overflow(trainer, role, 1, monkeypatch)
    after = {name: state(getattr(trainer.engine, name)) for name in OTHER}
    assert not moved(before[role], after[role])
    assert moved(before[OTHER[role]], after[OTHER[role]])


def test_without_overflow_the_flag_changes_nothing(half):
    plain, aligned = half(2), half(2, "--align_overflow")
    for trainer in (plain, aligned):
        for number in (1, 2):
            trainer.train_rlhf(rollout(trainer, number), number)
    for role in OTHER:
        first, second = (state(getattr(trainer.engine, role)) for trainer in (plain, aligned))
        assert all(torch.equal(first[0][name], value) for name, value in second[0].items()) and first[1:] == second[1:]
