"""The command lines of ChatGLM's ptuning and its Ascend port are understood: same names, same values, or one line."""

import pytest

from training.utils.flags.former import former_flags
from training.utils.flags.parse import flag_names, parse
from training.utils.flags.steps import SFTArguments

# script, model, batch x accumulation, learning rate, steps, lengths of prompt and answer, the rest
ROWS = [
    ("train_chatglm", "chatglm-6b", 1, 16, 2e-2, 3000, (64, 64), "prefix validation"),
    ("train_chatglm2", "chatglm2-6b", 1, 16, 2e-2, 3000, (64, 128), "prefix validation"),
    ("train_chat", "chatglm2-6b", 1, 16, 1e-2, 3000, (256, 256), "prefix validation history"),
    ("ds_train_finetune", "chatglm2-6b", 4, 1, 1e-4, 5000, (64, 64), "test fp16"),
]


@pytest.mark.parametrize("spelling", ["_", "-"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_training_scripts(row, spelling, caplog):
    _, model, batch, accumulation, rate, steps, (source, target), words = row
    argv = f"""--do_train --train_file AdvertiseGen/train.json --prompt_column content --response_column summary
        --overwrite_cache --model_name_or_path THUDM/{model} --output_dir output --overwrite_output_dir
        --max_source_length {source} --max_target_length {target} --per_device_train_batch_size {batch}
        --per_device_eval_batch_size 1 --gradient_accumulation_steps {accumulation} --predict_with_generate
        --max_steps {steps} --logging_steps 10 --save_steps 1000 --learning_rate {rate}""".split()
    more = {
        "prefix": ["--pre_seq_len", "128", "--quantization_bit", "4"], "history": ["--history_column", "history"],
        "validation": ["--validation_file", "AdvertiseGen/dev.json"], "test": ["--test_file", "AdvertiseGen/dev.json"],
        "fp16": ["--fp16"],
    }  # fmt: skip
    argv += [flag for word in words.split() for flag in more[word]]
    args = parse(SFTArguments, [word.replace("_", spelling) if word.startswith("--") else word for word in argv])
    assert args.data_path == ["AdvertiseGen/train.json"]
    columns = {"prompt": "content", "response": "summary"}
    assert args.column_map == columns | ({"history": "history"} if "history" in words else {})
    assert (args.max_source_length, args.max_target_length, args.max_seq_len) == (source, target, source + target)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (batch, accumulation)
    assert (args.learning_rate, args.max_steps, args.logging_steps, args.save_steps) == (rate, steps, 10, 1000)
    assert args.dtype == ("fp16" if "fp16" in words else "auto")
    assert args.rebuild_cache
    if "prefix" in words:
        assert (args.pre_seq_len, args.quantization_bit) == (128, 4)
    held_out = "--test_file: " if "test" in words.split() else "--validation_file: "
    assert sum(line.startswith(held_out) and "scripts.evaluate" in line for line in caplog.messages) == 1


def test_every_flag_of_the_ptuning_trainer_is_known():
    """Its model and data arguments; what training and evaluation do with each stands in former_flags.py."""
    of_model = """model_name_or_path ptuning_checkpoint config_name tokenizer_name cache_dir use_fast_tokenizer model_revision
        use_auth_token resize_position_embeddings quantization_bit pre_seq_len prefix_projection"""
    of_data = """lang dataset_name dataset_config_name prompt_column response_column history_column train_file validation_file
        test_file overwrite_cache preprocessing_num_workers max_source_length max_target_length val_max_target_length
        pad_to_max_length max_train_samples max_eval_samples max_predict_samples num_beams ignore_pad_token_for_loss
        source_prefix forced_bos_token"""
    known = flag_names(SFTArguments)
    assert set(f"{of_model} {of_data}".split()) <= known
    assert {"do_train", "do_eval", "do_predict", "predict_with_generate", "fp16", "overwrite_output_dir"} <= known
    for name in ("max_source_length", "max_target_length"):
        assert name not in former_flags("sft")   # flags of ours now
