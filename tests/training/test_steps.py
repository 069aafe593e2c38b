"""The steps on two real processes equal the one-process run, whatever is split and where it lies; resumed equals whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import logged, start, write_pairs
from tests.plain import assert_plain_transformers_does_as_we_do
from tests.several import run_several
from tests.tiny import tiny_checkpoint
from tests.training.runs import CURVES, assert_same_curves, assert_same_weights, step
from tests.training.step3_ppo import reward_functions

pytestmark = pytest.mark.distributed

LORA = "--lora_dim 4 --lora_learning_rate 1e-3"
ROLES = "--actor_lora_dim 4 --actor_lora_learning_rate 2e-3 --critic_lora_dim 4 --critic_lora_learning_rate 2e-3"
TEXT = "--enable_ema --ema_decay 0.5 --unsupervised_dataset_name {folder}/text.jsonl --unsup_coef 0.5"
GROUPS = "--num_return_sequences 3 --kl_in loss --loss_reduction sequence"
SHARED = f"{TEXT} {ROLES} --memory_mode shared"
MOVING = "--kl_target 0.2 --kl_horizon 20 --critic_warmup_rollouts 1 --max_approx_kl 0.01 --ppo_epochs 3"
SOURCES = "--reward_function {folder}/f.py:length {folder}/f.py:question --reward_weights 1,2,0.5"
KEPT = "--save_steps 1 --save_total_limit 0"
HOST = "--offload --offload_reference_model --offload_reward_model"
CHECKPOINTING = "--actor_gradient_checkpointing --critic_gradient_checkpointing"
# Runs on one process: name -> step and flags. "reward" is critic and reward model of all others.
ALONE = {
    "sft": ("sft", ""),
    "sft-lora": ("sft", LORA),
    "reward": ("reward", LORA),
    "reward-full": ("reward", ""),
    "dpo": ("dpo", ""),
    "dpo-lora": ("dpo", LORA),
    "dpo-dropout": ("dpo", f"{LORA} --lora_dropout 0.1 {KEPT}"),
    "ppo": ("ppo", f"{TEXT} --ppo_epochs 2"),
    "ppo-lora": ("ppo", f"{TEXT} {ROLES}"),
    "shared": ("ppo", f"{SHARED} {KEPT}"),
    "moving": ("ppo", f"{MOVING} {SOURCES} {KEPT}"),
    "grpo": ("ppo", f"--advantage grpo {GROUPS}"),
    "reinforce++": ("ppo", f"--advantage reinforce++ {GROUPS}"),
}
# Runs on two processes: name -> the run that they must equal, and what they have beside its flags.
TWO = {
    "sft-0": ("sft", ""),
    "sft-1-lora": ("sft-lora", "--zero_stage 1"),
    "sft-2": ("sft", f"--zero_stage 2 {KEPT}"),
    "sft-3-lora": ("sft-lora", "--zero_stage 3"),
    "reward-0-lora": ("reward", ""),
    "reward-2": ("reward-full", f"--zero_stage 2 {KEPT}"),
    "reward-3": ("reward-full", "--zero_stage 3"),
    "dpo-1": ("dpo", "--zero_stage 1"),
    "dpo-3-lora": ("dpo-lora", "--zero_stage 3"),
    "ppo-0-lora": ("ppo-lora", ""),
    "ppo-1": ("ppo", "--actor_zero_stage 1 --critic_zero_stage 1"),
    "ppo-2": ("ppo", f"--actor_zero_stage 2 --critic_zero_stage 2 {KEPT}"),
    "ppo-2-host": ("ppo", f"--actor_zero_stage 2 --critic_zero_stage 1 {HOST}"),
    "ppo-3-offload": ("ppo", f"--actor_zero_stage 3 --critic_zero_stage 3 --offload {KEPT}"),
    # The mode with the least memory: answers of actor and reference without whole weights.
    "ppo-3-lora": ("ppo-lora", f"--actor_zero_stage 3 --critic_zero_stage 3 --generation_weights layerwise {HOST}"),
    "shared-0-1": ("ppo-lora", "--memory_mode shared --critic_zero_stage 1 --offload"),
    "shared-3": ("ppo-lora", f"--memory_mode shared --actor_zero_stage 3 --critic_zero_stage 3 {CHECKPOINTING}"),
    "moving-3-2": ("moving", "--actor_zero_stage 3 --critic_zero_stage 2"),
    "grpo-2": ("grpo", ""),
    "reinforce++-2": ("reinforce++", ""),
}
RESUMED = ("sft-2", "reward-2", "dpo-dropout", "shared", "moving", "ppo-2", "ppo-3-offload")


def kind_and_flags(name: str) -> tuple[str, str]:
    """Return the step and all flags of a run."""
    one, more = TWO.get(name, (name, ""))
    return ALONE[one][0], f"{ALONE[one][1]} {more}"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """The folder with the runs by name: ALONE, TWO, "resumed-" of both, and two in bf16."""
    folder = tmp_path_factory.mktemp("runs")
    text = [json.dumps({"text": f"Story {i}: the fox number {i}." * 5}) for i in range(30)]
    (folder / "text.jsonl").write_text("\n".join(text))
    shutil.copy(reward_functions.__file__, folder / "f.py")
    data, base = write_pairs(folder / "pairs.jsonl", 120), tiny_checkpoint(folder / "base", "llama")

    def run(name: str, kind: str, more: str, processes: int = 1, critic: str = "reward") -> tuple[str, list[str]]:
        more = more.format(folder=folder)
        return step(kind, folder / name, data, base, more, critic=folder / critic, processes=processes)

    half = "--dtype bf16 --max_steps 1"
    first = [run("reward-half", "reward", f"{LORA} {half}"), run("reward", *ALONE["reward"])]
    alone = [run(name, *ALONE[name]) for name in ALONE if name != "reward"]
    run_several([*first, *alone, run("shared-half", "ppo", f"{SHARED} {half}", critic="reward-half")], folder, 1)
    run_several([run(name, *kind_and_flags(name), 2) for name in TWO], folder, 2)
    for processes, runs in ((1, ALONE), (2, TWO)):
        cut = [name for name in RESUMED if name in runs]
        for name in cut:
            leave_after_two_steps(folder / name, folder / f"resumed-{name}")
        again = [(f"resumed-{name}", kind_and_flags(name)) for name in cut]
        run_several([run(name, kind, f"{more} --resume", processes) for name, (kind, more) in again], folder, processes)
    return folder


def leave_after_two_steps(whole: Path, cut: Path) -> None:
    """Write what a kill leaves behind: the checkpoint, a metrics file that ran on, half a checkpoint."""
    shutil.copytree(whole / "checkpoints" / "step-00000002", cut / "checkpoints" / "step-00000002")
    (cut / "checkpoints" / ".writing-step-00000003").mkdir()
    shutil.copy(whole / "metrics.jsonl", cut / "metrics.jsonl")


def saved_in(folder: Path) -> list[Path]:
    """The folders of models that a run has saved."""
    roles = [folder / role for role in ("actor", "critic", "actor_ema") if (folder / role).is_dir()]
    return roles or [folder]


def curves(folder: Path, kind: str) -> tuple[str, ...]:
    """The metrics that a run of this kind has logged and that must not depend on processes or a resume."""
    more = ("critic_loss", "value", "advantage", "text_loss", "kl_coef", "optimizer_steps", "score_length")
    return *CURVES[kind], *(name for name in (f"train/{one}" for one in more) if logged(folder, name))


@pytest.mark.detail(28, 46, 48)
@pytest.mark.parametrize("name", TWO)
def test_two_processes_equal_one(outputs, name):
    one, (kind, flags) = outputs / TWO[name][0], kind_and_flags(name)
    assert_same_curves(outputs / name, one, curves(one, kind))
    for found, expected in zip(saved_in(outputs / name), saved_in(one), strict=True):
        assert_same_weights(found / "model.safetensors", expected / "model.safetensors", 1e-4)
        assert (found / "sanbu_template.json").exists()
        assert (found / "adapter" / "adapter_model.safetensors").exists() == ("lora_dim" in flags)


@pytest.mark.detail(16, 50)
@pytest.mark.parametrize("name", RESUMED)
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(outputs, name):
    whole, resumed = outputs / name, outputs / f"resumed-{name}"
    assert_same_curves(resumed, whole, curves(whole, kind_and_flags(name)[0]), 0.0)
    for found, expected in zip(saved_in(resumed), saved_in(whole), strict=True):
        assert_same_weights(found / "model.safetensors", expected / "model.safetensors")
    assert json.loads((resumed / "sanbu_done.json").read_text())["flags"]["resume"] == "auto"


def test_what_the_runs_learned(outputs):
    """Equal curves would say nothing of runs that stand still."""
    for name in ("ppo", "ppo-lora", "shared", "grpo"):
        kl = logged(outputs / name, "train/kl")
        assert kl[0] == pytest.approx(0.0, abs=1e-6) and max(map(abs, kl)) > 1e-3, name
    actor, average = (load_file(outputs / "ppo" / role / "model.safetensors") for role in ("actor", "actor_ema"))
    assert any(not torch.equal(average[name], value) for name, value in actor.items())
    assert len(set(logged(outputs / "moving", "train/kl_coef"))) > 1
    assert len(logged(outputs / "moving", "train/actor_loss")) == 2, "the critic alone learns in the first rollout"


def test_one_trunk_saves_what_four_models_save(outputs):
    """Also from a reward model that real engines have rounded to bf16: the comparison of weights must stand it."""
    assert_same_curves(
        outputs / "shared", outputs / "ppo-lora", (*curves(outputs / "shared", "ppo"), "eval/reference_score")
    )
    for role in ("actor", "critic"):
        found, expected = outputs / "shared" / role, outputs / "ppo-lora" / role
        for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
            assert_same_weights(found / file, expected / file, 2e-5)
        for file in ("config.json", "adapter/adapter_config.json", "sanbu_template.json"):
            settings = [json.loads((folder / file).read_text()) for folder in (found, expected)]
            for one in settings:
                one["target_modules"] = sorted(one.get("target_modules", ()))  # a set: its order is chance
            assert settings[0] == settings[1], file
    assert (
        logged(outputs / "shared-half", "train/score") and (outputs / "shared-half/critic/model.safetensors").is_file()
    )


def test_all_processes_stop_when_a_function_fails_on_one(outputs):
    files = outputs / "cut", outputs / "pairs.jsonl", outputs / "base"
    flags = f"--reward_function {outputs}/f.py:second --reward_model false"
    done = start(*step("ppo", *files, flags, critic=outputs / "reward", processes=2), processes=2)
    errors = [line for line in done.stderr.splitlines() if "error: --reward_function" in line]
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert len(errors) == 1 and "ValueError: only here" in errors[0] and "f.py:second" in errors[0]


def test_what_the_steps_saved_chats_in_transformers_alone(outputs, tmp_path):
    folders = [outputs / "sft", outputs / "dpo-lora", outputs / "ppo" / "actor", outputs / "ppo-lora" / "actor"]
    assert any(assert_plain_transformers_does_as_we_do(folders, tmp_path))
