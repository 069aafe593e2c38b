"""--quantization_bit through the scripts: two processes under ZeRO-3 learn what one process learns; what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from errors import UserError
from models.checkpoint_folder import open_checkpoint
from tests.launching import logged, write_pairs
from tests.models.test_zero3 import tiny_integers
from tests.several import run_several
from tests.tiny import tiny_checkpoint, tiny_reward_model
from tests.training.runs import step
from training.utils.engine.build import check_trained_model
from training.utils.flags.parse import parse
from training.utils.flags.steps import RewardArguments

pytestmark = pytest.mark.distributed

INTEGERS = "--quantization_bit 4 --lora_dim 4 --lora_learning_rate 1e-3 --lr_scheduler_type constant"
PPO = "--actor_zero_stage 3 --critic_zero_stage 3 --actor_lora_dim 4 --critic_lora_dim 4 --quantization_bit 8 --max_steps 2"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    write_pairs(folder / "pairs.jsonl", 120)
    base = tiny_checkpoint(folder / "base", "llama")
    tiny_reward_model(base, folder / "reward", seed=5)
    return folder


def test_two_processes_under_zero3_learn_as_one_resume_and_export_a_plain_model(base, tmp_path):
    start, split = (base / "pairs.jsonl", base / "base"), f"{INTEGERS} --zero_stage 3 --save_steps 1"
    run_several([step("sft", tmp_path / "one", *start, INTEGERS)], tmp_path, 1)
    runs = [
        step("sft", tmp_path / "two", *start, f"{split} --max_steps 2", processes=2),
        step("sft", tmp_path / "two", *start, f"{split} --resume", processes=2),
        step("ppo", tmp_path / "ppo", *start, PPO, critic=base / "reward", processes=2),
    ]
    run_several(runs, tmp_path, 2)
    one, two = (logged(tmp_path / name, "train/loss") for name in ("one", "two"))
    assert len(one) == 3 and one[2] < one[0] and one == pytest.approx(two, abs=1e-4)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two")]
    states = [model.state_dict() for model in models]
    original = AutoModelForCausalLM.from_pretrained(base / "base").state_dict()
    assert states[0].keys() == states[1].keys() == original.keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=2e-4, rtol=1e-3)
    assert "quantization_bit" not in json.loads((tmp_path / "two" / "config.json").read_text())
    first, second = logged(tmp_path / "ppo", "train/kl")
    assert abs(first) < 1e-6 and second != first  # the same integers at first; then the adapter has moved
    assert (tmp_path / "ppo" / "actor" / "config.json").is_file()


def test_integers_are_not_trained_whole(base, tmp_path):
    tiny_integers(base / "int4")
    args = parse(RewardArguments, step("reward", tmp_path / "o", base / "pairs.jsonl", base / "int4")[1])
    with pytest.raises(UserError, match="4-bit integers, which cannot be trained"):
        check_trained_model(args, open_checkpoint(args.model_name_or_path), tokenizer=None)
