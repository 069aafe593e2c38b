"""Sources of reward in real rollouts: the texts that they see, the sum, failures with a checkpoint, the win rate, learning."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import training.step3_ppo.main as ppo
import training.step3_ppo.rlhf_engine as rlhf_engine
from models.load import load_scalar_model
from models.tokenizer import load_tokenizer
from tests.launching import logged, write_pairs
from tests.training.runs import step
from tests.training.step3_ppo import reward_functions
from tests.training.step3_ppo.small_ppo import MEAN, STD, write_models
from training.step3_ppo.ppo_trainer import DeepSpeedPPOTrainer
from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine
from training.step3_ppo.scoring import RewardError
from training.utils.data.batching import collate_prompts
from training.utils.flags.parse import parse
from training.utils.flags.steps import PPOArguments
from training.utils.run.process_group import Run

pytestmark = pytest.mark.ppo


SMALL = "--data_split 0,0,1 --eval_fraction 0.2 --eval_prompts 6 --eval_interval 1 --per_device_training_batch_size 8"
SMALL += " --adam_epsilon 1e-8"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """An SFT model, a reward model with statistics, prompts and the file of functions."""
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda *_: None  # as in tests/several.py
    folder = tmp_path_factory.mktemp("rewards")
    base, reward = write_models(folder)
    data, functions = write_pairs(folder / "pairs.jsonl", 90), shutil.copy(reward_functions.__file__, folder / "f.py")
    yield {"base": base, "reward": reward, "data": data, "f": functions, "calls": folder / "calls.txt"}
    dist.destroy_process_group = leave
    if dist.is_initialized():
        dist.destroy_process_group()


def parsed(folders, output, *more: str, critic: str | None = "reward") -> PPOArguments:
    """A run of three rollouts with 8 prompts each and 6 held-out prompts."""
    flags = " ".join((SMALL, *more))
    return parse(
        PPOArguments, step("ppo", output, folders["data"], folders["base"], flags, critic=folders.get(critic))[1]
    )


def by_function(folders, *names: str, model: bool = False) -> str:
    functions = " ".join(f"{folders['f']}:{name}" for name in names)
    return f"--reward_function {functions} --reward_model {str(model).lower()}"


def run(folders, output, *more: str, **options) -> None:
    """The whole step in this process."""
    ppo.main(parsed(folders, output, *more, **options))


def trainer(folders, output, *more: str, **options) -> DeepSpeedPPOTrainer:
    args = parsed(folders, output, *more, **options)
    critic, tokenizer = args.critic_model_name_or_path, load_tokenizer(folders["base"])
    engine = DeepSpeedRLHFEngine(str(folders["base"]), critic, tokenizer, 10, args, run=Run.start(args))
    return DeepSpeedPPOTrainer(engine, args)


def prompts(trainer: DeepSpeedPPOTrainer, texts: list[str]):
    """These questions as the template writes them."""
    engine = trainer.engine
    encoded = [engine.template.encode_prompt(engine.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    rows = [{"prompt_ids": ids, "index": row} for row, ids in enumerate(encoded)]
    return collate_prompts(rows, pad_id=engine.tokenizer.pad_token_id)


def samples(output: Path, step: int, part: str = "eval") -> list[dict]:
    """The rows of one evaluation, or of a rollout (part "train"), in samples.jsonl."""
    rows = map(json.loads, (output / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["part"] == part and row["step"] == step]


QUICK = "--actor_learning_rate 2e-2"  # three rollouts change the answers
TEXTS = ["Hi", "What is 1 plus 1?", "Name a colour, please.", "你好", "And another one?", "x"]


def test_sources_see_the_texts_and_the_sum_is_as_by_hand(folders, tmp_path):
    more = by_function(folders, "length", "question", model=True)
    found = trainer(folders, tmp_path, more, "--reward_weights 2,0.5,1 --clip_reward_value 1.5")
    experience = found.generate_experience(prompts(found, TEXTS), 1)
    engine, width = found.engine, experience.prompt_width
    model = load_scalar_model(folders["reward"], dtype=torch.float32).eval()
    for row, text in enumerate(TEXTS):
        real = experience.attention_mask[row].bool()
        answer = experience.input_ids[row, width:][experience.action_mask[row].bool()].tolist()
        answer = [token for token in answer if token not in engine.template.stop_token_ids]
        words = engine.tokenizer.decode(answer, skip_special_tokens=True).strip()
        prompt = f"\n\nHuman: {text}\n\nAssistant:"
        with torch.no_grad():
            raw = float(model(input_ids=experience.input_ids[row][real][None]).logits)
        parts = [raw, len(words) / 10, int("1" in text) - len(prompt) / 100]
        assert experience.source_scores[row].tolist() == pytest.approx(parts, abs=1e-5)
        score = 2 * (raw - MEAN) / STD + 0.5 * parts[1] + parts[2]
        assert float(experience.scores[row]) == pytest.approx(score, abs=1e-5)
        # The actor is still its reference: no KL. The penalty comes off, then the clip.
        score -= 0.0 if bool(experience.ended[row]) else 1.0
        assert float(experience.rewards[row].sum()) == pytest.approx(max(-1.5, min(1.5, score)), abs=1e-5)
    for place, name in enumerate(("score_model", "score_length", "score_question")):
        assert experience.metrics[name] == pytest.approx(float(experience.source_scores[:, place].mean()))


@pytest.mark.detail(17, 18)
def test_one_source_more_leaves_the_reward_models_own_scores_alone(folders, tmp_path):
    alone = trainer(folders, tmp_path / "a")
    beside = trainer(folders, tmp_path / "b", by_function(folders, "length", model=True), "--reward_weights 1,0")
    first, second = (found.generate_experience(prompts(found, TEXTS), 1) for found in (alone, beside))
    assert torch.equal(first.scores, second.source_scores[:, 0]) and torch.equal(
        first.scores, first.source_scores[:, 0]
    )
    assert float(second.source_scores[:, 1].min()) >= 0 and float(second.source_scores[:, 1].max()) > 0
    torch.testing.assert_close(second.rewards, first.rewards)  # a weight of 0 only shows in the log


def test_without_a_reward_model_none_is_loaded(folders, tmp_path, monkeypatch):
    loaded = []
    load = rlhf_engine.load_scalar_model
    monkeypatch.setattr(rlhf_engine, "load_scalar_model", lambda *a, **k: loaded.append(a) or load(*a, **k))
    found = trainer(folders, tmp_path / "sft", by_function(folders, "length"), critic="base")  # with a new head
    assert found.engine.reward is None and len(loaded) == 1
    experience = found.generate_experience(prompts(found, TEXTS), 1)
    assert torch.equal(experience.scores, experience.source_scores[:, 0]) and float(experience.scores.max()) > 0
    unit = trainer(folders, tmp_path / "rm", by_function(folders, "length")).engine
    assert (unit.reward_mean, unit.reward_std) == (MEAN, STD), "the critic's head is in the unit that it was trained in"
    assert unit.score_unit == (0.0, 1.0), "and that says nothing about a function"


def test_functions_and_no_critic_need_one_model_folder(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf_engine, "load_scalar_model", lambda *_, **__: pytest.fail("a scalar model was loaded"))
    more = "--advantage rloo --num_return_sequences 2 --max_steps 2"
    run(folders, tmp_path, by_function(folders, "length"), more, critic=None)
    assert (tmp_path / "actor" / "model.safetensors").exists() and not (tmp_path / "critic").exists()
    assert len(logged(tmp_path, "train/score")) == 2


def test_win_rate_and_metrics_of_an_evaluation_by_hand(folders, tmp_path):
    folders["calls"].unlink(missing_ok=True)
    run(folders, tmp_path, by_function(folders, "counted"), QUICK)
    rates, scores = logged(tmp_path, "eval/win_rate"), logged(tmp_path, "eval/score")
    assert rates[0] == 0.5 and len(rates) == 4
    before = samples(tmp_path, 0)
    assert len(before) == 6 and all(row["answer"] == row["reference"] for row in before)
    for number in range(4):
        rows = samples(tmp_path, number)
        assert [row["reference"] for row in rows] == [row["answer"] for row in before], "what the SFT model said stays"
        assert all(row["reference_score"] == pytest.approx(len(row["reference"]) / 10, abs=1e-4) for row in rows)
        pairs = [(row["score"], row["reference_score"]) for row in rows]
        assert rates[number] == pytest.approx(sum((ours > sft) + 0.5 * (ours == sft) for ours, sft in pairs) / 6)
        assert scores[number] == pytest.approx(sum(len(row["answer"]) for row in rows) / 60, abs=1e-4)
        assert logged(tmp_path, "eval/eos_rate")[number] == pytest.approx(sum(row["ended"] for row in rows) / 6)
        assert logged(tmp_path, "eval/length")[number] == pytest.approx(sum(row["length"] for row in rows) / 6)
    assert logged(tmp_path, "eval/reference_score") == pytest.approx([scores[0]] * 4)
    assert rates[-1] != 0.5 and logged(tmp_path, "eval/kl")[0] == 0.0
    # Three rollouts of 8; an evaluation of 6 before and after each; the reference's 6 answers once, and 4 to training prompts.
    assert sorted(map(int, folders["calls"].read_text().split())) == [4] + [6] * 5 + [8] * 3
    first, last = samples(tmp_path, 1, "train"), samples(tmp_path, 3, "train")
    assert len(first) == len(last) == 4 and not any("reference" in row for row in first)
    assert all(row["reference_score"] == pytest.approx(len(row["reference"]) / 10, abs=1e-4) for row in last)
    assert any(row["reference"] != row["answer"] for row in last)


def test_the_reference_answers_the_shown_training_prompts_with_the_actors_random_numbers(folders, tmp_path):
    """The answers of the first rollout come before the first update: the two models are one."""
    more = "--max_steps 1 --num_return_sequences 3 --advantage rloo --eval_prompts 0"
    run(folders, tmp_path, by_function(folders, "length"), more)
    rows = samples(tmp_path, 1, "train")
    assert [row["reference"] for row in rows] == [row["answer"] for row in rows] and len(rows) == 4
    assert [row["reference_score"] for row in rows] == [row["score"] for row in rows]
    assert len({row["prompt"] for row in rows}) == 2


def test_a_failure_leaves_a_checkpoint_and_resume_ends_where_an_unbroken_run_does(folders, tmp_path, monkeypatch):
    calls = folders["calls"]
    more = f"{by_function(folders, 'counted', 'letters', model=True)} {QUICK}"
    calls.unlink(missing_ok=True)
    run(folders, tmp_path / "whole", more)
    for fail_at in ("7", "6"):  # in the third rollout; in the evaluation after the second
        output = tmp_path / f"cut-{fail_at}"
        calls.unlink()
        monkeypatch.setenv("FAIL_AT", fail_at)
        with pytest.raises(RewardError) as caught:
            run(folders, output, more)
        for word in ("f.py:counted", "nan", "plus 1?", "after rollout 2", "--resume"):
            assert word in str(caught.value), str(caught.value)
        assert [folder.name for folder in (output / "checkpoints").iterdir()] == ["step-00000002"]
        monkeypatch.delenv("FAIL_AT")
        run(folders, output, more, "--resume")
        for name in ("train/score", "train/actor_loss", "train/score_letters"):
            assert logged(output, name) == logged(tmp_path / "whole", name), name
        assert logged(output, "eval/win_rate")[-1] == logged(tmp_path / "whole", "eval/win_rate")[-1]
        assert samples(output, 3) == samples(tmp_path / "whole", 3), "the SFT model answers as it did before the break"


def test_a_failure_before_anything_was_learned_leaves_no_checkpoint(folders, tmp_path, monkeypatch):
    folders["calls"].unlink(missing_ok=True)
    monkeypatch.setenv("FAIL_AT", "1")
    with pytest.raises(RewardError, match="nan"):
        run(folders, tmp_path, by_function(folders, "counted"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_function_alone_is_learned(folders, tmp_path):
    flags = (
        "--max_steps 15 --eval_interval 0 --ppo_epochs 2 --per_device_generation_batch_size 32 --kl_coef 0.01 "
        "--per_device_training_batch_size 16 --actor_learning_rate 5e-3 --critic_learning_rate 5e-3 --missing_eos_penalty 0"
    )
    run(folders, tmp_path, by_function(folders, "letters"), flags, critic="base")
    before, after = logged(tmp_path, "eval/score")
    assert after > before + 0.15, "held-out prompts; 0.45 -> 0.83 when this was written"
    assert logged(tmp_path, "eval/win_rate")[-1] > 0.7
