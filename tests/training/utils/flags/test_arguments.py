"""Flags: every earlier name is known, values and recipes are read as meant, wrong input is told in one sentence."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from errors import UserError
from scripts.docs.flags_table import main as flags_table
from training.utils.flags import parse as parsing
from training.utils.flags.former import NOT_YET, RETIRED, former_flags
from training.utils.flags.parse import flag_names, parse
from training.utils.flags.steps import (
    STEPS,
    DPOArguments,
    EvaluateArguments,
    PPOArguments,
    PromptEvalArguments,
    RewardArguments,
    RewardEvalArguments,
    SFTArguments,
)
from training.utils.run import entry

REPOSITORY = Path(__file__).resolve().parents[4]
ALL = (*STEPS, PromptEvalArguments, EvaluateArguments, RewardEvalArguments)
NEEDED = {
    SFTArguments: ["--model_name_or_path", "m", "--output_dir", "o"],
    RewardArguments: ["--model_name_or_path", "m", "--output_dir", "o"],
    DPOArguments: ["--model_name_or_path", "m", "--output_dir", "o"],
    PPOArguments: ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c", "--output_dir", "o"],
    PromptEvalArguments: ["--model_name_or_path_baseline", "b", "--model_name_or_path_finetune", "f"],
    EvaluateArguments: ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"],
    RewardEvalArguments: ["--model_name_or_path", "m"],
}

# The published tables of flags, each with a value that must be accepted; the word not-yet: must be refused.
BOTH = """data_path x y|data_split 2,4,4|data_output_path d|model_name_or_path m|per_device_train_batch_size 4
per_device_eval_batch_size 4|max_seq_len 128|learning_rate 1e-4|weight_decay 0.1|num_train_epochs 2
gradient_accumulation_steps 2|lr_scheduler_type linear|num_warmup_steps 5|output_dir o|seed 7|local_rank 0
gradient_checkpointing|dropout 0.1|offload|dtype fp16|zero_stage 2|lora_dim 8|lora_module_name decoder.layers.
only_optimize_lora|lora_learning_rate 5e-4|compute_fp32_loss|enable_tensorboard|tensorboard_path t|add_eot_token
deepspeed|deepspeed_config FILE|deepscale|deepscale_config FILE|disable_dropout"""
PUBLISHED = {
    SFTArguments: BOTH + """
sft_only_data_path x y|eot_token <end>|print_loss|pre_seq_len 128|quantization_bit 8""",
    RewardArguments: BOTH + """
num_padding_at_beginning 1|eval_interval 10|eval_iters 100""",
    DPOArguments: BOTH + """
print_loss|beta 0.1|label_smoothing 0.1|offload_reference_model|num_padding_at_beginning 1""",
    PPOArguments: """data_path x y|data_split 2,4,4|data_output_path d|unsupervised_dataset_name wikitext
unsupervised_dataset_config_name wikitext-2not-yet|unsup_coef 27.8|actor_model_name_or_path a
critic_model_name_or_path c|num_padding_at_beginning 1|per_device_generation_batch_size 4
per_device_training_batch_size 4|generation_batches 2|ppo_epochs 2|max_prompt_seq_len 64|max_answer_seq_len 64
actor_learning_rate 1e-6|critic_learning_rate 1e-6|actor_weight_decay 0.1|critic_weight_decay 0.1|num_train_epochs 2
lr_scheduler_type cosine|gradient_accumulation_steps 1|num_warmup_steps 100|output_dir o|seed 7
preprocessing_num_workers 4|local_rank 0|enable_hybrid_engine|unpin_actor_parameters|release_inference_cache
inference_tp_size 2|tp_gather_partition_size 8|offload|dtype bf16|offload_reference_model|offload_reward_model
actor_zero_stage 3|critic_zero_stage 3|actor_gradient_checkpointing|critic_gradient_checkpointing|actor_dropout 0.0
critic_dropout 0.0|actor_lora_dim 8|actor_lora_module_name layers.|critic_lora_dim 8|critic_lora_module_name layers.
only_optimize_lora|actor_lora_learning_rate 5e-4|critic_lora_learning_rate 5e-4|enable_ema|enable_mixed_precision_lora
compute_fp32_loss|enable_tensorboard|tensorboard_path t|add_eot_token|align_overflow|print_answers
print_answers_interval 2|enable_test_mode|test_stop_step 5|deepspeed|deepspeed_config FILE|deepscale
deepscale_config FILE|per_device_train_batch_size 4|per_device_mini_train_batch_size 4|generation_batch_numbers 2
disable_actor_dropout|disable_critic_dropout""",
    PromptEvalArguments: """model_name_or_path_baseline b|model_name_or_path_finetune f|num_beams 1|num_beam_groups 1
top_k 4|penalty_alpha 0.6|num_return_sequences 1|max_new_tokens 100|language Chinese|add_eot_token""",
    RewardEvalArguments: "model_name_or_path m|num_padding_at_beginning 1|add_eot_token",
}  # fmt: skip
# What a flag cannot do without.
TOGETHER = {
    "offload": ["--zero_stage", "1"], "lora_learning_rate": ["--lora_dim", "4"],
    "quantization_bit": ["--lora_dim", "4"],
    "actor_lora_learning_rate": ["--actor_lora_dim", "4"], "critic_lora_learning_rate": ["--critic_lora_dim", "4"],
    "enable_mixed_precision_lora": ["--actor_zero_stage", "3"],
}  # fmt: skip
CASES = [
    (args_class, *line.partition(" ")[::2])
    for args_class, table in PUBLISHED.items()
    for line in table.replace("\n", "|").split("|")
]


@pytest.mark.parametrize(("args_class", "name", "value"), CASES, ids=lambda one: getattr(one, "section", one))
@pytest.mark.parametrize("hyphens", [False, True], ids=["_", "-"])
def test_every_published_flag_is_known(args_class, name, value, hyphens, tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    value = value.replace("FILE", str(tmp_path / "ds.json"))
    spelling = name.replace("_", "-") if hyphens else name
    together = TOGETHER.get(name, [])
    if name == "offload" and args_class is PPOArguments:
        together = ["--actor_zero_stage", "1"]
    argv = [*NEEDED[args_class], *together, f"--{spelling}", *value.removesuffix("not-yet").split()]
    if value.endswith("not-yet"):
        with pytest.raises(UserError, match=f"--{name}: .*(not in this version|drop|write)"):
            parse(args_class, argv)
    else:
        parse(args_class, argv)


@pytest.mark.parametrize("args_class", ALL, ids=lambda one: one.section)
def test_each_flag_has_help_and_one_meaning(args_class):
    """No field lacks help, and no flag of an earlier system is a flag of ours at the same time."""
    fields = {one.name for one in dataclasses.fields(args_class)}
    assert all(len(one.metadata["help"]) > 10 for one in dataclasses.fields(args_class))
    former = former_flags(args_class.section)
    assert not fields & former.keys()
    assert {row.becomes[0].removeprefix("--") for row in former.values() if row.becomes} <= fields
    assert all(len(row.now) > 3 for row in (*RETIRED, *NOT_YET))


def test_defaults_agree_across_steps_and_stay_put():
    """The numbers that users rely on, written out."""
    sft, reward, ppo, dpo = (parse(one, NEEDED[one]) for one in STEPS)
    assert {sft.seed, reward.seed, ppo.seed} == {1234}
    assert {sft.data_split, reward.data_split, ppo.data_split} == {"2,4,4"}
    assert (sft.learning_rate, reward.learning_rate) == (2e-5, 1e-5)
    assert (dpo.learning_rate, dpo.lora_learning_rate, dpo.beta, dpo.label_smoothing) == (1e-6, 1e-5, 0.1, 0.0)
    assert (dpo.phase, dpo.seed, dpo.data_split) == (2, 1234, "2,4,4")
    assert (ppo.actor_learning_rate, ppo.critic_learning_rate) == (1e-6, 5e-6)
    assert (ppo.kl_coef, ppo.cliprange, ppo.cliprange_value, ppo.gamma, ppo.lam) == (0.05, 0.2, 0.2, 1.0, 0.95)
    assert (ppo.temperature, ppo.top_p, ppo.top_k, ppo.clip_reward_value) == (1.0, 1.0, 0, 5.0)
    assert ppo.normalize_reward and ppo.whiten_advantages
    assert (sft.adam_beta1, sft.adam_beta2, sft.adam_epsilon, sft.max_grad_norm) == (0.9, 0.95, 1e-8, 1.0)
    assert sft.tensorboard_path == os.path.join("o", "tensorboard")   # noqa: PTH118
    assert (sft.resume, sft.lora_alpha, sft.loss_on) == (None, 0.0, "answer")


def test_lora_alpha_is_twice_the_rank_unless_given():
    assert parse(SFTArguments, [*NEEDED[SFTArguments], "--lora_dim", "8"]).lora_alpha == 16
    assert parse(SFTArguments, [*NEEDED[SFTArguments], "--lora_dim", "8", "--lora_alpha", "4"]).lora_alpha == 4
    ppo = parse(PPOArguments, [*NEEDED[PPOArguments], "--actor_lora_dim", "8"])
    assert (ppo.actor_lora_alpha, ppo.critic_lora_alpha) == (16, 0)


@pytest.mark.parametrize(
    ("words", "value"),
    [([], False), (["--rebuild_cache"], True), (["--rebuild_cache", "true"], True),
     (["--rebuild_cache", "False"], False), (["--rebuild-cache=1"], True)],
)  # fmt: skip
def test_switches_take_a_word_or_none(words, value):
    assert parse(SFTArguments, [*NEEDED[SFTArguments], *words]).rebuild_cache is value


@pytest.mark.parametrize("words", [["--no_whiten_advantages"], ["--whiten_advantages", "false"]])
def test_a_switch_that_is_on_can_be_put_off(words):
    assert parse(PPOArguments, [*NEEDED[PPOArguments], *words]).whiten_advantages is False


@pytest.mark.parametrize(
    ("words", "value"), [([], None), (["--resume"], "auto"), (["--resume", "o/checkpoints/x"], "o/checkpoints/x")]
)
def test_resume(words, value):
    assert parse(SFTArguments, [*NEEDED[SFTArguments], *words]).resume == value


def test_columns():
    args = parse(SFTArguments, [*NEEDED[SFTArguments], "--columns", "prompt=question,chosen=best answer"])
    assert args.column_map == {"prompt": "question", "chosen": "best answer"}
    former = ["--prompt_column", "q", "--response_column", "a"]
    assert parse(SFTArguments, NEEDED[SFTArguments] + former).column_map == {"prompt": "q", "response": "a"}


@pytest.mark.parametrize(
    ("args_class", "words", "field", "value"),
    [
        (SFTArguments, ["--disable_dropout"], "dropout", 0.0),
        (SFTArguments, ["--data_output_path", "d"], "cache_dir", "d"),
        (SFTArguments, ["--print_loss"], "logging_steps", 1),
        (SFTArguments, ["--train_file", "a.json"], "data_path", ["a.json"]),
        (SFTArguments, ["--fp16"], "dtype", "fp16"),
        (PPOArguments, ["--per_device_train_batch_size", "3"], "per_device_generation_batch_size", 3),
        (PPOArguments, ["--per_device_mini_train_batch_size", "3"], "per_device_training_batch_size", 3),
        (PPOArguments, ["--generation_batch_numbers", "3"], "generation_batches", 3),
        (PPOArguments, ["--enable_test_mode", "--test_stop_step", "7"], "max_steps", 7),
        (PPOArguments, ["--test_stop_step", "7"], "max_steps", 0),
        (PPOArguments, ["--actor_zero_stage", "3", "--unpin_actor_parameters"], "generation_weights", "layerwise"),
        (PPOArguments, ["--enable_hybrid_engine", "--inference_tp_size", "4"], "generation_weights", "auto"),
        (PPOArguments, ["--sampler_correction", "2"], "old_log_probs", "auto"),
    ],
)
def test_former_names_mean_what_they_meant(args_class, words, field, value):
    assert getattr(parse(args_class, NEEDED[args_class] + words), field) == value


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["--compute_fp32_loss"], ["--compute_fp32_loss: losses and log-probabilities are always float32."]),
        (["--inference_tp_size", "4"],
         ["--inference_tp_size: each process generates alone; where whole weights do not fit a card, --generation_weights "
          "auto fetches them layer by layer (docs/en/ppo.md says why not AutoTP)."]),
        (["--actor_zero_stage", "3", "--unpin_actor_parameters"],
         ["--unpin_actor_parameters: now --generation_weights layerwise."]),
        (["--generation_weights", "layerwise"],
         ["--generation_weights layerwise has no effect with --actor_zero_stage 0: every process has whole weights."]),
        (["--disable_actor_dropout"], ["--disable_actor_dropout: now --actor_dropout 0.0."]),
        (["--enable_test_mode", "false"], []),
        (["--deepspeed"], []),
    ],
)
def test_a_retired_flag_says_one_line(words, lines, caplog):
    parse(PPOArguments, NEEDED[PPOArguments] + words)
    assert [record.getMessage() for record in caplog.records] == lines


def test_only_the_main_process_says_it(monkeypatch, caplog):
    monkeypatch.setattr(parsing.logger, "level", parsing.logger.level)   # put back afterwards
    monkeypatch.setenv("RANK", "1")
    parse(PPOArguments, [*NEEDED[PPOArguments], "--compute_fp32_loss"])
    parsing.logger.setLevel("NOTSET")
    assert not caplog.records


@pytest.mark.parametrize(
    ("args_class", "words", "sentence"),
    [
        (SFTArguments, ["--max_seq_lne", "4"],
         "--max_seq_lne is not a flag of step 1 (SFT); did you mean --max_seq_len?"),
        (SFTArguments, ["--output-dri=x"], "--output_dri is not a flag of step 1 (SFT); did you mean --output_dir?"),
        (PPOArguments, ["--learning_rate", "1e-5"],
         "--learning_rate is not a flag of step 3 (PPO); did you mean --actor_learning"),
        (SFTArguments, ["--kl_coef", "1"], "--kl_coef is a flag of step 3 (PPO), not of step 1 (SFT)."),
        (RewardArguments, ["--label_smoothing", "0.1"], "--label_smoothing is a flag of DPO, not of step 2 (reward model)."),
        (SFTArguments, ["--num_gpus", "2"], "--num_gpus belongs to the launcher"),
        (SFTArguments, ["stray"], "'stray' stands where a flag is expected"),
        (SFTArguments, ["--max_seq_len", "long"],
         "--max_seq_len: invalid int value: 'long'; --help says what it takes."),
        (SFTArguments, ["--max_seq_len"], "--max_seq_len: expected one argument; --help says what it takes."),
        (SFTArguments, ["--data_path"], "--data_path: expected at least one argument; --help says what it takes."),
        (SFTArguments, ["--dtype", "fp8"], "--dtype: invalid choice: 'fp8' (choose from"),
        (SFTArguments, ["--zero_stage", "4"], "--zero_stage: invalid choice: '4' (choose from"),
        (SFTArguments, ["--offload", "perhaps"],
         "--offload: perhaps is neither true nor false; --help says what it takes."),
        (SFTArguments, ["--deepspeed", "ds.json"],
         "--deepspeed takes no value here; to bring a configuration use --deepspeed_con"),
        (SFTArguments, ["--do_train", "maybe"], "--do_train is a switch and takes no value, but 'maybe' follows it."),
        (SFTArguments, ["--learning_rate", "nan"], "--learning_rate nan: must be finite."),
        (SFTArguments, ["--learning_rate=-1"], "--learning_rate -1.0: must not be negative."),
        (SFTArguments, ["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0: must be 1 or more"),
        (SFTArguments, ["--max_seq_len", "1"], "--max_seq_len 1: must be 2 or more, a prompt and the end token"),
        (SFTArguments, ["--max_source_length", "64"],
         "--max_source_length needs --max_target_length too; to limit both together give --max_seq_len alone."),
        (SFTArguments, ["--max_target_length", "64"], "--max_target_length needs --max_source_length too"),
        (SFTArguments, ["--max_source_length", "64", "--max_target_length", "64", "--max_seq_len", "100"],
         "--max_seq_len 100 is not --max_source_length + --max_target_length = 128; drop it"),
        (SFTArguments, ["--max_source_length", "9", "--max_target_length", "1"], "--max_target_length 1: must be 2 or"),
        (EvaluateArguments, ["--top_p", "0.9"], "--top_p has no effect on greedy answers; add --do_sample, or drop it."),
        (EvaluateArguments, ["--max_source_length", "0"], "--max_source_length 0: must be 1 or more"),
        (EvaluateArguments, ["--source_prefix", "x"], "--source_prefix: drop it and write the prefix into the data"),
        (SFTArguments, ["--dropout", "1"], "--dropout 1.0: must be 0 or more and less than 1."),
        (PPOArguments, ["--temperature", "0"], "--temperature 0.0: must be more than 0."),
        (PPOArguments, ["--top_p", "1.5"], "--top_p 1.5: must be more than 0 and at most 1."),
        (PPOArguments, ["--lam", "1.5"], "--lam 1.5: must lie between 0 and 1."),
        (PPOArguments, ["--max_answer_seq_len", "0"], "--max_answer_seq_len 0: must be 1 or more"),
        (PPOArguments, ["--max_tokens_per_device", "511"],
         "--max_tokens_per_device 511 cannot hold one example of --max_prompt_se"),
        (SFTArguments, ["--data_split", "6,2"],
         "--data_split 6,2: expected three shares for steps 1, 2 and 3, such as 2,4,4."),
        (SFTArguments, ["--data_split", "0,1,1"],
         "--data_split 0,1,1 leaves nothing for step 1 (SFT); raise its share."),
        (SFTArguments, ["--columns", "prompt"], "--columns prompt: expected our_name=name_in_the_file"),
        (SFTArguments, ["--deepspeed_config", "no.json"], "--deepspeed_config no.json: no such file"),
        (SFTArguments, ["--offload"], "--offload has no effect below --zero_stage 1; raise it, or drop it."),
        (SFTArguments, ["--offload_param", "--zero_stage", "2"],
         "--offload_param has no effect below --zero_stage 3; raise it, or drop it."),
        (PPOArguments, ["--zero_hpz_partition_size", "8"],
         '--zero_hpz_partition_size: write the key of this name into "zero_optimization" of a --deepspeed_config file.'),
        (SFTArguments, ["--optimizer", "fused_adam", "--offload", "--zero_stage", "2"],
         "--optimizer fused_adam works on the card"),
        (SFTArguments, ["--lora_learning_rate", "1e-3"], "--lora_learning_rate has no effect without --lora_dim"),
        (SFTArguments, ["--lora_alpha", "16"], "--lora_alpha has no effect without --lora_dim"),
        (PPOArguments, ["--critic_lora_alpha", "16"], "--critic_lora_alpha has no effect without --critic_lora_dim"),
        (SFTArguments, ["--only_optimize_lora", "false"], "--only_optimize_lora false: adapters always freeze the model's own"),
        (SFTArguments, ["--lora_dim", "8", "--lora_alpha", "0"], "--lora_alpha 0 multiplies the adapters by 0"),
        (PPOArguments, ["--critic_lora_dim", "8", "--critic_lora_alpha", "0"], "--critic_lora_alpha 0 multiplies"),
        (SFTArguments, ["--lr_scheduler_type", "constant", "--num_warmup_steps", "5"],
         "--num_warmup_steps has no effect with --lr_scheduler_type constant; take constant_with_warmup"),
        (PPOArguments, ["--lr_scheduler_type", "constant", "--num_warmup_steps", "5"], "--num_warmup_steps has no effect"),
        (PPOArguments, ["--unsup_coef", "1"], "--unsup_coef has no effect without --unsupervised_dataset_name"),
        (PPOArguments, ["--kl_horizon", "50"], "--kl_horizon has no effect without --kl_target"),
        *((PPOArguments, ["--advantage", "reinforce++", *words], f"{words[0]} has no effect without --advantage gae")
          for words in (["--lam", "0.9"], ["--cliprange_value", "0.1"], ["--critic_dropout", "0.1"])),
        (SFTArguments, ["--deepspeed_config", "STAGE_3"], "STAGE_3: \"stage\" is 3, and the flags say --zero_stage 0"),
        (PPOArguments, ["--deepspeed_config", "STAGE_3", "--actor_zero_stage", "3"],
         "STAGE_3: \"stage\" is 3, and the flags say --critic_zero_stage 0"),
        (SFTArguments, ["--deepspeed_config", "FP16", "--dtype", "bf16"], "FP16: the section \"fp16\" is switched on, and"),
        (SFTArguments, ["--pre_seq_len", "-1"], "--pre_seq_len -1: must not be negative"),
        (SFTArguments, ["--pre_seq_len", "8", "--lora_dim", "4"], "--pre_seq_len and --lora_dim: a prefix and adapters are not"),
        (SFTArguments, ["--ptuning_checkpoint", ".", "--lora_dim", "4"], "--ptuning_checkpoint and --lora_dim: a prefix"),
        (PPOArguments, ["--critic_pre_seq_len", "8", "--critic_lora_dim", "4"], "--critic_pre_seq_len and --critic_lora_dim"),
        (SFTArguments, ["--prefix_projection"], "--prefix_projection has no effect without --pre_seq_len"),
        (SFTArguments, ["--ptuning_checkpoint", "absent"], "--ptuning_checkpoint absent: no such folder"),
    ],
)  # fmt: skip
def test_wrong_flags_are_told_in_one_sentence(args_class, words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("STAGE_3").write_text('{"zero_optimization": {"stage": 3}}')
    Path("FP16").write_text('{"fp16": {"enabled": true}}')
    with pytest.raises(UserError) as caught:
        parse(args_class, NEEDED[args_class] + words)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("args_class", ALL, ids=lambda one: one.section)
def test_missing_flags_are_named(args_class):
    with pytest.raises(UserError, match=rf"^{args_class.title.split()[0]}.* needs --\w+: "):
        parse(args_class, [])


def test_sft_only_data_needs_no_share():
    words = ["--data_split", "0,1,1", "--sft_only_data_path", "x.jsonl"]
    assert parse(SFTArguments, NEEDED[SFTArguments] + words).sft_only_data_path == ["x.jsonl"]


def test_a_minibatch_larger_than_a_rollout_is_said(caplog):
    parse(PPOArguments, [*NEEDED[PPOArguments], "--gradient_accumulation_steps", "2"])   # 16 x 2 of a rollout of 16
    assert [record.getMessage() for record in caplog.records if "--generation_batches 2" in record.getMessage()]


# --- recipes ------------------------------------------------------------------------------------------------

RECIPE = """
launch: {num_gpus: 8}
sft:
  model_name_or_path: base
  output_dir: out/sft
  learning_rate: 1e-4          # PyYAML reads this as a text
  data_path: [a.jsonl, b.jsonl]
  columns: {prompt: question, chosen: best answer}
  gradient_checkpointing: true
  disable_dropout: true
  resume: null
ppo:
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_recipe_fills_the_flags(recipe):
    args = parse(SFTArguments, ["--config", recipe(RECIPE)])
    assert (args.model_name_or_path, args.output_dir, args.learning_rate) == ("base", "out/sft", 1e-4)
    assert (args.data_path, args.gradient_checkpointing, args.resume) == (["a.jsonl", "b.jsonl"], True, None)
    assert args.column_map == {"prompt": "question", "chosen": "best answer"}


def test_command_line_wins_over_the_recipe(recipe):
    words = ["--learning_rate", "3e-4", "--gradient_checkpointing", "false", "--data_path", "c.jsonl"]
    for argv in (["--config", recipe(RECIPE), *words], [*words, "--config", recipe(RECIPE)]):
        args = parse(SFTArguments, argv)
        assert (args.learning_rate, args.gradient_checkpointing, args.data_path) == (3e-4, False, ["c.jsonl"])
        assert args.output_dir == "out/sft"


def test_former_flag_on_the_command_line_wins_over_the_recipe(recipe):
    path = recipe("sft: {model_name_or_path: m, output_dir: o, dropout: 0.1}")
    assert parse(SFTArguments, ["--config", path]).dropout == 0.1
    assert parse(SFTArguments, ["--config", path, "--disable_dropout"]).dropout == 0.0


def test_former_flags_in_a_recipe_work_together(recipe):
    path = recipe("model_name_or_path: m\noutput_dir: o\nprompt_column: q\nresponse_column: a\ndeepspeed: true\n")
    assert parse(SFTArguments, ["--config", path]).column_map == {"prompt": "q", "response": "a"}
    path = recipe("ppo: {enable_test_mode: true, test_stop_step: 3}")
    assert parse(PPOArguments, [*NEEDED[PPOArguments], "--config", path]).max_steps == 3


def test_flat_recipe(recipe):
    args = parse(RewardArguments, ["--config", recipe("model_name_or_path: m\noutput_dir: o\ncolumns: {prompt: q}\n")])
    assert (args.output_dir, args.column_map) == ("o", {"prompt": "q"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sft: {max_seq_lenn: 4}",
         "recipe.yaml, section sft: --max_seq_lenn is not a flag of step 1 (SFT); did you mean --max_seq_len?"),
        ("max_seq_lenn: 4", "recipe.yaml: --max_seq_lenn is not a flag of step 1 (SFT); did you mean --max_seq_len?"),
        ("sft: {max_seq_len: long}", "recipe.yaml, section sft: --max_seq_len: invalid int value: 'long'"),
        ("sft: {learning_rate: {a: 1}}",
         "recipe.yaml, section sft: learning_rate must be a value or a list, not a section."),
        ("sft: {config: other.yaml}", "recipe.yaml, section sft: a recipe cannot name another one"),
        ("sft: {data_path: []}", "recipe.yaml, section sft: --data_path: expected at least one argument"),
        ("stf: {max_seq_len: 4}", "recipe.yaml: no section stf; did you mean sft?"),
        ("sft: {}\nseed: 1", "recipe.yaml: no section seed; "),
        ("sft: 3", "recipe.yaml: the section sft must hold flags as `name: value`."),
        ("reward: {}", "recipe.yaml has no section sft, which step 1 (SFT) reads; add one."),
        ("a: [1\nb: 2", "recipe.yaml, line 2: not valid YAML ("),
        ("- sft", "recipe.yaml: expected flags as `name: value`, or the sections launch, sft, reward, ppo, dpo."),
        ("", "recipe.yaml: expected flags as"),
    ],
)
def test_wrong_recipes_are_told_with_the_file(recipe, text, sentence):
    with pytest.raises(UserError) as caught:
        parse(SFTArguments, ["--config", recipe(text)])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_recipe():
    with pytest.raises(UserError, match=r"--config no\.yaml: No such file or directory; name an existing YAML file"):
        parse(SFTArguments, ["--config", "no.yaml"])


# --- entry point --------------------------------------------------------------------------------------------


def test_user_error_is_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        entry.parse_or_exit(SFTArguments, ["--nonsense_flag"])
    assert caught.value.code == 2
    sentence = "error: --nonsense_flag is not a flag of step 1 (SFT); --help all lists all flags."
    assert capsys.readouterr().err.splitlines() == [sentence]

    def fails(args):
        raise UserError("the sentence.")

    with pytest.raises(SystemExit):
        entry.run_main(fails, entry.parse_or_exit(SFTArguments, NEEDED[SFTArguments]))
    assert capsys.readouterr().err == "error: the sentence.\n"


def test_a_lone_process_other_than_the_first_speaks_after_a_while(monkeypatch, capsys):
    """The main process may be waiting in a collective: then nobody else would say what is wrong."""
    waited = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(entry.time, "sleep", waited.append)
    monkeypatch.setattr(entry.signal, "signal", lambda *_: None)
    level = parsing.logger.level
    with pytest.raises(SystemExit):
        entry.parse_or_exit(SFTArguments, ["--nonsense_flag"])
    parsing.logger.setLevel(level)
    assert waited == [10] and capsys.readouterr().err.startswith("error: ")


ENTRY_POINTS = ["train", "chat", *parsing.MODULES.values()]
START = """
import contextlib, io, runpy, sys
for module, word in [(module, word) for module in {modules} for word in ("--help", "--a_wrong_flag")]:
    sys.argv, told = [module, word], io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            code = runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    assert bool(code) == (word != "--help") and told.getvalue(), (module, word, code, told.getvalue())
    heavy = {{"torch", "transformers", "deepspeed", "datasets", "peft"}} & sys.modules.keys()
    assert not heavy, (module, word, heavy)
"""


def test_help_and_wrong_flags_are_answered_before_heavy_imports():
    words = [sys.executable, "-c", START.format(modules=ENTRY_POINTS)]
    ended = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr


def test_a_reader_of_the_help_may_leave(monkeypatch):
    """`--help all | head -1` ends without a traceback, and nothing is left to be written."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit, match="1"):
            entry.parse_or_exit(PPOArguments, ["--help", "all"])


# --- the table in the pages --------------------------------------------------------------------------------


def test_flags_table_writes_and_checks(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- flags:begin -->\nstale\n<!-- flags:end -->\nafter\n", encoding="utf-8")
    assert [flags_table([word, str(page)]) for word in ("--check", "--write", "--check")] == [1, 0, 0]
    assert "old; run python -m scripts.flags_table --write" in capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    names = {name for args_class in ALL for name in flag_names(args_class) if not name.startswith("no_")}
    assert not [name for name in names if f"`--{name}`" not in text]
    for table in (block.splitlines() for block in text.split("\n\n") if block.startswith("| ")):
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    page.write_text("no marks")
    assert flags_table(["--check", str(page)]) == 2 and capsys.readouterr().err.startswith("error: ")
