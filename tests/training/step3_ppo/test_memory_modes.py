"""--memory_mode: six steps of PPO over one trunk are those of four models, on two processes as on one; and offload."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from errors import UserError
from tests.launching import logged, write_pairs
from tests.models.test_shared_trunk import held, write_reward_model
from tests.several import run_several
from tests.tiny import tiny_checkpoint
from tests.training.step3_ppo.small_ppo import build, rollout
from training.step3_ppo.evaluation import HeldOut
from training.utils.flags.parse import parse
from training.utils.flags.steps import PPOArguments

pytestmark = pytest.mark.ppo
NAMES = ("train/score", "train/actor_loss", "train/critic_loss", "train/kl", "train/value")
LORA = ("--actor_lora_dim", "4", "--critic_lora_dim", "4", "--actor_lora_learning_rate", "2e-3", "--critic_lora_learning_rate",
        "2e-3")  # fmt: skip
SHARED = ("--memory_mode", "shared", *LORA)
STEPS = 6


def stages(actor: int, critic: int | None = None) -> tuple[str, ...]:
    return "--actor_zero_stage", str(actor), "--critic_zero_stage", str(actor if critic is None else critic)


# On two processes, by the one-process run that they must equal.
TWOS = {
    "separate-2-frozen-on-host": ("full", (*stages(2, 1), "--offload", "--offload_reference_model", "--offload_reward_model")),
    "separate-3-offload": ("full", (*stages(3), "--offload")),
    "shared-0-1-offload": ("lora", (*SHARED, *stages(0, 1), "--offload")),
    "shared-3": ("lora", (*SHARED, *stages(3), "--actor_gradient_checkpointing", "--critic_gradient_checkpointing")),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    actor = tiny_checkpoint(folder / "actor", "llama")
    yield actor, write_reward_model(actor, folder / "reward")
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """Folders of whole runs by name. On one process: "step2" and over it "chain", both in bf16; "full", "lora", "shared",
    "resumed". On two: TWOS.
    """
    folder = tmp_path_factory.mktemp("runs")
    data = write_pairs(folder / "pairs.jsonl", 60)

    def step(name: str, processes: int, *more: str) -> tuple[str, list[str]]:
        # A large epsilon keeps Adam from making steps of full size out of rounding.
        return "training.step3_ppo.main", [
            "--actor_model_name_or_path", str(models[0]), "--critic_model_name_or_path", str(models[1]), "--dtype", "fp32",
            "--data_path", str(data), "--data_split", "0,0,1", "--output_dir", str(folder / name), "--max_prompt_seq_len", "48",
            "--max_answer_seq_len", "6", "--num_warmup_steps", "0", "--max_steps", str(STEPS), "--actor_learning_rate", "1e-3",
            "--critic_learning_rate", "1e-3", "--adam_epsilon", "1e-2", "--eval_prompts", str(4 - 2 * processes),
            "--per_device_generation_batch_size", str(4 // processes), "--per_device_training_batch_size", str(2 // processes),
            "--eval_interval", "0", "--save_steps", "0", *more,
        ]  # fmt: skip

    mark = folder / "shared" / "checkpoints" / "step-00000003"
    keep = ("--save_steps", "3", "--enable_ema", "--ema_decay", "0.5")
    half = ("--dtype", "bf16", "--critic_model_name_or_path", str(folder / "step2"), "--max_steps", "1")
    step2 = ("training.step2_reward.main", [
        "--model_name_or_path", str(models[0]), "--output_dir", str(folder / "step2"), "--data_path", str(data), "--data_split",
        "0,1,0", "--dtype", "bf16", "--max_seq_len", "48", "--max_steps", "3", "--lora_dim", "2", "--lora_learning_rate", "1e-2",
    ])  # fmt: skip
    run_several(
        [step2, step("chain", 1, *SHARED, *half), step("full", 1), step("lora", 1, *LORA), step("shared", 1, *SHARED, *keep),
         step("resumed", 1, *SHARED, *keep, "--resume", str(mark))],
        folder, 1,
    )  # fmt: skip
    run_several([step(name, 2, *flags) for name, (_, flags) in TWOS.items()], folder, 2)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", TWOS)
def test_steps_on_two_processes_are_those_of_one(runs, name):
    for metric in NAMES:
        found, expected = logged(runs / name, metric), logged(runs / TWOS[name][0], metric)
        assert len(found) == STEPS and found == pytest.approx(expected, abs=1e-4), metric
    kl = logged(runs / name, "train/kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and max(map(abs, kl)) > 1e-2, "the actor learned"


@pytest.mark.distributed
def test_steps_over_one_trunk_are_those_of_four_models(runs):
    for metric in (*NAMES, "eval/score", "eval/reference_score", "eval/win_rate"):
        found, expected = logged(runs / "shared", metric), logged(runs / "lora", metric)
        assert found and found == pytest.approx(expected, abs=1e-4), metric


@pytest.mark.distributed
@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("name", ["shared", "shared-0-1-offload", "shared-3"])
def test_what_is_saved_is_what_four_models_save(runs, name, role):
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        found, expected = (load_file(runs / run / role / file) for run in (name, "lora"))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=2e-5, rtol=1e-4)
    for file in ("config.json", "adapter/adapter_config.json", "sanbu_template.json"):
        found, expected = (json.loads((runs / run / role / file).read_text()) for run in (name, "lora"))
        for settings in (found, expected):
            settings["target_modules"] = sorted(settings.get("target_modules", ()))   # a set: its order is chance
        assert found == expected, file


@pytest.mark.distributed
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs):
    for metric in (*NAMES, "eval/score"):
        found, whole = logged(runs / "resumed", metric), logged(runs / "shared", metric)
        assert found and found == whole[-len(found) :], metric
    for role in ("actor", "critic", "actor_ema"):
        found, whole = (load_file(runs / name / role / "model.safetensors") for name in ("resumed", "shared"))
        assert all(torch.equal(found[key], tensor) for key, tensor in whole.items()), role
    average, actor = (load_file(runs / "shared" / role / "model.safetensors") for role in ("actor_ema", "actor"))
    assert any(not torch.equal(average[key], tensor) for key, tensor in actor.items())


@pytest.mark.distributed
def test_what_step_2_leaves_in_half_precision_is_known_as_the_trunk_s_own(runs):
    """Real engines round differently from a hand-made adapter; the comparison of weights must stand it."""
    assert logged(runs / "chain", "train/score") and (runs / "chain" / "critic" / "model.safetensors").is_file()
    adapter = load_file(runs / "step2" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 1e-3 for name, tensor in adapter.items() if "lora_B" in name)


# --- inside one process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [("--dtype", "fp32"), ("--dtype", "bf16", *stages(2)), ("--quantization_bit", "8", *stages(1))], ids=str
)
def test_the_engines_hold_the_trunk_once_and_leave_it_as_it_was(models, tmp_path, flags):
    trainer = build(models, tmp_path, *SHARED, *flags)
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
    flags = ("--memory_mode", "shared", "--actor_lora_dim", "4", "--num_return_sequences", "3", "--advantage", "rloo",
             "--per_device_training_batch_size", "12")  # fmt: skip
    trainer = build(models, tmp_path, *flags)
    assert trainer.engine.critic is None and trainer.engine.reward is not None
    expected = build(models, tmp_path / "separate", "--memory_mode", "separate", *flags[2:])
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


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--actor_lora_dim", "0"), "--actor_lora_dim is 0"),
        (("--critic_lora_dim", "0"), "--critic_lora_dim is 0"),
        (("--offload_reference_model",), "--offload_reference_model contradicts"),
        (("--offload_reward_model",), "--offload_reward_model contradicts"),
        (("--actor_zero_stage", "3"), "give 3 to both"),
        (("--critic_zero_stage", "3", "--actor_zero_stage", "2"), "give 3 to both"),
        (("--actor_pre_seq_len", "4"), "are not trained together"),
        (("--advantage", "reinforce++", "--critic_lora_dim", "0", "--critic_pre_seq_len", "4"), "--critic_pre_seq_len with"),
        (("--memory_mode", "share"), "memory_mode"),
    ],
)
def test_flags_that_contradict_a_shared_trunk(flags, words):
    paths = ("--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c", "--output_dir", "o", "--data_path", "d")
    start = ("--memory_mode", "shared", "--actor_lora_dim", "4", "--critic_lora_dim", "4")
    parse(PPOArguments, [*paths, *start])
    with pytest.raises(UserError, match=words):
        parse(PPOArguments, [*paths, *start, *flags])
