"""Flags of earlier systems (DeepSpeed-Chat, its forks, ChatGLM's ptuning) that are none here, and what replaces them.

Plain renamings are aliases of the fields in steps.py. A row here turns into flags of ours (``becomes``), or has nothing
left to do and says why in one line, or asks for what this version cannot do and stops the run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

TRAIN = ("sft", "reward", "ppo", "dpo")
EVERYWHERE = (*TRAIN, "prompt_eval", "evaluate", "rw_eval")


@dataclass(frozen=True)
class FormerFlag:
    """names: flags with one fate. steps: sections of the parsers that know them. values: 0 for a switch, else 1.

    kind: silent (true here anyway), note (one line says ``now``), warn (one line, something is lost), refuse (UserError
    that says ``now``). becomes: flags of ours put in its place; "{value}" stands for the value given. zh: ``now`` in
    Chinese, for docs/flags_zh.md; not needed where ``now`` is a flag.
    """

    names: tuple[str, ...]
    steps: tuple[str, ...]
    values: Literal[0, 1]
    now: str
    kind: Literal["silent", "note", "warn", "refuse"] = "note"
    becomes: tuple[str, ...] = ()
    zh: str = ""


# Earlier names -> the commands that know them, and what is put in their place. A switch where no {value} is taken over.
REPLACED = {
    "print_loss": ("sft dpo", "--logging_steps 1"),
    "disable_dropout": ("sft reward dpo", "--dropout 0.0"),
    "disable_actor_dropout": ("ppo", "--actor_dropout 0.0"),
    "disable_critic_dropout": ("ppo", "--critic_dropout 0.0"),
    "unpin_actor_parameters": ("ppo", "--generation_weights layerwise"),
    "dataset_name train_file dataset_path": ("sft", "--data_path {value}"),
    "model_path": ("sft evaluate", "--model_name_or_path {value}"),
    "check_points_path": ("sft", "--output_dir {value}"),
    "epochs": ("sft", "--num_train_epochs {value}"),
    "train_batch_size": ("sft", "--per_device_train_batch_size {value}"),
    "eval_batch_size": ("sft", "--per_device_eval_batch_size {value}"),
    "warmup_steps": ("sft", "--num_warmup_steps {value}"),
    "checkpointing_steps": ("sft", "--save_steps {value}"),
    "resume_from_checkpoint": ("sft", "--resume {value}"),
    "overwrite_cache": ("sft", "--rebuild_cache"),
    "fp16 fp16_full_eval": ("sft evaluate", "--dtype fp16"),
    "bf16 bf16_full_eval": ("sft evaluate", "--dtype bf16"),
    "prompt_column": ("sft evaluate", "--columns prompt={value}"),
    "response_column": ("sft evaluate", "--columns response={value}"),
    "history_column": ("sft evaluate", "--columns history={value}"),
    # Where both are given, --do_predict answered the prompts of --test_file: the later row wins.
    "validation_file": ("evaluate", "--data_path {value}"),
    "test_file": ("evaluate", "--data_path {value}"),
}

# Names in transformers, TRL and LLaMA-Factory -> ours, the first that a step has. The error names it: values may differ.
FOREIGN = {
    "max_train_steps": "max_steps",
    "num_epochs epochs": "num_train_epochs",
    "micro_batch_size train_batch_size": "per_device_train_batch_size",
    "max_length max_seq_length model_max_length cutoff_len block_size": "max_seq_len max_prompt_seq_len",
    "max_prompt_length": "max_prompt_seq_len max_source_length max_seq_len",
    "max_completion_length response_length max_new_tokens": "max_answer_seq_len max_target_length",
    "warmup_ratio warmup_steps": "num_warmup_steps",
    "eval_steps": "eval_interval",
    "fp16 bf16 torch_dtype": "dtype",
    "load_in_4bit load_in_8bit quantization_method": "quantization_bit",
    "use_peft finetuning_type lora_r lora_rank": "lora_dim actor_lora_dim",
    "lora_target lora_target_modules target_modules": "lora_module_name actor_lora_module_name",
    "dataset dataset_name train_file": "data_path",
    "model_path": "model_name_or_path actor_model_name_or_path",
    "reward_model_path": "critic_model_name_or_path",
    "ref_model": "ref_model_name_or_path",
    "num_generations": "num_return_sequences",
    "init_kl_coef": "kl_coef",
    "pref_beta": "beta",
    "report_to": "enable_tensorboard",
    "resume_from_checkpoint": "resume",
}

RETIRED = (
    *(
        FormerFlag(
            tuple(names.split()), tuple(steps.split()), int("{value}" in ours),
            ours.replace(" {value}", "").replace("{value}", "…"), becomes=tuple(ours.split()),
        )
        for names, (steps, ours) in REPLACED.items()
    ),
    FormerFlag(("deepspeed", "deepscale"), TRAIN, 0, "always on", "silent", zh="始终开启"),
    FormerFlag(
        ("local_rank",), ("sft", "reward", "ppo", "dpo", "evaluate"), 1,
        "read from the environment that the launcher sets", "silent",
        zh="取自启动器设置的环境变量",
    ),
    FormerFlag(
        ("only_optimize_lora",), TRAIN, 0, "adapters always freeze the model's own weights", "silent",
        zh="使用适配器时始终冻结模型自身的权重",
    ),
    FormerFlag(
        ("num_padding_at_beginning",), ("reward", "ppo", "dpo", "rw_eval"), 1,
        "nothing to set: lengths come from masks, for every model",
        zh="无需设置：长度由掩码得出，各种模型都一样",
    ),
    FormerFlag(
        ("compute_fp32_loss",), TRAIN, 0, "losses and log-probabilities are always float32",
        zh="损失和对数概率始终为 float32",
    ),
    FormerFlag(
        ("add_eot_token",), EVERYWHERE, 0,
        "the end token comes from the template saved with the checkpoint, the same in every step",
        zh="结束符取自随检查点保存的模板，各步骤相同",
    ),
    FormerFlag(
        ("eot_token",), ("sft",), 1, "the end token comes from the template saved with the checkpoint",
        zh="结束符取自随检查点保存的模板",
    ),
    FormerFlag(
        ("preprocessing_num_workers",), ("sft", "ppo", "evaluate"), 1,
        "one process prepares the data once and caches it",
        zh="由一个进程准备一次数据并缓存",
    ),
    FormerFlag(
        ("enable_hybrid_engine",), ("ppo",), 0,
        "rollouts always run in an engine of their own (inference/engine.py); under ZeRO-3 --generation_weights "
        "says with which weights",
        zh="采样始终在单独的引擎中进行（inference/engine.py）；ZeRO-3 下由 --generation_weights "
        "决定用怎样存放的权重",
    ),
    FormerFlag(
        ("inference_tp_size",), ("ppo",), 1,
        "each process generates alone; where whole weights do not fit a card, --generation_weights auto fetches "
        "them layer by layer (docs/en/ppo.md says why not AutoTP)",
        zh="每个进程独立生成；一张卡放不下完整权重时，--generation_weights auto 逐层收集（为何不用 AutoTP 见 "
        "docs/zh/ppo.md）",
    ),
    FormerFlag(
        ("tp_gather_partition_size",), ("ppo",), 1, "nothing to set: weights are gathered one after the other",
        zh="无需设置：权重逐个收集",
    ),
    FormerFlag(
        ("enable_mixed_precision_lora",), ("ppo",), 0,
        '--quantization_bit 8 holds frozen weights in 8 bits; to gather them in 8 bits, put {"zero_optimization": '
        '{"zero_quantized_nontrainable_weights": true}} into a --deepspeed_config', "warn",
        zh='--quantization_bit 8 以 8 位存放冻结的权重；要以 8 位收集，把 {"zero_optimization": '
        '{"zero_quantized_nontrainable_weights": true}} 写入 --deepspeed_config 的文件',
    ),
    FormerFlag(
        ("test_stop_step",), ("ppo",), 1, "--max_steps, where --enable_test_mode is given",
        becomes=("--max_steps", "{value}"),
        zh="与 --enable_test_mode 同时给出时为 --max_steps",
    ),
    FormerFlag(
        ("release_inference_cache",), ("ppo",), 0,
        "weights and cache of a rollout are always let go of; torch keeps their memory for the update",
        zh="采样所用的权重和缓存总会释放；torch 保留这部分内存供更新使用",
    ),
    FormerFlag(
        ("sampler_correction",), ("ppo",), 1,
        "the sampler has the trained weights; --old_log_probs forward takes the ratio against the training forward", "warn",
        zh="采样用的就是训练所得的权重；--old_log_probs forward 以训练前向的值作概率比的分母",
    ),
    FormerFlag(
        ("kl_estimator", "kl_clip"), ("ppo",), 1,
        "the penalty is d, the difference of log-probabilities (k1), uncut; with --kl_in loss its gradient is d * "
        "grad log p", "warn",
        zh="惩罚为对数概率之差 d（k1），不截断；--kl_in loss 时其梯度为 d * grad log p",
    ),
    FormerFlag(
        ("print_answers_interval",), ("ppo",), 1, "--print_answers and samples.jsonl follow --logging_steps",
        zh="--print_answers 和 samples.jsonl 按 --logging_steps 的间隔",
    ),
    FormerFlag(("enable_test_mode",), ("ppo",), 0, "--max_steps alone", "silent", zh="只需 --max_steps"),
    FormerFlag(
        ("num_beams", "num_beam_groups", "top_k", "penalty_alpha"), ("prompt_eval",), 1,
        "answers are greedy, as they were: the earlier script never used this flag",
        zh="贪心解码；原脚本也从未用到该参数",
    ),
    FormerFlag(
        ("val_max_target_length",), ("sft",), 1, "evaluation has the limits of training: --max_target_length",
        zh="评估与训练的长度上限相同：--max_target_length",
    ),
    FormerFlag(
        ("pad_to_max_length", "ignore_pad_token_for_loss"), ("sft", "evaluate"), 0,
        "padding goes to the longest of a batch and is never learned",
        zh="填充到一批中最长的一条，填充不参与学习",
    ),
    FormerFlag(
        ("config_name", "tokenizer_name", "lang", "forced_bos_token"), ("sft", "evaluate"), 1,
        "read from the folder of the model",
        zh="从模型文件夹读取",
    ),
    FormerFlag(
        ("use_fast_tokenizer", "resize_position_embeddings"), ("sft", "evaluate"), 0,
        "read from the folder of the model",
        zh="从模型文件夹读取",
    ),
    FormerFlag(("do_train", "do_eval", "debug", "overwrite_output_dir"), ("sft",), 0, "nothing to set", zh="无需设置"),
    FormerFlag(("fp16_opt_level",), ("sft",), 1, "--dtype"),
    FormerFlag(
        ("validation_file", "test_file"), ("sft",), 1,
        "not read in training, which holds out --eval_fraction of its data; scripts.evaluate "
        "--data_path FILE scores the answers to a file of its own", "warn",
        zh="训练时不读取，而是从数据中留出 --eval_fraction；用 scripts.evaluate --data_path FILE "
        "评估另一个文件的回答",
    ),
    FormerFlag(
        ("do_predict", "predict_with_generate"), ("sft",), 0,
        "scripts.evaluate scores the answers of the trained model", "warn",
        zh="用 scripts.evaluate 评估训练后模型的回答",
    ),
    FormerFlag(("do_predict", "predict_with_generate"), ("evaluate",), 0, "always on", "silent", zh="始终开启"),
    FormerFlag(
        ("do_eval", "debug", "overwrite_output_dir", "overwrite_cache"), ("evaluate",), 0, "nothing to set",
        zh="无需设置",
    ),
    FormerFlag(("pre_seq_len",), ("evaluate",), 1, "the saved prefix has its length", zh="长度由已保存的前缀决定"),
    FormerFlag(("prefix_projection",), ("evaluate",), 0, "the saved prefix has its form", zh="形式由已保存的前缀决定"),
    FormerFlag(
        ("num_beams", "generation_num_beams"), ("sft", "evaluate"), 1,
        "scripts.evaluate answers greedily or, with --do_sample, by sampling; it has no beam search", "warn",
        zh="scripts.evaluate 贪心解码，或用 --do_sample 采样；没有束搜索",
    ),
)

NOT_YET = (
    FormerFlag(
        ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"), TRAIN, 0,
        'write the key of this name, true, into "zero_optimization" of a --deepspeed_config file', "refuse",
        zh='以此名为键、true 为值，写入 --deepspeed_config 文件的 "zero_optimization"',
    ),
    FormerFlag(
        ("zero_hpz_partition_size",), TRAIN, 1,
        'write the key of this name into "zero_optimization" of a --deepspeed_config file', "refuse",
        zh='以此名为键，写入 --deepspeed_config 文件的 "zero_optimization"',
    ),
    FormerFlag(
        ("unsupervised_dataset_config_name",), ("ppo",), 1,
        "write it behind the name of the set, --unsupervised_dataset_name NAME:CONFIG", "refuse",
        zh="写在数据集名之后：--unsupervised_dataset_name NAME:CONFIG",
    ),
    FormerFlag(
        ("dataset_config_name", "model_revision", "use_auth_token"), ("sft", "evaluate"), 1,
        "drop it; fetch what it names with scripts/download_dataset.py or huggingface-cli and give the folder", "refuse",
        zh="去掉它；用 scripts/download_dataset.py 或 huggingface-cli 下载所指内容，再给出文件夹",
    ),
    FormerFlag(
        ("max_train_samples", "max_eval_samples", "max_predict_samples"), ("sft",), 1,
        "drop it; --max_steps and --eval_iters limit a run", "refuse",
        zh="去掉它；用 --max_steps 和 --eval_iters 限制运行",
    ),
    FormerFlag(
        ("source_prefix",), ("sft", "evaluate"), 1,
        "drop it and write the prefix into the data as a system message", "refuse",
        zh="去掉它，把前缀作为系统消息写进数据",
    ),
)


def former_flags(section: str) -> dict[str, FormerFlag]:
    """Return the rows that the parser of a step knows, by name."""
    return {name: row for row in (*RETIRED, *NOT_YET) if section in row.steps for name in row.names}


def our_name(name: str, known: Collection[str]) -> str | None:
    """Return the flag of ours, among those that a step has, for a flag of another system."""
    ours = next((ours for names, ours in FOREIGN.items() if name in names.split()), "")
    return next((one for one in ours.split() if one in known), None)
