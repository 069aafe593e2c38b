"""Details of PPO that show only with real models and real DeepSpeed engines; numbers are those of docs and test names."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from errors import UserError
from inference.engine import Generation
from models.load import load_causal_lm, load_scalar_model, load_tokenizer
from models.save import save_model
from models.templates import load_template
from tests.tiny import tiny_checkpoint
from training.step3_ppo.experience import Experience
from training.step3_ppo.ppo_trainer import DeepSpeedPPOTrainer, assign_advantages
from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine, check_models
from training.step3_ppo.rollout import PromptBatches, complete_experience, row_seed, row_seeds
from training.step3_ppo.scoring import Rewards
from training.utils.data.batching import collate_prompts
from training.utils.flags.parse import parse
from training.utils.flags.steps import PPOArguments
from training.utils.run.process_group import Run

pytestmark = pytest.mark.ppo
MEAN, STD = 0.3, 1.7


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An actor whose checkpoint asks for greedy answers (which must not matter) and a reward model with statistics."""
    folder = tmp_path_factory.mktemp("ppo")
    actor = tiny_checkpoint(folder / "actor", "llama")
    tokenizer = load_tokenizer(actor)
    reward = load_scalar_model(actor, dtype=torch.float32, seed=5)
    reward.config.update({"reward_mean": MEAN, "reward_std": STD})
    save_model(reward, tokenizer, load_template(actor, tokenizer), folder / "reward")
    (actor / "generation_config.json").write_text('{"do_sample": false, "top_k": 1, "repetition_penalty": 5.0}')
    yield actor, folder / "reward"
    if dist.is_initialized():
        dist.destroy_process_group()


def build_args(folders, output, *flags: str) -> PPOArguments:
    """What a run in this process is asked for; its data file does not exist."""
    return parse(PPOArguments, [
        "--actor_model_name_or_path", str(folders[0]), "--critic_model_name_or_path", str(folders[1]), "--dtype", "fp32",
        "--data_path", "unused.jsonl", "--output_dir", str(output), "--max_answer_seq_len", "7", "--num_warmup_steps", "0",
        "--per_device_generation_batch_size", "6", "--per_device_training_batch_size", "6",
        "--actor_learning_rate", "1e-3", "--critic_learning_rate", "1e-3", *flags,
    ])  # fmt: skip


def build(folders, output, *flags: str, pad_is_end: bool = False) -> DeepSpeedPPOTrainer:
    """A trainer in this process."""
    args = build_args(folders, output, *flags)
    tokenizer = load_tokenizer(folders[0])
    if pad_is_end:
        tokenizer.pad_token = tokenizer.eos_token
    run = Run.start(args)
    check_models(args, Rewards(args), tokenizer)
    engine = DeepSpeedRLHFEngine(str(folders[0]), str(folders[1]), tokenizer, 10, args, run=run)
    return DeepSpeedPPOTrainer(engine, args)


def prompts(trainer, count: int = 6):
    """Ragged prompts, left-padded."""
    generator = torch.Generator().manual_seed(2)
    rows = [
        {"prompt_ids": torch.randint(5, 300, (2 + row,), generator=generator).tolist(), "index": row}
        for row in range(count)
    ]
    return collate_prompts(rows, pad_id=trainer.engine.tokenizer.pad_token_id)


def ragged_experience(trainer, extra_left: int = 0, extra_right: int = 0) -> Experience:
    """Answers written by hand: one ends at once, one is cut off, with padding that nobody needs around them."""
    batch = prompts(trainer, 4)
    pad, end = trainer.engine.tokenizer.pad_token_id, trainer.engine.template.stop_token_ids[0]
    answers = [[end], [11, 12, end], [21, 22, 23, 24, 25], [31, end]]
    width = 5 + extra_right
    sequences = torch.tensor([answer + [pad] * (width - len(answer)) for answer in answers])
    lengths = torch.tensor([len(answer) for answer in answers])
    generation = Generation(sequences, lengths, torch.tensor([True, True, False, True]), torch.zeros(4, width))
    ids = torch.nn.functional.pad(batch.input_ids, (extra_left, 0), value=pad)
    mask = torch.nn.functional.pad(batch.attention_mask, (extra_left, 0), value=0)
    return Experience.from_generation(ids, mask, generation, batch.index, pad)


def scored(trainer, **padding) -> Experience:
    """The hand-written rollout with all fields."""
    experience = ragged_experience(trainer, **padding)
    complete_experience(trainer.engine, experience, trainer.args, trainer.sampler)
    assign_advantages(experience, trainer.engine, trainer.args)
    return experience


def weights(engine) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


@pytest.mark.detail(34, 45)
def test_first_ratio_is_1_and_the_actor_starts_as_its_reference(folders, tmp_path):
    trainer = build(folders, tmp_path)
    experience = trainer.generate_experience(prompts(trainer), 1)
    assert torch.equal(experience.old_log_probs, experience.ref_log_probs)
    assert experience.metrics["kl"] == 0.0
    assert experience.sampler_gap < 1e-5
    metrics = trainer.train_rlhf(experience, 1)
    assert metrics["first_ratio_deviation"] < 1e-5
    assert metrics["clip_share"] == 0.0 and metrics["approx_kl"] < 1e-9
    again = trainer.generate_experience(prompts(trainer), 2)
    assert again.metrics["kl"] != 0.0, "the step above must have moved the actor away from its reference"


def test_learning_rate_0_changes_nothing(folders, tmp_path):
    trainer = build(folders, tmp_path, "--actor_learning_rate", "0", "--critic_learning_rate", "0", "--ppo_epochs", "3",
                    "--per_device_training_batch_size", "2")  # fmt: skip
    before = weights(trainer.engine.actor), weights(trainer.engine.critic)
    experience = trainer.generate_experience(prompts(trainer), 1)
    metrics = trainer.train_rlhf(experience, 1)
    for old, engine in zip(before, (trainer.engine.actor, trainer.engine.critic), strict=True):
        assert all(torch.equal(old[name], now) for name, now in weights(engine).items())
    assert (
        metrics["clip_share"] == 0.0
        and metrics["approx_kl"] < 1e-9
        and metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    )


@pytest.mark.detail(1, 21, 25)
def test_values_come_before_their_token_and_the_score_from_the_last_real_one(folders, tmp_path):
    """Against each row alone, without padding, through transformers' own forward passes."""
    trainer = build(folders, tmp_path)
    experience = scored(trainer)
    actor, reward = (load(folder, dtype=torch.float32).eval() for load, folder in
                     zip((load_causal_lm, load_scalar_model), folders, strict=True))  # fmt: skip
    width = experience.prompt_width
    for row in range(len(experience)):
        real = experience.attention_mask[row].bool()
        ids = experience.input_ids[row][real][None]
        start = int(real[:width].sum())
        with torch.no_grad():
            log_probs = actor(input_ids=ids).logits.log_softmax(-1)[0]
            score = float(reward(input_ids=ids).logits)
            for t in range(int(experience.answer_lengths[row])):
                before = ids[:, : start + t]
                value = (float(reward(input_ids=before).logits) - MEAN) / STD
                assert float(experience.values[row, t]) == pytest.approx(value, abs=1e-5)
                expected = float(log_probs[start + t - 1, ids[0, start + t]])
                assert float(experience.old_log_probs[row, t]) == pytest.approx(expected, abs=1e-5)
        assert float(experience.scores[row]) == pytest.approx(score, abs=1e-5)
        # Item 10: the rewards of a row add up to its normalised score (KL is 0 here), less 1 if it did not end.
        penalty = 0.0 if bool(experience.ended[row]) else 1.0
        assert float(experience.rewards[row].sum()) == pytest.approx((score - MEAN) / STD - penalty, abs=1e-5)
        assert torch.allclose(
            experience.returns[row], experience.values[row] + _raw_advantages(experience)[row], atol=1e-5
        )


def _raw_advantages(experience: Experience) -> torch.Tensor:
    """The double sum of gamma = 1, lambda = 0.95, written out."""
    found = torch.zeros_like(experience.rewards)
    for row, length in enumerate(experience.answer_lengths.tolist()):
        values = [*experience.values[row, :length].tolist(), 0.0]
        rewards = experience.rewards[row, :length].tolist()
        deltas = [rewards[t] + values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            found[row, t] = sum(0.95 ** (s - t) * deltas[s] for s in range(t, length))
    return found


@pytest.mark.detail(3)
@pytest.mark.parametrize("padding", [{"extra_left": 5}, {"extra_right": 4}, {"extra_left": 3, "extra_right": 2}])
def test_padding_changes_nothing(folders, tmp_path, padding):
    plain, padded = (build(folders, tmp_path / name) for name in ("a", "b"))
    first, second = scored(plain), scored(padded, **padding)
    width = first.action_mask.shape[1]
    for name in ("old_log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(second, name)[:, :width], getattr(first, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second.scores, first.scores, atol=1e-5, rtol=1e-5)
    metrics = [trainer.train_rlhf(experience) for trainer, experience in ((plain, first), (padded, second))]
    assert metrics[1]["actor_loss"] == pytest.approx(metrics[0]["actor_loss"], abs=1e-5)
    for name, value in weights(plain.engine.actor).items():
        torch.testing.assert_close(weights(padded.engine.actor)[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.detail(4, 5)
def test_pad_equal_to_the_end_token_changes_nothing_and_the_end_is_an_action(folders, tmp_path):
    apart, same = build(folders, tmp_path / "a"), build(folders, tmp_path / "b", pad_is_end=True)
    assert same.engine.tokenizer.pad_token_id in same.engine.template.stop_token_ids
    assert apart.engine.tokenizer.pad_token_id not in apart.engine.template.stop_token_ids
    first, second = scored(apart), scored(same)
    assert first.action_mask.sum(1).tolist() == [1, 3, 5, 2]  # end tokens counted, padding not
    for name in ("action_mask", "attention_mask", "old_log_probs", "values", "scores", "rewards", "advantages"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert all(float(first.advantages[row, length - 1]) != 0.0 for row, length in enumerate([1, 3, 5, 2]))
    for trainer, experience in ((apart, first), (same, second)):
        trainer.train_rlhf(experience)
    # The very same update, and the row of the end token in the output matrix has moved with it.
    start = load_causal_lm(folders[0], dtype=torch.float32).lm_head.weight
    end = apart.engine.template.stop_token_ids[0]
    for name, value in weights(apart.engine.actor).items():
        torch.testing.assert_close(weights(same.engine.actor)[name], value, atol=1e-6, rtol=1e-5)
        if name.endswith("lm_head.weight"):
            assert not torch.equal(value[end], start[end])


@pytest.mark.detail(5)
def test_a_better_than_average_end_becomes_likelier(folders, tmp_path):
    trainer = build(folders, tmp_path)
    experience = scored(trainer)
    experience.advantages = torch.zeros_like(experience.advantages)
    experience.advantages[1, 2] = 1.0  # the end token of the second answer, and nothing else
    trainer.train_rlhf(experience)
    after = replace(experience)
    complete_experience(trainer.engine, after, trainer.args, trainer.sampler)
    assert float(after.old_log_probs[1, 2]) > float(scored(build(folders, tmp_path / "new")).old_log_probs[1, 2])


@pytest.mark.detail(36)
def test_temperature_divides_old_new_and_reference_alike(folders, tmp_path):
    trainer = build(folders, tmp_path, "--temperature", "0.6")
    experience = trainer.generate_experience(prompts(trainer), 1)
    assert experience.sampler_gap < 1e-5
    assert torch.equal(experience.old_log_probs, experience.ref_log_probs)
    ids = experience.input_ids[0][experience.attention_mask[0].bool()][None]
    model = load_causal_lm(folders[0], dtype=torch.float32).eval()
    start = int(experience.attention_mask[0, : experience.prompt_width].sum())
    with torch.no_grad():
        cooled = (model(input_ids=ids).logits / 0.6).log_softmax(-1)[0, start - 1, ids[0, start]]
    assert float(experience.old_log_probs[0, 0]) == pytest.approx(float(cooled), abs=1e-5)
    assert trainer.train_rlhf(experience)["first_ratio_deviation"] < 1e-5


@pytest.mark.detail(35)
def test_no_dropout_anywhere_by_default(folders, tmp_path):
    engine = build(folders, tmp_path).engine
    for model in (engine.actor, engine.critic, engine.ref, engine.reward):
        module = getattr(model, "module", model)
        assert all(part.p == 0.0 for part in module.modules() if isinstance(part, torch.nn.Dropout))
        assert getattr(module.model.config, "attention_dropout", 0.0) == 0.0


@pytest.mark.detail(43)
def test_the_critic_starts_from_the_reward_model_with_its_head(folders, tmp_path):
    engine = build(folders, tmp_path).engine
    ids = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = engine.values(engine.critic, ids, torch.ones_like(ids))[:, -1]
        scores = load_scalar_model(folders[1], dtype=torch.float32).eval()(input_ids=ids).logits[:, 0]
    torch.testing.assert_close(values, (scores - MEAN) / STD, atol=1e-5, rtol=1e-5)
    assert float(values.std()) > 1e-3


@pytest.mark.detail(47)
def test_answers_are_sampled_whatever_the_checkpoint_says(folders, tmp_path):
    trainer = build(folders, tmp_path)
    batch = prompts(trainer)
    same = replace(
        batch, input_ids=batch.input_ids[:1].repeat(6, 1), attention_mask=batch.attention_mask[:1].repeat(6, 1)
    )
    experience = trainer.generate_experience(same, 1)
    answers = {tuple(row) for row in experience.input_ids[:, experience.prompt_width :].tolist()}
    assert len(answers) > 1, "six answers to one prompt with six seeds"
    again = trainer.generate_experience(same, 1)
    assert torch.equal(again.input_ids, experience.input_ids), "the same rollout number, the same answers"
    assert not torch.equal(trainer.generate_experience(same, 2).old_log_probs, experience.old_log_probs)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_prompts_that_stand_twice_get_other_answers_whoever_answers_them(processes):
    """Seeds of a rollout of four examples of which one stands three times, with two answers each: eight, whoever has them."""
    examples = [4, 4, 5, 4]

    def share(rank: int):
        run = SimpleNamespace(rank=rank, world_size=processes, device="cpu")
        room = SimpleNamespace(dataset={4: {"prompt_ids": [7]}, 5: {"prompt_ids": [8, 9]}}, run=run, pad_id=0)
        return PromptBatches.batch(room, examples)

    seeds = [seed for rank in range(processes) for seed in row_seeds(1, 1, share(rank), 2)]
    assert len(set(seeds)) == 8
    assert sorted(seeds) == sorted(row_seed(1, 1, example, n) for example, times in ((4, 6), (5, 2)) for n in range(times))


def test_weights_that_are_not_finite_stop_the_run_with_a_sentence(folders, tmp_path):
    trainer = build(folders, tmp_path)
    with torch.no_grad():
        next(trainer.engine.actor.module.model.parameters())[:] = float("nan")
    with pytest.raises(UserError, match=r"not finite numbers.*--resume"):
        trainer.generate_experience(prompts(trainer), 1)


@pytest.mark.parametrize(("actor", "reward", "words"), [
    (0, 0, "critic_model_name_or_path .* is no reward model .LlamaForCausalLM"),
    (1, 1, "actor_model_name_or_path .* is a reward model"),
    (1, None, "actor_model_name_or_path .* is a reward model"),
])  # fmt: skip
def test_a_model_of_the_other_kind_is_refused(folders, tmp_path, actor, reward, words):
    rule = f"{Path(__file__).parents[3] / 'scripts/demo/score.py'}:reward"
    flags = ("--reward_model", "false", "--reward_function", rule) if reward is None else ()
    with pytest.raises(UserError, match=words):
        build((folders[actor], folders[reward or 0]), tmp_path, *flags)


def test_a_critic_may_start_from_a_language_model(folders, tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("def score(prompts, answers):\n    return [float(len(answer)) for answer in answers]\n")
    flags = ("--reward_model", "false", "--reward_function", f"{rule}:score")
    trainer = build((folders[0], folders[0]), tmp_path, *flags)
    assert trainer.engine.critic is not None and trainer.engine.reward is None


@pytest.mark.detail(14)
def test_kl_penalty_uses_the_policy_that_sampled(folders, tmp_path):
    trainer = build(folders, tmp_path, "--kl_coef", "0.5")
    trainer.train_rlhf(trainer.generate_experience(prompts(trainer), 1), 1)
    experience = trainer.generate_experience(prompts(trainer), 2)
    for row, length in enumerate(experience.answer_lengths.tolist()):
        ended = bool(experience.ended[row])
        total = (float(experience.scores[row]) - MEAN) / STD - (0.0 if ended else 1.0)
        total -= 0.5 * sum(
            float(experience.log_probs[row, t] - experience.ref_log_probs[row, t]) for t in range(length)
        )
        assert float(experience.rewards[row].sum()) == pytest.approx(total, abs=1e-4)
    assert not math.isclose(experience.metrics["kl"], 0.0)
