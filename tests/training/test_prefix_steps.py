"""P-Tuning through the steps as a user runs them: two processes equal one, resumed equals whole, the prefix alone is saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inference.chatbot import main as chat
from models.heads import prefix_length, score_layer
from models.load import load_causal_lm, load_scalar_model
from tests.launching import logged, write_pairs
from tests.several import run_several
from tests.tiny import tiny_checkpoint
from tests.training.runs import assert_same_curves, step
from training.evaluate.reward_scores import main as rw_eval
from training.evaluate.side_by_side import main as prompt_eval
from training.utils.flags.parse import parse
from training.utils.flags.steps import PromptEvalArguments, RewardEvalArguments

pytestmark = pytest.mark.distributed

LENGTH = 6
SUPERVISED, PPO = "--learning_rate 1e-2", "--actor_learning_rate 1e-2 --critic_learning_rate 1e-2 --max_steps 2 --ppo_epochs 2"
PPO += " --adam_epsilon 1e-8"
PREFIX = f"{SUPERVISED} --pre_seq_len {LENGTH}"
PROJECTED = f"{PREFIX} --prefix_projection"
ZERO3 = f"{PROJECTED} --zero_stage 3 --save_steps 1 --save_total_limit 0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Base models and the output folders of all runs by name. ..-2: by two processes under ZeRO-3."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_pairs(folder / "pairs.jsonl", 120)
    for family in ("llama", "opt"):
        tiny_checkpoint(folder / f"base-{family}", family)

    def run(kind: str, name: str, model: str, more: str, processes: int = 1) -> tuple[str, list[str]]:
        return step(kind, folder / name, data, folder / model, more, critic=folder / "reward", processes=processes)

    alone = [
        run("sft", "sft", "base-opt", PREFIX),
        run("reward", "reward", "base-opt", PROJECTED),
        run("sft", "llama", "base-llama", PROJECTED),
        run("ppo", "ppo", "sft", PPO),
        run("ppo", "new", "base-opt", f"{PPO} --actor_pre_seq_len 4 --dtype bf16 --max_steps 1"),
    ]
    run_several(alone, folder, 1)
    mark = folder / "llama-2" / "checkpoints" / "step-00000002"
    together = [
        run("sft", "llama-2", "base-llama", ZERO3, 2),
        run("sft", "resumed-2", "base-llama", f"{ZERO3} --resume {mark}", 2),
        run("ppo", "ppo-2", "sft", f"{PPO} --actor_zero_stage 3 --critic_zero_stage 3", 2),
    ]
    run_several(together, folder, 2)
    return {run.name: run for run in folder.iterdir()}


def prompts_in(folder: Path) -> torch.Tensor:
    """The keys and values that a folder of peft's holds."""
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def holds_only_a_prefix(folder: Path, base: Path) -> bool:
    """The prefix, what travels with it, and no weight of the model that it names."""
    names = {file.name for file in folder.iterdir()}
    config = json.loads((folder / "adapter_config.json").read_text())
    travelling = {"adapter_model.safetensors", "config.json", "tokenizer.json", "sanbu_template.json"}
    whole = [name for name in names if name.startswith(("model", "pytorch_model"))]
    return config["base_model_name_or_path"] == str(base.resolve()) and travelling <= names and not whole


def test_steps_1_and_2_save_the_prefix_alone(runs):
    for name in ("sft", "reward"):
        assert holds_only_a_prefix(runs[name], runs["base-opt"])
        assert len(set(logged(runs[name], "train/loss"))) == 3
    assert prefix_length(load_causal_lm(runs["sft"], dtype=torch.float32)) == LENGTH
    scalar = load_scalar_model(runs["reward"], dtype=torch.float32, seed=1)
    saved = load_file(runs["reward"] / "adapter_model.safetensors")
    assert torch.equal(score_layer(scalar).weight, saved["base_model.score.weight"])
    assert scalar.config.reward_std > 0


def test_step_1_on_two_processes_under_zero_3_equals_one(runs):
    assert_same_curves(runs["llama-2"], runs["llama"], ("train/loss", "eval/loss"))
    torch.testing.assert_close(prompts_in(runs["llama-2"]), prompts_in(runs["llama"]), atol=1e-3, rtol=0)


def test_resumed_is_bit_for_bit_the_uninterrupted_run(runs):
    assert logged(runs["resumed-2"], "train/loss") == logged(runs["llama-2"], "train/loss")[2:]
    assert torch.equal(prompts_in(runs["resumed-2"]), prompts_in(runs["llama-2"]))


def test_step_3_goes_on_with_the_prefixes_of_steps_1_and_2(runs):
    """Two processes under ZeRO-3 equal one; the reference is the model as step 1 left it, so the penalty starts at 0."""
    assert_same_curves(runs["ppo-2"], runs["ppo"], ("train/score", "train/actor_loss", "train/critic_loss", "eval/kl"))
    first, last = logged(runs["ppo"], "eval/kl")
    assert first == pytest.approx(0, abs=1e-4) and abs(last) > 1e-4
    for output in (runs["ppo"], runs["ppo-2"]):
        for role, start in (("actor", "sft"), ("critic", "reward")):
            assert holds_only_a_prefix(output / role, runs["base-opt"])
            assert (prompts_in(output / role) - prompts_in(runs[start])).abs().max() > 1e-3


def test_a_new_prefix_in_step_3_starts_beside_a_reference_without_one(runs):
    """In bf16 and without ZeRO: what is saved is the optimizer's float32 prefix, not its rounded copy."""
    assert abs(logged(runs["new"], "eval/kl")[0]) > 1e-2
    found = prompts_in(runs["new"] / "actor")
    assert found.dtype == torch.float32 and found.shape[0] == 4
    begun = load_causal_lm(runs["base-opt"], dtype=torch.bfloat16, pre_seq_len=4, seed=7)
    moved = (found - next(p for p in begun.parameters() if p.requires_grad)).abs()
    assert 0 < moved.max() < 0.1
    assert not torch.equal(found, found.bfloat16().float())


def test_evaluations_and_chat_read_a_prefix(runs, tmp_path, capsys):
    output = tmp_path / "scores.json"
    rw_eval(parse(RewardEvalArguments, ["--model_name_or_path", str(runs["reward"]), "--output", str(output)]))
    assert json.loads(output.read_text())["summary"]["pairs"] == 6
    models = ["--model_name_or_path_baseline", str(runs["base-opt"]), "--model_name_or_path_finetune", str(runs["sft"])]
    output = tmp_path / "answers.json"
    prompt_eval(parse(PromptEvalArguments, [*models, "--max_new_tokens", "8", "--output", str(output)]))
    assert any(row["baseline"] != row["finetuned"] for row in json.loads(output.read_text())["prompts"])
    capsys.readouterr()
    answers = []
    for _ in range(2):
        assert chat(["--path", str(runs["ppo-2"]), "--prompt", "What is 4 plus 1?", "--greedy", "--max_new_tokens", "8"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != "\n"


def test_a_moved_base_and_a_reward_model_are_told_in_a_sentence(runs, tmp_path, capsys):
    folder = shutil.copytree(runs["sft"], tmp_path / "sft")
    file = folder / "adapter_config.json"
    gone = str(tmp_path / "missing")
    file.write_text(file.read_text().replace(str(runs["base-opt"]), gone))
    assert chat(["--path", str(folder), "--prompt", "Hi"]) == 2
    told = capsys.readouterr().err
    assert "adapter_config.json" in told and gone in told and "correct that field" in told
    assert chat(["--path", str(runs["reward"]), "--prompt", "Hi"]) == 2
    assert "is a reward model" in capsys.readouterr().err
