"""Details of PPO that no other file shows: half precision, optimizers, statistics of the reward model, what training leaves
alone - and that docs/en/ppo.md names code and tests that exist.
"""

import re
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

from scripts.docs import ppo_details
from tests.training.step3_ppo.small_ppo import build, rollout, write_models
from training.step3_ppo.ppo_trainer import assign_advantages
from training.step3_ppo.rlhf_engine import score_unit

pytestmark = pytest.mark.ppo


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    yield write_models(tmp_path_factory.mktemp("models"))
    if dist.is_initialized():
        dist.destroy_process_group()


def tensors(experience) -> dict[str, torch.Tensor]:
    found = {part.name: getattr(experience, part.name) for part in fields(experience)}
    return {name: value.clone() for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.detail(34, 45)
def test_in_half_precision(models, tmp_path):
    """bf16 may round the first ratio and the first KL, no more: old and new come from the same kernels."""
    trainer = build(models, tmp_path, "--dtype", "bf16")
    experience = rollout(trainer, 1)
    assert abs(experience.metrics["kl"]) < 1e-3
    metrics = trainer.train_rlhf(experience, 1)
    assert metrics["first_ratio_deviation"] < 1e-2 and metrics["clip_share"] == 0.0


def test_training_changes_nothing_in_the_rollout(models, tmp_path):
    """A rollout is read, never written: earlier systems zeroed its values in place and computed advantages again each time."""
    trainer = build(models, tmp_path, "--ppo_epochs", "2", "--per_device_training_batch_size", "2")
    experience = rollout(trainer, 1)
    before = tensors(experience)
    trainer.train_rlhf(experience, 1)
    after = tensors(experience)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assign_advantages(experience, trainer.engine, trainer.args)
    again = tensors(experience)
    assert all(torch.equal(before[name], again[name]) for name in before), "twice is the same as once"


@pytest.mark.detail(6)
def test_prompt_tokens_count_nowhere(models, tmp_path):
    """Every field of a rollout but the ids and their mask is as wide as the answers; metrics come from these alone."""
    trainer = build(models, tmp_path)
    trainer.train_rlhf(rollout(trainer, 1), 1)
    experience = rollout(trainer, 2)
    width = experience.action_mask.shape[1]
    for name, value in tensors(experience).items():
        if value.dim() == 2 and name not in ("input_ids", "attention_mask", "parts"):
            assert value.shape[1] == width, name
            assert name == "log_probs" or (value[~experience.action_mask] == 0).all(), name
    assert int(experience.action_mask.sum()) == int(experience.answer_lengths.sum())
    kl = sum(
        float(experience.old_log_probs[row, t] - experience.ref_log_probs[row, t])
        for row, length in enumerate(experience.answer_lengths.tolist()) for t in range(length)
    )  # fmt: skip
    assert experience.metrics["kl"] == pytest.approx(kl / len(experience), abs=1e-5)


@pytest.mark.detail(18)
def test_scores_are_normalised_by_what_the_reward_model_stores(models, tmp_path):
    """By mean and spread in its config.json; a reward model without them, or --normalize_reward false, as it is. The network
    itself gives raw scores: nothing is normalised where it is trained.
    """
    config = AutoConfig.from_pretrained(models[1])
    assert score_unit(config, True) == (0.3, 1.7) and score_unit(config, False) == (0.0, 1.0)
    del config.reward_std
    assert score_unit(config, True) == (0.0, 1.0)
    raw = build(models, tmp_path / "raw", "--normalize_reward", "false", "--clip_reward_value", "0", "--missing_eos_penalty", "0")
    unit = build(models, tmp_path / "unit", "--clip_reward_value", "0", "--missing_eos_penalty", "0")
    first, second = rollout(raw, 1), rollout(unit, 1)
    assert torch.equal(first.scores, second.scores), "Experience keeps the reward model's own unit"
    torch.testing.assert_close(second.rewards.sum(1), (first.rewards.sum(1) - 0.3) / 1.7, atol=1e-5, rtol=1e-5)


@pytest.mark.detail(41)
def test_optimizers_of_actor_and_critic(models, tmp_path):
    """Separate rates and decays, none for biases and norms, gradients clipped, betas and epsilon as the flags say."""
    trainer = build(
        models, tmp_path, "--actor_learning_rate", "1e-5", "--critic_learning_rate", "7e-5", "--actor_weight_decay", "0.1",
        "--adam_epsilon", "1e-5", "--max_grad_norm", "0.5",
    )  # fmt: skip
    for role, rate, decay in (("actor", 1e-5, 0.1), ("critic", 7e-5, 0.0)):
        engine = trainer.engine.trained[role]
        groups = engine.optimizer.param_groups
        assert {group["initial_lr"] for group in groups} == {rate}
        for group in groups:
            assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-5
            dimensions = {parameter.dim() >= 2 for parameter in group["params"]}
            assert dimensions == {True} or group["weight_decay"] == 0.0
        assert max(group["weight_decay"] for group in groups) == decay
        assert engine.gradient_clipping() == 0.5


def test_the_documentation_names_what_exists(repository):
    """The table of docs/en/ppo.md has items 1 to 50, each with the tests that carry its number, and files that are there."""
    assert ppo_details.main(["--check"]) == 0
    assert sorted(ppo_details.tests_by_detail()) == list(range(1, 51))
    text = (repository / "docs/en/ppo.md").read_text(encoding="utf-8")
    assert [int(number) for number, _ in ppo_details.ROW.findall(text)] == list(range(1, 51))
    for path in re.findall(r"`((?:training|models|inference|tests|docs)/[\w/.-]+\.(?:py|md))", text):
        assert (repository / path).exists(), path
    for file in re.findall(r"`(\w+\.py)`", text):
        assert (repository / "training" / "step3_ppo" / file).exists(), file
