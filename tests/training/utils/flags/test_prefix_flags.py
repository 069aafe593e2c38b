"""The flags of P-Tuning: the published ones mean what they meant, and what does not go together is told."""

import pytest

from errors import UserError
from training.utils.flags.parse import parse
from training.utils.flags.steps import PPOArguments, RewardArguments, SFTArguments

ONE = ["--model_name_or_path", "m", "--output_dir", "o"]
TWO = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c", "--output_dir", "o"]
# ChatGLM's ptuning/train.sh and ds_train_finetune.sh, word for word but for shell variables
PUBLISHED = (
    "--do_train --train_file AdvertiseGen/train.json --validation_file AdvertiseGen/dev.json --preprocessing_num_workers 10 "
    "--prompt_column content --response_column summary --overwrite_cache --model_name_or_path THUDM/chatglm-6b "
    "--output_dir output/adgen-chatglm-6b-pt-128-2e-2 --overwrite_output_dir --max_source_length 64 --max_target_length 128 "
    "--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 16 --predict_with_generate "
    "--max_steps 3000 --logging_steps 10 --save_steps 1000 --learning_rate 2e-2 --pre_seq_len 128 --quantization_bit 4"
)


@pytest.mark.parametrize("spelling", ["_", "-"])
def test_the_published_line(spelling):
    argv = PUBLISHED.split()
    argv = [word.replace("_", "-") if word.startswith("--") and spelling == "-" else word for word in argv]
    args = parse(SFTArguments, argv)
    assert (args.pre_seq_len, args.quantization_bit, args.learning_rate) == (128, 4, 2e-2)
    assert args.prefix_options() == {"pre_seq_len": 128, "prefix_projection": False, "ptuning_checkpoint": None}


def test_steps_1_and_2(tmp_path):
    for args_class in (SFTArguments, RewardArguments):
        assert parse(args_class, ONE).prefix_options()["pre_seq_len"] == 0
        args = parse(args_class, [*ONE, "--pre_seq_len", "8", "--prefix_projection", "--ptuning_checkpoint", str(tmp_path)])
        found = {"pre_seq_len": 8, "prefix_projection": True, "ptuning_checkpoint": str(tmp_path)}
        assert args.prefix_options() == found


def test_in_step_3_the_plain_names_are_the_actors(tmp_path):
    argv = ["--pre_seq_len", "8", "--prefix_projection", "--ptuning_checkpoint", str(tmp_path), "--critic_pre_seq_len", "4"]
    args = parse(PPOArguments, [*TWO, *argv])
    assert args.prefix_options("actor") == {
        "pre_seq_len": 8, "prefix_projection": True, "ptuning_checkpoint": str(tmp_path),
    }  # fmt: skip
    assert args.prefix_options("critic") == {"pre_seq_len": 4, "prefix_projection": False, "ptuning_checkpoint": None}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--pre_seq_len -1", "--pre_seq_len -1: must not be negative"),
        ("--pre_seq_len 8 --lora_dim 4", "--pre_seq_len and --lora_dim: .* not trained together"),
        ("--ptuning_checkpoint . --lora_dim 4", "--ptuning_checkpoint and --lora_dim: .* not trained together"),
        ("--prefix_projection", "--prefix_projection has no effect without --pre_seq_len"),
        ("--ptuning_checkpoint /nowhere", "--ptuning_checkpoint /nowhere: no such folder"),
    ],
)
def test_what_does_not_go_together(more, words):
    with pytest.raises(UserError, match=words):
        parse(SFTArguments, [*ONE, *more.split()])


def test_step_3_names_the_models_flag():
    with pytest.raises(UserError, match="--critic_pre_seq_len and --critic_lora_dim"):
        parse(PPOArguments, [*TWO, "--critic_pre_seq_len", "8", "--critic_lora_dim", "4"])


def test_a_rate_for_whole_weights_is_said_once(caplog):
    parse(SFTArguments, [*ONE, "--pre_seq_len", "8"])
    assert [record.getMessage() for record in caplog.records if "--learning_rate is at its default" in record.getMessage()]
    caplog.clear()
    parse(SFTArguments, [*ONE, "--pre_seq_len", "8", "--learning_rate", "2e-2"])
    assert not caplog.records
