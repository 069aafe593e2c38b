"""The three steps on real Chinese text with a BLOOM-shaped model, as commands."""

import json
import math

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.launching import logged, succeed
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.distributed

CHINESE = ("preference_zh/rm_static_zh_train.jsonl.gz", "preference_zh/oasst_rm_zh.jsonl")
TRAIN = ["--max_seq_len", "128", "--max_steps", "12", "--per_device_train_batch_size", "16", "--eval_iters", "1"]


def test_three_steps_in_chinese(shared_dir, tmp_path):
    """Step 1 with micro-batches by a token budget."""
    data = ["--data_path", *(str(shared_dir / "data" / name) for name in CHINESE), "--data_split", "2,4,4"]
    common = [*data, "--dtype", "fp32", "--logging_steps", "1", "--cache_dir", str(tmp_path / "cache")]
    base = tiny_checkpoint(tmp_path / "base", "bloom")
    flags = ["--model_name_or_path", str(base), "--output_dir", str(tmp_path / "sft"), "--max_tokens_per_device", "2048"]
    succeed("training.step1_sft.main", [*common, *TRAIN, *flags, "--learning_rate", "5e-3"])
    before, *_, after = logged(tmp_path / "sft", "eval/perplexity")
    assert after < 0.8 * before, "twelve steps must teach a random model something about the language"

    flags = ["--model_name_or_path", str(tmp_path / "sft"), "--output_dir", str(tmp_path / "reward")]
    out = succeed("training.step2_reward.main", [*common, *TRAIN, *flags, "--learning_rate", "1e-3"])
    assert "held-out accuracy" in out
    losses = logged(tmp_path / "reward", "train/loss")
    assert all(math.isfinite(loss) for loss in losses)
    assert abs(losses[0] - math.log(2)) < 0.6, "an untrained reward model cannot tell the answers apart"

    flags = ["--actor_model_name_or_path", str(tmp_path / "sft"), "--critic_model_name_or_path", str(tmp_path / "reward")]
    flags += ["--output_dir", str(tmp_path / "ppo"), "--max_steps", "2", "--generation_batches", "2", "--ppo_epochs", "2"]
    flags += ["--per_device_generation_batch_size", "8", "--per_device_training_batch_size", "8", "--eval_prompts", "8"]
    succeed("training.step3_ppo.main", [*common, *flags, "--max_prompt_seq_len", "200", "--max_answer_seq_len", "16"])
    assert logged(tmp_path / "ppo", "train/kl")[0] == 0.0
    assert max(logged(tmp_path / "ppo", "train/first_ratio_deviation")) < 1e-4
    assert len(logged(tmp_path / "ppo", "eval/score")) == 2

    # What was saved opens in transformers alone.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ppo" / "actor")
    assert tokenizer("Hello 你好").input_ids == AutoTokenizer.from_pretrained(base)("Hello 你好").input_ids
    AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "actor")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").config.num_labels == 1
    assert set(json.loads((tmp_path / "reward" / "config.json").read_text())) >= {"reward_mean", "reward_std"}
