"""--quantization_bit through the scripts: two processes under ZeRO-3 learn what one process learns; what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from errors import UserError
from models.load import load_scalar_model, load_tokenizer
from models.save import save_model
from models.templates import load_template
from tests.launching import logged, write_pairs
from tests.models.test_zero3 import tiny_integers
from tests.several import run_several
from tests.tiny import tiny_checkpoint
from training.utils.engine.build import check_trained_model
from training.utils.flags.parse import parse
from training.utils.flags.steps import RewardArguments

pytestmark = pytest.mark.distributed

COMMON = ["--dtype", "fp32", "--seed", "7", "--logging_steps", "1", "--data_split", "1,1,1", "--eval_fraction", "0.1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    write_pairs(folder / "pairs.jsonl", 120)
    base = tiny_checkpoint(folder / "base", "llama")
    tokenizer = load_tokenizer(base)
    reward = load_scalar_model(base, dtype=torch.float32, seed=5)
    save_model(reward, tokenizer, load_template(base, tokenizer), folder / "reward")
    return folder


def sft_flags(base, output, processes=1, **more):
    chosen = {"max_steps": 3, "max_seq_len": 64, "per_device_train_batch_size": 8 // processes, "quantization_bit": 4}
    chosen |= {"model_name_or_path": base / "base", "lora_dim": 4, "lora_learning_rate": 1e-3,
               "lr_scheduler_type": "constant"} | more  # fmt: skip
    flags = [part for name, value in chosen.items() if value is not None for part in (f"--{name}", str(value))]
    return [*COMMON, "--data_path", str(base / "pairs.jsonl"), "--output_dir", str(output), *flags]


def ppo_flags(base, output, processes):
    models = ["--actor_model_name_or_path", str(base / "base"), "--critic_model_name_or_path", str(base / "reward")]
    batch = ["--per_device_generation_batch_size", str(8 // processes), "--eval_prompts", "4", "--max_steps", "2"]
    batch += ["--per_device_training_batch_size", str(8 // processes), "--num_warmup_steps", "0"]
    sizes = ["--max_prompt_seq_len", "48", "--max_answer_seq_len", "8", "--quantization_bit", "8"]
    for role in ("actor", "critic"):
        sizes += [f"--{role}_zero_stage", "3", f"--{role}_lora_dim", "4", f"--{role}_lora_learning_rate", "1e-3"]
    return [*COMMON, "--data_path", str(base / "pairs.jsonl"), "--output_dir", str(output), *models, *batch, *sizes]


def test_two_processes_under_zero3_learn_as_one_resume_and_export_a_plain_model(base, tmp_path):
    module, two = "training.step1_sft.main", {"zero_stage": 3, "save_steps": 1}
    run_several([(module, sft_flags(base, tmp_path / "one"))], tmp_path, 1)
    run_several([
        (module, sft_flags(base, tmp_path / "two", 2, **two, max_steps=2)),
        (module, [*sft_flags(base, tmp_path / "two", 2, **two), "--resume"]),
        ("training.step3_ppo.main", ppo_flags(base, tmp_path / "ppo", 2)),
    ], tmp_path, 2)
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
    whole = {"lora_dim": None, "lora_learning_rate": None, "quantization_bit": None}
    args = parse(RewardArguments, sft_flags(base, tmp_path / "o", model_name_or_path=base / "int4", **whole))
    with pytest.raises(UserError, match="4-bit integers, which cannot be trained"):
        check_trained_model(args)
