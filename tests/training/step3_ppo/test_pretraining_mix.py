"""The language-model loss of plain text in the same optimizer step as PPO's, not in a second one."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from errors import UserError
from models.load import load_causal_lm
from tests.training.step3_ppo.small_ppo import build, parsed, rollout
from training.step3_ppo.pretraining_mix import PretrainingMix
from training.utils.data.cache import CachedData

pytestmark = pytest.mark.ppo
COEF = 3.7


@pytest.fixture
def text(tmp_path):
    """Enough text for some steps."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"The quick fox number {i} jumps over {i + 1} dogs."}) + "\n" for i in range(9)))
    return file


def mixed(models, tmp_path, text, *flags):
    return build(models, tmp_path, "--unsupervised_dataset_name", str(text), "--unsup_coef", str(COEF), *flags)


def gradients(trainer, experience, monkeypatch) -> tuple[list[dict], dict]:
    """What stands in the actor's gradients each time it is about to step, and the metrics of the update."""
    actor, found, step = trainer.engine.actor, [], trainer.engine.actor.step

    def before_step():
        if actor.is_gradient_accumulation_boundary():
            found.append({name: weight.grad.clone() for name, weight in actor.module.model.named_parameters()})
        step()

    monkeypatch.setattr(actor, "step", before_step)
    return found, trainer.train_rlhf(experience, 1)


@pytest.mark.detail(40)
@pytest.mark.parametrize("size", ["4", "1"])
def test_gradient_is_that_of_ppo_plus_coef_times_that_of_the_text_in_one_step(models, tmp_path, text, monkeypatch, size):
    cut = ("--per_device_training_batch_size", size, "--gradient_accumulation_steps", str(4 // int(size)), "--temperature", "0.7")
    plain = build(models, tmp_path / "plain", *cut)
    trainer = mixed(models, tmp_path / "mixed", text, *cut)
    experience = rollout(plain, 1)
    alone, before = gradients(plain, experience, monkeypatch)
    joint, metrics = gradients(trainer, experience, monkeypatch)
    assert len(alone) == len(joint) == 1, "one optimizer step each"

    model = load_causal_lm(models[0], dtype=torch.float32)
    blocks = torch.tensor([trainer.mixture.blocks[place]["input_ids"] for place in trainer.mixture.examples(0)])
    assert blocks.shape == (4, 16)
    loss = F.cross_entropy(model(input_ids=blocks).logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
    loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(joint[0][name], alone[0][name] + COEF * weight.grad, atol=2e-6, rtol=1e-4)
    assert metrics["text_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["actor_loss"] == pytest.approx(before["actor_loss"], abs=1e-5)
    assert "text_loss" not in before


@pytest.mark.parametrize("off", [["--unsup_coef", "0"], []])
def test_without_coefficient_or_text_nothing_changes(models, tmp_path, text, off):
    named = ["--unsupervised_dataset_name", str(text)] if off else []
    trainers = build(models, tmp_path / "a"), build(models, tmp_path / "b", *named, *off)
    assert trainers[1].mixture is None
    for trainer in trainers:
        trainer.train_rlhf(rollout(trainer, 1), 1)
    weights = [dict(trainer.engine.actor.module.named_parameters()) for trainer in trainers]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def a_mix(world_size: int = 1, rank: int = 0, blocks: int = 10, size: int = 4, per_device: int = 2, budget: int = 0):
    rows = [{"input_ids": [place, *range(100, 105)], "prompt_length": 0, "length": 6} for place in range(blocks)]
    args = SimpleNamespace(seed=3, max_tokens_per_device=budget, per_device_training_batch_size=per_device, unsup_coef=1.0)
    run = SimpleNamespace(world_size=world_size, rank=rank, device=torch.device("cpu"))
    from datasets import Dataset

    return PretrainingMix(CachedData({"train": Dataset.from_list(rows)}, {}, "", None), run, args, 0, size)


def test_every_block_comes_once_before_any_comes_again_and_steps_can_start_anywhere():
    mix = a_mix()
    read = [example for step in range(5) for example in mix.examples(4 * step)]
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10))
    assert read[:10] != read[10:]
    assert [a_mix().examples(step) for step in (12, 4)] == [read[12:16], read[4:8]]


@pytest.mark.parametrize("budget", [0, 12])
@pytest.mark.parametrize(("world_size", "size"), [(1, 4), (2, 4), (2, 5), (3, 4)])
def test_processes_share_the_blocks_of_one(world_size, size, budget):
    shares = [a_mix(world_size, rank, size=size, budget=budget).micro_batches(size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    real = [first for share in shares for micro in share for first in micro.input_ids[micro.loss_mask.any(1), 0].tolist()]
    assert sorted(real) == sorted(a_mix(size=size).examples(size))
    targets = sum(int(micro.loss_mask.sum()) for share in shares for micro in share)
    assert targets == size * a_mix().targets == size * 5
    assert all(micro.input_ids.shape[0] <= 2 for share in shares for micro in share)


def test_the_column_needs_the_data_set():
    with pytest.raises(UserError, match="--unsupervised_text_column has no effect without --unsupervised_dataset_name"):
        parsed("--unsupervised_text_column x")
