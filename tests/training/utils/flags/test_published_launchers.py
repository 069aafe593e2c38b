"""The command lines of the published launchers are understood: same names, same values, or one line of what changed.

Each row copies the public table of a launcher's settings; the parser must give back the values in its cells. A cell in
brackets there is None here: the script does not pass the flag.
"""

import itertools

import pytest

from errors import UserError
from training.utils.flags.parse import parse
from training.utils.flags.steps import DPOArguments, PPOArguments, RewardArguments, SFTArguments

FOUR = [
    "Dahoas/rm-static", "Dahoas/full-hh-rlhf", "Dahoas/synthetic-instruct-gptj-pairwise",
    "yitingxie/rlhf-reward-datasets",
]  # fmt: skip
CHINESE = ["wangrui6/Zhihu-KOL", "Cohere/miracl-zh-queries-22-12", "Hello-SimpleAI/HC3-Chinese", "mkqa-Chinese"]
JAPANESE = ["mkqa-Japanese", "Cohere/miracl-ja-queries-22-12", "lmqg/qg_jaquad", "lmqg/qag_jaquad"]
T9K = [f"./datasets/{name}" for name in ("rm-static", "full-hh-rlhf", "synthetic-instruct-gptj-pairwise")]
RM_STATIC = ["Dahoas/rm-static"]
CLASSES = {1: SFTArguments, 2: RewardArguments, 3: PPOArguments, "dpo": DPOArguments}

# system, step (dpo: in place of 2 and 3), script, model (3: actor, critic), data, batch a device (3: generation,
# training), accumulation, learning rate, epochs, weight decay, ZeRO, LoRA, lengths, the rest.
ROWS = [
    ("DSE", 1, "llama2/run_llama2_7b", "meta-llama/Llama-2-7b-hf", FOUR, 4, 1, 9.65e-6, 4, 0.0, 3, 0, 512, "gc"),
    ("DSE", 1, "llama2/run_llama2_7b_lora", "meta-llama/Llama-2-7b-hf", FOUR, 4, 1, 9.65e-6, 4, 0.0, 3, 128, 512,
     "gc"),
    ("DSE", 1, "opt/multi_node/run_66b", "facebook/opt-66b", FOUR, 4, 1, 1e-4, 2, 0.1, 3, 128, 512, "gc"),
    ("DSE", 1, "opt/single_gpu/run_1.3b", "facebook/opt-1.3b", None, None, 8, None, None, None, 0, 128, None,
     "tb no-seed"),
    ("DSE", 1, "opt/single_gpu/run_6.7b_lora", "facebook/opt-6.7b", FOUR, 8, 16, 1e-3, 16, 0.0, 0, 128, 512, "gc"),
    ("DSE", 1, "opt/single_node/run_1.3b", "facebook/opt-1.3b", FOUR, 8, 1, 9.65e-6, 16, 0.0, 2, 0, 512, "tb"),
    ("DSE", 1, "opt/single_node/run_1.3b_lora", "facebook/opt-1.3b", FOUR, 8, 1, 1e-3, 16, 0.1, 0, 128, 512, "only"),
    ("DSE", 1, "opt/single_node/run_13b", "facebook/opt-13b", FOUR, 4, 1, 1e-4, 16, 0.0, 3, 128, 512, "gc"),
    ("DSE", 1, "opt/single_node/run_30b_lora", "facebook/opt-30b", FOUR, 4, 1, 9.65e-6, 16, 0.0, 3, 128, 512, "gc"),
    ("DSE", 1, "opt/single_node/run_6.7b", "facebook/opt-6.7b", FOUR, 6, 1, 9.65e-6, 16, 0.0, 3, 0, 512, "gc"),
    ("DSE", 1, "opt/single_node/sweep/run_single", "facebook/opt-1.3b", FOUR, 8, 1, 9.65e-6, 16, 0.0, 2, 0, 512, ""),
    ("DSE", 1, "other_language/run_chinese", "bigscience/bloom-1b1", CHINESE, 8, 1, 9.65e-6, 16, 0.0, 2, 0, 512, ""),
    ("DSE", 1, "other_language/run_japanese", "sberbank-ai/mGPT", JAPANESE, 8, 1, 9.65e-6, 16, 0.0, 2, 0, 512, ""),
    ("DSE", 2, "llama2/run_llama2_7b", "meta-llama/Llama-2-7b-hf", RM_STATIC, 8, 1, 9.65e-6, 1, 0.1, 3, 0, 512,
     "gc offl pad0"),
    ("DSE", 2, "llama2/run_llama2_7b_lora", "meta-llama/Llama-2-7b-hf", RM_STATIC, 8, 1, 9.65e-6, 1, 0.1, 3, 128, 512,
     "gc offl pad0"),
    ("DSE", 2, "opt/multi_node/run_350m", "facebook/opt-350m", FOUR, 2, 1, 5e-5, 1, 0.1, 0, 0, 512, "drop0 pad1"),
    ("DSE", 2, "opt/single_gpu/run_350m", "facebook/opt-350m", None, None, 4, None, None, 0.1, 0, 0, None,
     "tb drop0 pad1 no-seed"),
    ("DSE", 2, "opt/single_node/run_350m", "facebook/opt-350m", FOUR, 4, 1, 5e-5, 1, 0.1, 0, 0, 512, "drop0 pad1"),
    ("DSE", 2, "opt/single_node/sweep/run_single", "facebook/opt-350m", FOUR, 4, 1, 5e-5, 1, 0.1, 0, 0, 512,
     "drop0 pad1"),
    ("DSE", 3, "llama2/run_llama2_7b", "$1 $2", RM_STATIC, (1, 1), 1, (9.65e-6, 5e-6), 1, 0.1, (3, 3), (0, 0),
     (256, 256), "gcA gcC offlRef HE dropA0 pad1"),
    ("DSE", 3, "llama2/run_llama2_7b_lora", "$1 $2", RM_STATIC, (1, 1), 1, (9.65e-6, 5e-6), 1, 0.1, (3, 3), (64, 64),
     (256, 256), "gcA gcC offlRef HE dropA0 pad1"),
    ("DSE", 3, "llama2/run_llama2_7b_mixz", "$1 $2", RM_STATIC, (1, 1), 1, (9.65e-6, 5e-6), 1, 0.1, (3, 3), (64, 64),
     (256, 256), "gcA gcC offlRef MixZ dropA0 pad1"),
    ("DSE", 3, "opt/multi_node/run_66b", "$1 $2", RM_STATIC, (4, 4), 1, (5e-4, 5e-6), 1, 0.1, (3, 3), (128, 0),
     (256, 256), "gcA HE dropA0 TP8 tpg4 pad1"),
    ("DSE", 3, "opt/single_gpu/run_1.3b", "$1 $2", None, None, 2, None, None, None, (0, 0), (128, 0), None,
     "gcA HE dropA0 pad1 no-seed"),
    ("DSE", 3, "opt/single_gpu/run_6.7b_lora", "$1 $2", RM_STATIC, (8, 8), 16, (5e-4, 5e-6), 1, None, (0, 0), (128, 0),
     (256, 256), "gcA gcC HE dropA0 pad1"),
    ("DSE", 3, "opt/single_node/run_1.3b",
     "AdamG012/chat-opt-1.3b-sft-deepspeed AdamG012/chat-opt-350m-reward-deepspeed", RM_STATIC, (4, 4), 1,
     (9.65e-6, 5e-6), 1, None, (2, 2), (0, 0), (256, 256), "HE EMA tb dropA0 pad1"),
    ("DSE", 3, "opt/single_node/run_1.3b_lora", "$1 $2", RM_STATIC, (4, 4), 1, (9.65e-6, 5e-6), 1, None, (2, 2),
     (128, 0), (256, 256), "HE dropA0 pad1"),
    ("DSE", 3, "opt/single_node/run_13b", "$1 $2", RM_STATIC, (16, 16), 1, (5e-4, 5e-6), 1, None, (3, 3), (128, 0),
     (256, 256), "gcA HE dropA0 TP2 pad1"),
    ("DSE", 3, "opt/single_node/run_30b_lora", "$1 $2", RM_STATIC, (4, 4), 1, (5e-4, 5e-6), 1, None, (3, 3), (128, 0),
     (256, 256), "gcA HE dropA0 pad1"),
    ("DSE", 3, "opt/single_node/run_6.7b", "$1 $2", RM_STATIC, (4, 4), 1, (9.65e-6, 5e-6), 1, 0.1, (3, 3), (0, 0),
     (256, 256), "gcA HE dropA0 pad1"),
    ("DSE", 3, "opt/single_node/sweep/run_single", "$1 $2", RM_STATIC, (4, 4), 1, (9.65e-6, 5e-6), 1, 0.0, (2, 2),
     (0, 0), (256, 256), "print dropA0 pad1"),
    ("DSE", "dpo", "llama2/run_llama2_7b", "meta-llama/Llama-2-7b-hf", RM_STATIC, 8, 1, 9.65e-6, 1, 0.1, 3, 0, 512, "gc offl"),
    ("DSE", "dpo", "llama2/run_llama2_7b_lora", "meta-llama/Llama-2-7b-hf", RM_STATIC, 8, 1, 9.65e-6, 1, 0.1, 3, 128, 512,
     "gc offl"),
    ("DSE", "dpo", "opt/multi_node/run_350m", "facebook/opt-350m", FOUR, 2, 1, 5e-5, 1, 0.1, 0, 0, 512, "drop0"),
    ("DSE", "dpo", "opt/single_gpu/run_350m", "facebook/opt-350m", None, None, 4, None, None, 0.1, 0, 0, None,
     "tb drop0 no-seed"),
    ("DSE", "dpo", "opt/single_node/run_350m", "facebook/opt-350m", FOUR, 4, 1, 5e-5, 1, 0.1, 0, 0, 512, "drop0"),
    ("DSE", "dpo", "opt/single_node/sweep/run_single", "facebook/opt-350m", FOUR, 4, 1, 5e-5, 1, 0.1, 0, 0, 512,
     "drop0 pad1"),
    ("YZP", 1, "single_gpu/run_chatglm-6b-dp", "THUDM/chatglm-6b", ["Smart/Q_A"], 1, 1, None, None, None, 0, 128, None,
     "no-seed"),
    ("YZP", 1, "single_node/run_chatglm-6b", "THUDM/chatglm-6b", ["Smart/Q_A"], 8, 1, 9.65e-6, 16, 0.0, 2, 0, 512, ""),
    ("YZP", 2, "single_gpu/run_chatglm-6b", "THUDM/chatglm-6b", ["Smart/Q_A"], None, 4, None, None, 0.1, 0, 0, None,
     "drop0 pad1 no-seed"),
    ("YZP", 2, "single_node/run_chatglm-6b", "THUDM/chatglm-6b", ["Smart/Q_A"], 4, 1, 5e-5, 1, 0.1, 2, 0, 512,
     "drop0 pad1"),
    ("YZP", 3, "single_gpu/run_chatglm-6b", "$1 $2", ["Smart/Q_A"], None, 2, None, None, None, (0, 0), (128, 0), None,
     "gcA HE dropA0 pad1 no-seed"),
    ("YZP", 3, "single_node/run_chatglm-6b", "$1 $2", ["Smart/Q_A"], (4, 1), 1, (9.65e-6, 5e-6), 1, None, (2, 2),
     (0, 0), (256, 256), "HE EMA dropA0 pad4"),
    ("LUYF", 1, "opt/single_gpu/run_1.3b", "../../opt-1.3b", ["../../rm-static"], 4, 8, None, None, None, 0, 128, None,
     "tb no-seed"),
    ("LUYF", 1, "other_language/run_chinese", "../../bloom-1b1", ["../../HC3-Chinese"], 4, 1, 9.65e-6, 16, 0.0, 2, 0,
     512, ""),
    ("LUYF", 1, "zh/run_chinese", "../../Atom-7B", ["../../rm-static-zh"], 4, 8, None, 1, None, 3, 8, None,
     "only gc tb no-seed"),
    ("LUYF", 2, "opt/single_gpu/run_350m", "../../opt-350m", ["../../rm-static"], 4, 4, None, None, 0.1, 0, 0, None,
     "drop0 tb pad1 no-seed"),
    ("LUYF", 3, "opt/single_gpu/run_1.3b", "$1 $2", None, (4, 4), 2, None, None, None, (0, 0), (128, 0), None,
     "gcA HE dropA0 tb pad1 no-seed"),
    ("T9K", 1, "actor-single-gpu", "facebook/opt-1.3b", T9K, 8, None, 1e-4, 2, 0.1, 0, 128, None, "gc no-seed"),
    ("T9K", 1, "actor-single-node", "facebook/opt-13b", T9K, 8, None, 1e-4, 2, None, 2, 128, None, "gc no-seed"),
    ("T9K", 1, "actor-multi-node", "facebook/opt-66b", T9K, 8, None, 1e-4, 2, None, 2, 128, None, "gc no-seed"),
    ("T9K", 2, "reward-single-gpu", "facebook/opt-350m", T9K, 8, None, 5e-5, 1, 0.1, 0, 0, None, "pad1 no-seed"),
    ("T9K", 2, "reward-single-node", "facebook/opt-350m", T9K, 8, None, 5e-5, 1, 0.1, 0, 0, None, "pad1 no-seed"),
    ("T9K", 2, "reward-multi-node", "facebook/opt-350m", T9K, 8, None, 5e-5, 1, 0.1, 0, 0, None, "pad1 no-seed"),
    ("T9K", 3, "rlhf-single-gpu", "$1 $2", T9K[:1], (16, 16), None, (9.65e-6, 5e-6), 1, None, (0, 0), (128, 0), None,
     "HE TP1 offlRef gcA no-seed"),
    ("T9K", 3, "rlhf-single-node", "$1 $2", T9K[:1], (8, 8), None, (5e-4, 5e-6), 1, None, (3, 3), (128, 0), None,
     "HE TP2 offlRef gcA no-seed"),
    ("T9K", 3, "rlhf-multi-node", "$1 $2", T9K[:1], (4, 4), None, (5e-4, 5e-6), 1, None, (3, 3), (128, 0), None,
     "HE TP4 offlRef gcA no-seed"),
]  # fmt: skip

# A word of the last column: flags as written at HEAD and in the forks, and what must come of them.
WORDS = {
    "gc": ("--gradient_checkpointing", {"gradient_checkpointing": True}),
    "gcA": ("--actor_gradient_checkpointing", {"actor_gradient_checkpointing": True}),
    "gcC": ("--critic_gradient_checkpointing", {"critic_gradient_checkpointing": True}),
    "offl": ("--offload", {"offload": True}),
    "offlRef": ("--offload_reference_model", {"offload_reference_model": True}),
    "only": ("--only_optimize_lora", {}),
    "tb": ("--enable_tensorboard --tensorboard_path ./tb", {"enable_tensorboard": True, "tensorboard_path": "./tb"}),
    "drop0": (("--dropout 0.0", "--disable_dropout"), {"dropout": 0.0}),
    "dropA0": (("--actor_dropout 0.0", "--disable_actor_dropout"), {"actor_dropout": 0.0}),
    "pad0": ("--num_padding_at_beginning 0", {}),
    "pad1": ("--num_padding_at_beginning 1", {}),
    "pad4": ("--num_padding_at_beginning 4", {}),
    "HE": ("--enable_hybrid_engine", {}),
    "TP1": ("--inference_tp_size 1", {}),
    "TP2": ("--inference_tp_size 2", {}),
    "TP4": ("--inference_tp_size 4", {}),
    "TP8": ("--inference_tp_size 8", {}),
    "tpg4": ("--tp_gather_partition_size 4", {}),
    "EMA": ("--enable_ema", {"enable_ema": True}),
    "MixZ": ("--enable_mixed_precision_lora", {}),
    "print": ("--print_answers", {"print_answers": True}),
    "no-seed": ("", {"seed": 1234}),
}
RETIRED = {"pad0", "pad1", "pad4", "HE", "TP1", "TP2", "TP4", "TP8", "tpg4", "MixZ"}   # each says one line


def reconstruct(row) -> tuple[list[str], dict]:
    """A row's command line and the values that the parser must find in it."""
    system, step, _, model, data, batch, accumulation, rate, epochs, decay, zero, lora, lengths, words = row
    old = system in ("YZP", "T9K")
    argv, expected = ["--deepspeed", "--output_dir", "./output"], {"output_dir": "./output"}

    def put(flag: str, value, field: str | None = None) -> None:
        if value is None:
            return
        argv.extend([f"--{flag}", *map(str, value if isinstance(value, list) else [value])])
        expected[field or flag] = value

    put("data_path", data)
    put("gradient_accumulation_steps", accumulation)
    put("num_train_epochs", epochs)
    if step == 3:
        roles = ("actor", "critic")
        for role, path in zip(roles, model.split(), strict=True):
            put(f"{role}_model_name_or_path", path)
        names = ("per_device_generation_batch_size", "per_device_training_batch_size")
        former = ("per_device_train_batch_size", "per_device_mini_train_batch_size")
        for name, before, value in zip(names, former, batch or (None, None), strict=True):
            put(before if old else name, value, name)
        put("generation_batch_numbers" if old else "generation_batches", 1, "generation_batches")
        put("ppo_epochs", 1)
        put("num_warmup_steps", 100)
        for role, value in zip(roles, rate or (None, None), strict=True):
            put(f"{role}_learning_rate", value)
        for role in roles:
            put(f"{role}_weight_decay", decay)
        for role, value in zip(roles, zero, strict=True):
            put(f"{role}_zero_stage", value)
        for role, value in zip(roles, lora, strict=True):
            put(f"{role}_lora_dim", value or None)
            put(f"{role}_lora_module_name", "decoder.layers." if value and system == "DSE" else None)
        for name, value in zip(("max_prompt_seq_len", "max_answer_seq_len"), lengths or (None, None), strict=True):
            put(name, value)
    else:
        put("model_name_or_path", model)
        put("per_device_train_batch_size", batch)
        put("per_device_eval_batch_size", batch)
        put("learning_rate", rate)
        put("weight_decay", decay)
        put("zero_stage", zero)
        put("lora_dim", lora or None)
        put("lora_module_name", "layers." if lora and "lama" in model else None)
        put("max_seq_len", lengths)
        put("num_warmup_steps", 0)
    if lengths:
        put("data_split", "2,4,4")
        put("lr_scheduler_type", "cosine")
    if "no-seed" not in words:
        put("seed", 1234)
    for word in words.split():
        flags, values = WORDS[word]
        argv.extend((flags if isinstance(flags, str) else flags[system != "DSE"]).split())
        expected |= values
    return argv, expected


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_launcher_is_understood(row, caplog):
    argv, expected = reconstruct(row)
    args = parse(CLASSES[row[1]], argv)
    assert {name: getattr(args, name) for name in expected} == expected
    said = [record.getMessage() for record in caplog.records]
    for word in RETIRED & set(row[-1].split()):
        flag = WORDS[word][0].split()[0]
        assert sum(line.startswith(f"{flag}:") for line in said) == 1


def test_quantised_launcher_trains_adapters_and_says_so_without_them():
    """YZP step 1, single_gpu/run_chatglm-6b.sh (main-ndp.py): INT8 base, which silently trained nothing there."""
    argv = ["--model_name_or_path", "THUDM/chatglm-6b", "--data_path", "Smart/Q_A", "--zero_stage", "2"]
    argv += ["--quantization_bit", "8", "--deepspeed", "--output_dir", "./output"]
    args = parse(SFTArguments, [*argv, "--lora_dim", "128"])
    assert (args.quantization_bit, args.lora_dim) == (8, 128)
    with pytest.raises(UserError, match=r"--quantization_bit 8 freezes the weights; give --lora_dim"):
        parse(SFTArguments, argv)


@pytest.mark.parametrize(("stage", "offload", "lora"), itertools.product((2, 3), (False, True), (0, 128)))
@pytest.mark.parametrize("step", [1, 2, 3])
def test_sweeps(step, stage, offload, lora):
    """The sweep scripts cross ZeRO stage, offload and LoRA; step 3 also the hybrid engine and mixed precision."""
    argv, prefixes = ["--output_dir", "o", "--deepspeed", *["--offload"] * offload], [""]
    if step == 3:
        prefixes = ["actor_", "critic_"]
        argv += ["--actor_dropout", "0.0", "--enable_hybrid_engine", "--enable_test_mode", "--test_stop_step", "5"]
        argv += ["--enable_mixed_precision_lora"] * (stage == 3)
    for prefix in prefixes:
        argv += [f"--{prefix}model_name_or_path", "m", f"--{prefix}zero_stage", str(stage), f"--{prefix}lora_dim", str(lora)]
    args = parse(CLASSES[step], argv)
    assert (args.offload, args.max_steps) == (offload, 5 if step == 3 else 0)
    for prefix in prefixes:
        assert (getattr(args, f"{prefix}zero_stage"), getattr(args, f"{prefix}lora_dim")) == (stage, lora)
