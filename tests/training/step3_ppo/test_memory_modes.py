"""--memory_mode shared: the trunk is held once, and adapters leave it alone. tests/training/test_steps.py has whole runs."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from errors import UserError
from tests.models.test_shared_trunk import held, write_reward_model
from tests.tiny import tiny_checkpoint
from tests.training.step3_ppo.small_ppo import build, parsed, rollout
from training.step3_ppo.evaluation import HeldOut

pytestmark = pytest.mark.ppo
SHARED = ("--memory_mode", "shared", "--actor_lora_dim", "4", "--critic_lora_dim", "4")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    actor = tiny_checkpoint(folder / "actor", "llama")
    yield actor, write_reward_model(actor, folder / "reward")
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "flags", ["--dtype fp32", "--dtype bf16 --actor_zero_stage 2 --critic_zero_stage 2", "--quantization_bit 8"]
)
def test_the_engines_hold_the_trunk_once_and_leave_it_as_it_was(models, tmp_path, flags):
    trainer = build(models, tmp_path, *SHARED, *flags.split())
    engine = trainer.engine
    trunk = {name: tensor.clone() for name, tensor in engine.ref.state_dict().items()}
    experience = rollout(trainer, 1)
    for number in (1, 2):
        trainer.train_rlhf(rollout(trainer, number), number)
    assert rollout(trainer, 3).metrics["kl"] != experience.metrics["kl"], "the actor learned"
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in engine.ref.state_dict().items())
    networks = [engine.ref, engine.reward, engine.actor.module, engine.critic.module]
    everything = held(*networks)
    small = {
        tensor.data_ptr(): tensor.untyped_storage().nbytes()
        for network in networks
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
        if "lora_" in name or "frozen_" in name or "score" in name
    }
    assert sum(everything.values()) <= 1.01 * sum(held(engine.ref).values()) + sum(small.values())


@pytest.mark.detail(45)
def test_the_reference_answers_without_any_adapter(models, tmp_path):
    """Held-out answers of the reference are the same before and after the actor learned, and the actor's are not."""
    trainer = build(models, tmp_path, *SHARED, "--actor_lora_learning_rate", "3e-2", "--eval_prompts", "4")
    dataset = [{"prompt_ids": [20 + row, 30, 40], "length": 3} for row in range(4)]
    held_out = HeldOut(trainer.engine, dataset, trainer.args, trainer.sampler)
    before = held_out._answers(trainer.engine.ref)
    assert torch.equal(before.input_ids, held_out._answers().input_ids), "B = 0: the actor starts as the reference"
    for number in range(1, 4):
        trainer.train_rlhf(rollout(trainer, number), number)
    assert torch.equal(before.input_ids, held_out._answers(trainer.engine.ref).input_ids)
    assert not torch.equal(before.log_probs, held_out._answers().log_probs)


def test_without_a_critic_two_models_share(models, tmp_path):
    flags = "--actor_lora_dim 4 --num_return_sequences 3 --advantage rloo --per_device_training_batch_size 12"
    trainer = build(models, tmp_path, "--memory_mode shared", flags)
    assert trainer.engine.critic is None and trainer.engine.reward is not None
    expected = build(models, tmp_path / "separate", "--memory_mode separate", flags)
    found, other = (rollout(one, 1) for one in (trainer, expected))
    torch.testing.assert_close(found.scores, other.scores, atol=1e-5, rtol=1e-5)
    assert trainer.train_rlhf(found, 1)["actor_loss"] == pytest.approx(expected.train_rlhf(other, 1)["actor_loss"], abs=1e-5)


def test_a_reward_model_of_another_actor_ends_the_run_with_a_sentence(models, tmp_path):
    other = tiny_checkpoint(tmp_path / "other", "llama", seed=3)
    with pytest.raises(UserError, match=r"train step 2 with --lora_dim from .*other, or take --memory_mode separate"):
        build((other, models[1]), tmp_path / "out", *SHARED)


def test_an_actor_with_a_prefix_ends_the_run_with_a_sentence(models, tmp_path):
    prefixed = shutil.copytree(models[0], tmp_path / "prefixed", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = {"peft_type": "PREFIX_TUNING", "base_model_name_or_path": str(models[0])}
    (prefixed / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"prompt_embeddings": torch.zeros(3, 64)}, prefixed / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"prefixed has a prefix .* take --memory_mode separate"):
        build((prefixed, models[1]), tmp_path / "out", *SHARED)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--actor_lora_dim 0", "--actor_lora_dim is 0"),
        ("--critic_lora_dim 0", "--critic_lora_dim is 0"),
        ("--offload_reference_model", "--offload_reference_model contradicts"),
        ("--offload_reward_model", "--offload_reward_model contradicts"),
        ("--actor_zero_stage 3", "give 3 to both"),
        ("--critic_zero_stage 3 --actor_zero_stage 2", "give 3 to both"),
        ("--actor_pre_seq_len 4", "are not trained together"),
        ("--advantage reinforce++ --critic_lora_dim 0 --critic_pre_seq_len 4", "--critic_pre_seq_len with"),
        ("--memory_mode share", "memory_mode"),
    ],
)
def test_flags_that_contradict_a_shared_trunk(flags, words):
    parsed(*SHARED)
    with pytest.raises(UserError, match=words):
        parsed(*SHARED, flags)
