"""The choices that the flags of step 3 leave - methods without a critic, KL in the loss, warm-up, early stop, penalties -
with real models and engines. tests/training/test_steps.py has whole runs.
"""

import json
import logging
from dataclasses import replace

import pytest
import torch

from errors import UserError
from tests.closeness import assert_close
from tests.training.step3_ppo.small_ppo import build, hand_written, parsed, rollout, unchanged, weights
from training.step3_ppo import rollout as rollout_module
from training.step3_ppo.experience import Experience
from training.step3_ppo.ppo_trainer import DeepSpeedPPOTrainer, assign_advantages
from training.step3_ppo.rollout import complete_experience

pytestmark = pytest.mark.ppo
PIECES = "--per_device_training_batch_size 2 --gradient_accumulation_steps 2"
GROUPS = "--num_return_sequences 3 --per_device_training_batch_size 12"


# --- methods without a critic -----------------------------------------------------------------------------------------


@pytest.mark.detail(28)
@pytest.mark.parametrize("method", ["grpo", "rloo", "reinforce++"])
def test_without_a_critic(models, tmp_path, method):
    trainer = build(models, tmp_path, f"--advantage {method} {GROUPS} --kl_coef 0.1")
    engine = trainer.engine
    assert engine.critic is None and list(engine.trained) == ["actor"] and engine.reward is not None
    experience = rollout(trainer, 1)
    assert len(experience) == 12 and experience.values is None and experience.returns is None
    assert experience.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert experience.index.tolist() == experience.group.tolist()
    totals = experience.rewards.sum(1).view(4, 3)
    first = experience.advantages[:, 0].view(4, 3)
    if method == "rloo":
        torch.testing.assert_close(first, 1.5 * (totals - totals.mean(1, keepdim=True)), atol=1e-4, rtol=1e-4)
    elif method == "grpo":
        spread = totals.std(1, keepdim=True, unbiased=False)
        torch.testing.assert_close(first, (totals - totals.mean(1, keepdim=True)) / (spread + 1e-4), atol=1e-3, rtol=1e-3)
    else:
        mask = experience.action_mask
        assert experience.advantages[mask].mean().item() == pytest.approx(0.0, abs=1e-5)
        assert experience.advantages[mask].var(unbiased=False).item() == pytest.approx(1.0, rel=1e-3)
    before = weights(engine.actor)
    metrics = experience.metrics | trainer.train_rlhf(experience, 1)
    assert not unchanged(before, engine.actor)
    assert not {"critic_loss", "critic_lr", "value", "explained_variance"} & metrics.keys()
    assert metrics["first_ratio_deviation"] < 1e-5


@pytest.mark.detail(28)
def test_answers_to_one_prompt_differ_and_begin_with_the_answer_of_a_rollout_of_one(models, tmp_path):
    one = rollout(build(models, tmp_path / "one"), 1)
    three = rollout(build(models, tmp_path / "three", GROUPS), 1)
    rows = [three.input_ids[row][three.attention_mask[row].bool()].tolist() for row in range(12)]
    assert len({tuple(row) for row in rows}) > 8
    alone = [one.input_ids[row][one.attention_mask[row].bool()].tolist() for row in range(4)]
    assert rows[::3] == alone


@pytest.mark.parametrize("flags", ["--align_overflow", f"{PIECES} --whiten_rewards"])
def test_values_of_the_update_are_those_of_a_pass_before_it(models, tmp_path, flags, monkeypatch):
    """A rollout of one step computes the critic once: the same metrics and weights as with values before the update."""
    found = []
    for once in (True, False):
        if not once:
            monkeypatch.setattr(DeepSpeedPPOTrainer, "_values_from_update", lambda *_: False)
        trainer = build(models, tmp_path / str(once), flags)
        for number in (1, 2):
            experience = rollout(trainer, number)
            assert (experience.values is None) == (experience.advantages is None) == once
            metrics = experience.metrics | trainer.train_rlhf(experience, number)
        found.append((metrics, *map(weights, trainer.engine.trained.values())))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for own, other in zip(found[0][1:], found[1][1:], strict=True):
        for name, value in other.items():
            assert_close(own[name], value)


@pytest.mark.parametrize("flags", ["--ppo_epochs 2", "--per_device_training_batch_size 2", "--critic_dropout 0.1"])
def test_values_come_before_the_update_where_it_has_several_steps_or_dropout(models, tmp_path, flags):
    assert rollout(build(models, tmp_path, flags), 1).values is not None


# --- KL, entropy, rewards ---------------------------------------------------------------------------------------------


@pytest.mark.detail(13)
def test_kl_is_in_one_place_and_pulls_towards_the_reference(models, tmp_path):
    flags = "--kl_in loss --kl_coef 1.0 --ppo_epochs 8 --lr_scheduler_type constant"
    trainer = build(models, tmp_path, flags)
    trainer.train_rlhf(rollout(trainer, 1), 1)  # away from the reference
    experience = rollout(trainer, 2)
    scores = (experience.scores - 0.3) / 1.7 - (~experience.ended).float()
    torch.testing.assert_close(experience.rewards.sum(1), scores.clamp(-5, 5), atol=1e-5, rtol=1e-5)

    def divergence(now: Experience) -> float:
        d = (now.old_log_probs - now.ref_log_probs)[now.action_mask]
        return float((d.square() / 2).mean())

    before = divergence(experience)
    assert before > 1e-3
    experience.advantages = torch.zeros_like(experience.advantages)  # nothing but the penalty
    metrics = trainer.train_rlhf(experience, 2)
    assert metrics["kl_per_token"] > 0
    after = replace(experience)
    complete_experience(trainer.engine, after, trainer.args, trainer.sampler)
    assert divergence(after) < before / 2


@pytest.mark.detail(38)
def test_the_bonus_raises_the_entropy(models, tmp_path):
    trainer = build(models, tmp_path, "--entropy_coef 0.5 --ppo_epochs 6 --kl_coef 0")
    experience = rollout(trainer, 1)
    experience.advantages = torch.zeros_like(experience.advantages)
    ids, mask = experience.input_ids, experience.attention_mask

    def entropy() -> float:
        """Of the whole distributions, from plain logits."""
        with torch.no_grad():
            logits = trainer.engine.actor.module.model.eval()(input_ids=ids, attention_mask=mask).logits
        probs = logits[:, experience.prompt_width - 1 : -1].softmax(-1)
        return float(-(probs * probs.log()).sum(-1)[experience.action_mask].mean())

    before = entropy()
    metrics = trainer.train_rlhf(experience, 1)
    assert entropy() > before
    assert before - 0.01 < metrics["entropy"] < entropy() + 0.01


@pytest.mark.detail(17, 19, 22)
def test_penalties_and_whitening_of_rewards(models, tmp_path):
    flags = "--kl_coef 0 --normalize_reward false --missing_eos_penalty 0.5"
    plain = build(models, tmp_path / "plain", flags)
    long = build(models, tmp_path / "long", flags, "--overlong_penalty 2 --overlong_tokens 6")
    # Three answers of 1, 4 and 7 tokens (the limit), the last cut off.
    answers = [["E"], [11, 12, 13, "E"], [21, 22, 23, 24, 25, 26, 27]]
    experiences = [hand_written(trainer, answers, [True, True, False], scored=False) for trainer in (plain, long)]
    for trainer, experience in zip((plain, long), experiences, strict=True):
        assign_advantages(experience, trainer.engine, trainer.args)
    scores = experiences[0].scores
    missing = torch.tensor([0.0, 0.0, 0.5])
    torch.testing.assert_close(experiences[0].rewards.sum(1), (scores - missing).clamp(-5, 5))
    # 1, 4 and 7 tokens of 7, the ramp from 1: 0, 3/6 and all of the penalty of 2.
    torch.testing.assert_close(experiences[1].rewards.sum(1), (scores - missing - torch.tensor([0.0, 1.0, 2.0])).clamp(-5, 5))
    plain.args.whiten_rewards = True
    whitened = replace(experiences[0])
    assign_advantages(whitened, plain.engine, plain.args)
    mask = whitened.action_mask
    assert whitened.rewards[mask].var(unbiased=False).item() == pytest.approx(1.0, rel=1e-4)
    assert whitened.rewards[mask].mean().item() == pytest.approx(experiences[0].rewards[mask].mean().item(), rel=1e-4)
    assert whitened.metrics["reward"] == experiences[0].metrics["reward"], "the log shows rewards as they are"


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.detail(41)
def test_only_the_critic_learns_during_its_warm_up(models, tmp_path):
    trainer = build(models, tmp_path, "--old_log_probs forward --critic_warmup_rollouts 2 --kl_target 1")
    actor, critic = weights(trainer.engine.actor), weights(trainer.engine.critic)
    for number in (1, 2):
        metrics = trainer.train_rlhf(rollout(trainer, number), number)
        assert unchanged(actor, trainer.engine.actor) and not unchanged(critic, trainer.engine.critic)
        assert "actor_loss" not in metrics and "critic_loss" in metrics
        assert trainer.kl_coef == trainer.args.kl_coef, "a KL that cannot move says nothing about the coefficient"
    assert rollout(trainer, 3).metrics["kl"] == 0.0
    trainer.train_rlhf(rollout(trainer, 3), 3)
    assert not unchanged(actor, trainer.engine.actor)


@pytest.mark.detail(39)
def test_epochs_end_where_the_policy_has_moved_far_enough(models, tmp_path):
    flags = "--ppo_epochs 5 --per_device_training_batch_size 2 --actor_learning_rate 3e-3"
    free = build(models, tmp_path / "free", flags)
    assert free.train_rlhf(rollout(free, 1), 1)["optimizer_steps"] == 10
    bound = build(models, tmp_path / "bound", flags, "--max_approx_kl 1e-3")
    found = bound.train_rlhf(rollout(bound, 1), 1)
    assert 2 <= found["optimizer_steps"] < 10, "the first minibatch has KL 0, later ones do not"
    assert found["approx_kl"] * found["optimizer_steps"] > 1e-3


@pytest.mark.detail(16, 50)
def test_the_coefficient_moves_after_its_use_and_is_state(models, tmp_path):
    trainer = build(models, tmp_path, "--kl_target 0.5 --kl_horizon 40 --kl_coef 0.2")
    experience = rollout(trainer, 1)
    assert experience.metrics["kl"] == 0.0 and experience.metrics["kl_coef"] == 0.2
    trainer.train_rlhf(experience, 1)
    assert trainer.kl_coef == pytest.approx(0.2 * (1 - 0.2 * 4 / 40))  # 4 answers, error at its bound
    assert rollout(trainer, 2).metrics["kl_coef"] == trainer.kl_coef
    other = build(models, tmp_path / "other", "--kl_target 0.5 --kl_coef 0.2")
    other.load_state_dict(json.loads(json.dumps(trainer.state_dict())))
    assert other.kl_coef == trainer.kl_coef and other.state_dict() == trainer.state_dict()


@pytest.mark.detail(33)
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_micro_batches_do_not_change_the_step(models, tmp_path, reduction):
    """Two pieces of two answers, or four of one, or one of four: the same weights after the step."""
    found = []
    for size, pieces in ((4, 1), (2, 2), (1, 4)):
        flags = f"--per_device_training_batch_size {size} --gradient_accumulation_steps {pieces} --loss_reduction {reduction}"
        more = "--entropy_coef 0.01 --kl_in loss --actor_learning_rate 1e-4"
        trainer = build(models, tmp_path / str(size), flags, more)
        metrics = trainer.train_rlhf(rollout(trainer, 1), 1)
        found.append((metrics["actor_loss"], metrics["critic_loss"]))
    assert found[1] == pytest.approx(found[0], abs=1e-5) and found[2] == pytest.approx(found[0], abs=1e-5)


def test_a_symptom_is_logged_in_words(models, tmp_path, caplog):
    trainer = build(models, tmp_path, "--clip_reward_value 0.001")
    with caplog.at_level(logging.WARNING, logger="sanbu"):
        trainer.train_rlhf(rollout(trainer, 1), 1)
    assert "rollout 1: 100% of the scores were cut" in caplog.text


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--advantage grpo", "--num_return_sequences 1 leaves nothing to compare"),
        ("--advantage rloo --num_return_sequences 1", "give 2 or more"),
        ("--advantage reinforce++ --critic_warmup_rollouts 5", "--critic_warmup_rollouts"),
        ("--advantage rloo --num_return_sequences 4 --whiten_rewards true", "--whiten_rewards"),
        ("--kl_target 6 --kl_coef 0", "0 stays 0"),
        ("--dual_clip 0.5", "--dual_clip 0.5"),
        ("--overlong_penalty 1", "without --overlong_tokens"),
        ("--overlong_tokens 9", "without --overlong_penalty"),
        ("--overlong_tokens 999 --overlong_penalty 1", "--overlong_tokens 999"),
        ("--cliprange_low 0", "--cliprange_low 0"),
        ("--kl_horizon 0", "--kl_horizon 0"),
        ("--max_approx_kl -1", "--max_approx_kl -1"),
    ],
)
def test_flags_that_contradict_each_other(flags, words):
    with pytest.raises(UserError, match=words):
        parsed(flags)


@pytest.mark.detail(30)
def test_flags_that_follow_from_others():
    assert (parsed().cliprange_low, parsed("--cliprange 0.3").cliprange_high) == (0.2, 0.3)
    higher = parsed("--cliprange_high 0.28")
    assert (higher.cliprange_low, higher.cliprange_high) == (0.2, 0.28)
    assert not parsed("--advantage reinforce++").has_critic


def test_all_answers_to_a_generation_batch_are_in_work_at_once(models, tmp_path, monkeypatch):
    """--num_return_sequences 3 of 4 prompts: 12 rows, also where the prompts are answered once (evaluation)."""
    trainer = build(models, tmp_path, "--advantage rloo --num_return_sequences 3")
    seen, sample = [], rollout_module.generate_many

    def generate_many(*given, max_batch: int, **more):
        seen.append(max_batch)
        return sample(*given, max_batch=max_batch, **more)

    monkeypatch.setattr(rollout_module, "generate_many", generate_many)
    assert len(rollout(trainer, 1)) == 12 and seen == [12]
