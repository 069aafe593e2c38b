"""Details of PPO that show only with real models and real DeepSpeed engines - and that docs/en/ppo.md names what exists."""

import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from errors import UserError
from models.load import load_causal_lm, load_scalar_model
from scripts.docs import ppo_details
from tests.training.step3_ppo.small_ppo import MEAN, STD, build, hand_written, prompts, rollout, unchanged, weights
from training.step3_ppo.experience import Experience
from training.step3_ppo.ppo_trainer import assign_advantages
from training.step3_ppo.rlhf_engine import score_unit
from training.step3_ppo.rollout import PromptBatches, row_seed, row_seeds

pytestmark = pytest.mark.ppo
# One answer ends at once, one is cut off.
ANSWERS, ENDED = [["E"], [11, 12, "E"], [21, 22, 23, 24, 25], [31, "E"]], [True, True, False, True]
LENGTHS = [1, 3, 5, 2]


@pytest.fixture(scope="module")
def untrained(models, tmp_path_factory):
    """A trainer that no test trains."""
    return build(models, tmp_path_factory.mktemp("untrained"))


def scored(trainer, **padding) -> Experience:
    return hand_written(trainer, ANSWERS, ENDED, **padding)


def tensors(experience) -> dict[str, torch.Tensor]:
    every = {field.name: getattr(experience, field.name) for field in fields(experience)}
    return {name: value.clone() for name, value in every.items() if isinstance(value, torch.Tensor)}


@pytest.mark.detail(34, 45)
@pytest.mark.parametrize(("dtype", "rounding"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_first_ratio_is_1_and_the_actor_starts_as_its_reference(models, tmp_path, dtype, rounding):
    """Old and new come from the same kernels: rounding may move the first ratio and the first KL, no more."""
    trainer = build(models, tmp_path, f"--dtype {dtype}")
    experience = rollout(trainer, 1)
    assert torch.equal(experience.old_log_probs, experience.ref_log_probs)
    assert experience.metrics["kl"] == 0.0 and (dtype == "bf16" or experience.sampler_gap < 1e-5)
    metrics = trainer.train_rlhf(experience, 1)
    assert metrics["first_ratio_deviation"] < rounding
    assert metrics["clip_share"] == 0.0 and metrics["approx_kl"] < rounding**2
    assert rollout(trainer, 2).metrics["kl"] != 0.0, "the step above must have moved the actor away from its reference"


def test_learning_rate_0_changes_nothing_and_a_rollout_is_only_read(models, tmp_path):
    """Earlier systems zeroed values in place and computed advantages again each time."""
    flags = "--actor_learning_rate 0 --critic_learning_rate 0 --ppo_epochs 3 --per_device_training_batch_size 2"
    trainer = build(models, tmp_path, flags)
    before = {role: weights(engine) for role, engine in trainer.engine.trained.items()}
    experience = rollout(trainer, 1)
    fresh = tensors(experience)
    metrics = trainer.train_rlhf(experience, 1)
    assert all(unchanged(before[role], engine) for role, engine in trainer.engine.trained.items())
    assert metrics["clip_share"] == 0.0 and metrics["approx_kl"] < 1e-9
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    for _ in range(2):  # assigned twice is the same as once
        after = tensors(experience)
        assert fresh.keys() == after.keys() and all(torch.equal(fresh[name], after[name]) for name in fresh)
        assign_advantages(experience, trainer.engine, trainer.args)


@pytest.mark.detail(1, 10, 21, 25)
def test_values_come_before_their_token_and_the_score_from_the_last_real_one(models, untrained):
    """Against each row alone, without padding, through transformers' own forward passes."""
    experience = scored(untrained)
    actor, reward = load_causal_lm(models[0], dtype=torch.float32).eval(), load_scalar_model(models[1], dtype=torch.float32).eval()
    width = experience.prompt_width
    for row, length in enumerate(LENGTHS):
        real = experience.attention_mask[row].bool()
        ids, start = experience.input_ids[row][real][None], int(real[:width].sum())
        with torch.no_grad():
            log_probs = actor(input_ids=ids).logits.log_softmax(-1)[0]
            score = float(reward(input_ids=ids).logits)
            raw = [float(reward(input_ids=ids[:, : start + t]).logits) for t in range(length)]
        values = [(one - MEAN) / STD for one in raw]
        assert experience.values[row, :length].tolist() == pytest.approx(values, abs=1e-5)
        expected = [float(log_probs[start + t - 1, ids[0, start + t]]) for t in range(length)]
        assert experience.old_log_probs[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert float(experience.scores[row]) == pytest.approx(score, abs=1e-5)
        # The rewards of a row add up to its normalised score (KL is 0 here), less 1 if it did not end.
        rewards = experience.rewards[row, :length].tolist()
        assert sum(rewards) == pytest.approx((score - MEAN) / STD - (not ENDED[row]), abs=1e-5)
        # Advantages by the double sum of gamma = 1, lambda = 0.95.
        deltas = [reward + after - value for reward, after, value in zip(rewards, [*values[1:], 0.0], values, strict=True)]
        sums = [sum(0.95 ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]
        returns = [value + one for value, one in zip(values, sums, strict=True)]
        assert experience.returns[row, :length].tolist() == pytest.approx(returns, abs=1e-5)


@pytest.mark.detail(3, 4, 5)
@pytest.mark.parametrize(("padding", "pad_is_end"), [({"left": 3, "right": 2}, False), ({}, True)])
def test_neither_padding_nor_its_id_changes_anything(models, tmp_path, padding, pad_is_end):
    """Also where the pad is the end token, which is an action: the row of the end token in the output matrix moves."""
    plain, other = build(models, tmp_path / "a"), build(models, tmp_path / "b", pad_is_end=pad_is_end)
    end = plain.engine.template.stop_token_ids[0]
    assert (other.engine.tokenizer.pad_token_id == end) == pad_is_end
    first, second = scored(plain), scored(other, **padding)
    assert first.action_mask.sum(1).tolist() == second.action_mask.sum(1).tolist() == LENGTHS
    width = first.action_mask.shape[1]
    for name in ("old_log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(second, name)[:, :width], getattr(first, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second.scores, first.scores, atol=1e-5, rtol=1e-5)
    assert all(float(first.advantages[row, length - 1]) != 0.0 for row, length in enumerate(LENGTHS))
    found = [trainer.train_rlhf(experience)["actor_loss"] for trainer, experience in ((plain, first), (other, second))]
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    start = load_causal_lm(models[0], dtype=torch.float32).lm_head.weight
    for name, value in weights(plain.engine.actor).items():
        torch.testing.assert_close(weights(other.engine.actor)[name], value, atol=1e-5, rtol=1e-4)
        assert not name.endswith("lm_head.weight") or not torch.equal(value[end], start[end])


@pytest.mark.detail(36)
def test_temperature_divides_old_new_and_reference_alike(models, tmp_path):
    trainer = build(models, tmp_path, "--temperature", "0.6")
    experience = rollout(trainer, 1)
    assert experience.sampler_gap < 1e-5
    assert torch.equal(experience.old_log_probs, experience.ref_log_probs)
    ids = experience.input_ids[0][experience.attention_mask[0].bool()][None]
    start = int(experience.attention_mask[0, : experience.prompt_width].sum())
    with torch.no_grad():
        logits = load_causal_lm(models[0], dtype=torch.float32).eval()(input_ids=ids).logits
    cooled = (logits / 0.6).log_softmax(-1)[0, start - 1, ids[0, start]]
    assert float(experience.old_log_probs[0, 0]) == pytest.approx(float(cooled), abs=1e-5)
    assert trainer.train_rlhf(experience)["first_ratio_deviation"] < 1e-5


@pytest.mark.detail(35)
def test_no_dropout_anywhere_by_default(untrained):
    engine = untrained.engine
    for model in (engine.actor, engine.critic, engine.ref, engine.reward):
        module = getattr(model, "module", model)
        assert all(layer.p == 0.0 for layer in module.modules() if isinstance(layer, torch.nn.Dropout))
        assert getattr(module.model.config, "attention_dropout", 0.0) == 0.0


@pytest.mark.detail(43)
def test_the_critic_starts_from_the_reward_model_with_its_head(models, untrained):
    ids = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = untrained.engine.values(untrained.engine.critic, ids, torch.ones_like(ids))[:, -1]
        scores = load_scalar_model(models[1], dtype=torch.float32).eval()(input_ids=ids).logits[:, 0]
    torch.testing.assert_close(values, (scores - MEAN) / STD, atol=1e-5, rtol=1e-5)
    assert float(values.std()) > 1e-3


@pytest.mark.detail(47)
def test_answers_are_sampled_whatever_the_checkpoint_says(untrained):
    batch = prompts(untrained)
    ids, mask = (x[:1].repeat(4, 1) for x in (batch.input_ids, batch.attention_mask))
    same = replace(batch, input_ids=ids, attention_mask=mask)
    experience = untrained.generate_experience(same, 1)
    answers = {tuple(row) for row in experience.input_ids[:, experience.prompt_width :].tolist()}
    assert len(answers) > 1, "four answers to one prompt with four seeds"
    again = untrained.generate_experience(same, 1)
    assert torch.equal(again.input_ids, experience.input_ids), "the same rollout number, the same answers"
    assert not torch.equal(untrained.generate_experience(same, 2).old_log_probs, experience.old_log_probs)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_prompts_that_stand_twice_get_other_answers_whoever_answers_them(processes):
    """Seeds of a rollout of four examples of which one stands three times, with two answers each: eight, whoever has them."""
    examples = [4, 4, 5, 4]

    def share(rank: int):
        run = SimpleNamespace(rank=rank, world_size=processes, device="cpu")
        batches = SimpleNamespace(dataset={4: {"prompt_ids": [7]}, 5: {"prompt_ids": [8, 9]}}, run=run, pad_id=0)
        return PromptBatches.batch(batches, examples)

    seeds = [seed for rank in range(processes) for seed in row_seeds(1, 1, share(rank), 2)]
    assert len(set(seeds)) == 8
    assert sorted(seeds) == sorted(row_seed(1, 1, example, n) for example, times in ((4, 6), (5, 2)) for n in range(times))


def test_weights_that_are_not_finite_stop_the_run_with_a_sentence(models, tmp_path):
    trainer = build(models, tmp_path)
    with torch.no_grad():
        next(trainer.engine.actor.module.model.parameters())[:] = float("nan")
    with pytest.raises(UserError, match=r"not finite numbers.*--resume"):
        rollout(trainer, 1)


@pytest.mark.parametrize(
    ("actor", "reward", "words"),
    [
        (0, 0, "critic_model_name_or_path .* is no reward model .LlamaForCausalLM"),
        (1, 1, "actor_model_name_or_path .* is a reward model"),
        (1, None, "actor_model_name_or_path .* is a reward model"),
        (0, None, None),  # a critic may start from a language model
    ],
)
def test_a_model_of_the_other_kind_is_refused(models, tmp_path, actor, reward, words):
    rule = f"{Path(__file__).parents[3] / 'scripts/demo/score.py'}:reward"
    flags = (f"--reward_model false --reward_function {rule}",) if reward is None else ()
    if words:
        with pytest.raises(UserError, match=words):
            build((models[actor], models[reward or 0]), tmp_path, *flags)
    else:
        engine = build((models[actor], models[actor]), tmp_path, *flags).engine
        assert engine.critic is not None and engine.reward is None


@pytest.mark.detail(6, 14)
def test_the_penalty_uses_the_policy_that_sampled_and_prompt_tokens_count_nowhere(models, tmp_path):
    """Every field of a rollout but the ids and their mask is as wide as the answers; metrics come from these alone."""
    trainer = build(models, tmp_path, "--kl_coef", "0.5")
    trainer.train_rlhf(rollout(trainer, 1), 1)
    experience = rollout(trainer, 2)
    mask, kl = experience.action_mask, experience.log_probs - experience.ref_log_probs
    for name, value in tensors(experience).items():
        if value.dim() == 2 and name not in ("input_ids", "attention_mask", "source_scores"):
            assert value.shape == mask.shape, name
            assert name == "log_probs" or (value[~mask] == 0).all(), name
    assert int(mask.sum()) == int(experience.answer_lengths.sum())
    sums = torch.stack([kl[row][mask[row]].sum() for row in range(4)])
    totals = (experience.scores - MEAN) / STD - (~experience.ended).float() - 0.5 * sums
    torch.testing.assert_close(experience.rewards.sum(1), totals, atol=1e-4, rtol=0)
    assert experience.metrics["kl"] == pytest.approx(float(sums.mean()), abs=1e-5) and float(sums.abs().max()) > 0


@pytest.mark.detail(18)
def test_scores_are_normalised_by_what_the_reward_model_stores(models, tmp_path):
    """By mean and spread in its config.json; a reward model without them, or --normalize_reward false, as it is. The network
    itself gives raw scores: nothing is normalised where it is trained.
    """
    config = AutoConfig.from_pretrained(models[1])
    assert score_unit(config, True) == (MEAN, STD) and score_unit(config, False) == (0.0, 1.0)
    del config.reward_std
    assert score_unit(config, True) == (0.0, 1.0)
    plain = "--clip_reward_value 0 --missing_eos_penalty 0"
    raw, unit = build(models, tmp_path / "raw", "--normalize_reward false", plain), build(models, tmp_path / "unit", plain)
    first, second = rollout(raw, 1), rollout(unit, 1)
    assert torch.equal(first.scores, second.scores), "Experience keeps the reward model's own unit"
    torch.testing.assert_close(second.rewards.sum(1), (first.rewards.sum(1) - MEAN) / STD, atol=1e-5, rtol=1e-5)


@pytest.mark.detail(41)
def test_optimizers_of_actor_and_critic(models, tmp_path):
    """Separate rates and decays, none for biases and norms, gradients clipped, betas and epsilon as the flags say."""
    flags = "--actor_learning_rate 1e-5 --critic_learning_rate 7e-5 --actor_weight_decay 0.1 --adam_epsilon 1e-5"
    trainer = build(models, tmp_path, flags, "--max_grad_norm 0.5")
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
