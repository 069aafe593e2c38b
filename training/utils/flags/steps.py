"""The flags of the three steps, as dataclasses: one definition for command line, recipes, README and error messages.

parse.py reads command lines and recipes into them, checks.py finds values that cannot be meant, former.py knows the flags
of earlier systems. What all steps share is in common.py, step 3 in ppo.py, DPO in dpo.py. Nothing here imports torch:
``--help`` answers at once.
"""

# ruff: noqa: RUF009  (flag() returns a dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from training.utils.flags.common import (
    ABOVE_ZERO,
    LENGTH,
    ONE_OR_MORE,
    PROMPT_AND_END,
    RATE,
    RATE_ZH,
    SEED,
    SHARE,
    WORD_AND_END,
    Attention,
    CommonArguments,
    Dtype,
    SupervisedArguments,
    flag,
)
from training.utils.flags.dpo import DPOArguments
from training.utils.flags.ppo import PPOArguments


@dataclass(kw_only=True)
class SFTArguments(SupervisedArguments):
    """Step 1: supervised fine-tuning."""

    section: ClassVar[str] = "sft"
    title: ClassVar[str] = "step 1 (SFT)"
    zh: ClassVar[str] = "第一步：监督微调。"
    phase: ClassVar[int] = 1

    sft_only_data_path: list[str] = flag(
        "Data sets used whole in this step, outside --data_split.", [],
        zh="只在本步骤使用、不参与 --data_split 的数据集，全部使用。",
    )
    max_source_length: int | None = flag(
        "With --max_target_length, instead of --max_seq_len, which becomes the sum: longest prompt in tokens. Longer "
        "ones lose their oldest part.",
        None, within=LENGTH,
        zh="与 --max_target_length 一起代替 --max_seq_len（后者变为两者之和）：提示的最大 token 数。"
        "超长时丢弃最旧的部分。",
    )
    max_target_length: int | None = flag(
        "Longest answer in tokens, end token included. Longer ones lose their tail, never the end token.", None,
        within=WORD_AND_END, common=True,
        zh="回答的最大 token 数，含结束符。超长时截去尾部，从不丢弃结束符。",
    )
    loss_on: Literal["answer", "all"] = flag(
        "Learn the tokens of the answer, end token included, or those of the prompt too.", "answer",
        zh="只学习回答的 token（含结束符），或连同提示一起学习。",
    )
    learning_rate: float = flag(RATE, 2e-5, common=True, resume="allow", zh=RATE_ZH)

    def __post_init__(self) -> None:
        super().__post_init__()
        apart = (self.max_source_length, self.max_target_length)
        if None not in apart and self.max_seq_len == type(self).max_seq_len:  # as good as not given
            self.max_seq_len = sum(apart)


@dataclass(kw_only=True)
class RewardArguments(SupervisedArguments):
    """Step 2: the reward model."""

    section: ClassVar[str] = "reward"
    title: ClassVar[str] = "step 2 (reward model)"
    zh: ClassVar[str] = "第二步：奖励模型。"
    phase: ClassVar[int] = 2

    learning_rate: float = flag(
        "Highest learning rate of whole weights, of a prefix, and always of the score head; adapters have --lora_learning_rate.",
        1e-5, common=True,
        resume="allow",
        zh="全部权重或前缀以及打分头的最大学习率；适配器用 --lora_learning_rate。",
    )
    center_rewards_coefficient: float = flag(
        "Weight of (chosen + rejected)^2 in the loss, which keeps scores around zero.", 0.0,
        resume="allow",
        zh="损失中 (chosen + rejected)^2 的权重，使分数保持在零附近。",
    )


@dataclass(kw_only=True)
class PromptEvalArguments:
    """evaluate/side_by_side.py: the answers of two models side by side."""

    section: ClassVar[str] = "prompt_eval"
    title: ClassVar[str] = "prompt_eval"
    zh: ClassVar[str] = "evaluate/side_by_side.py：两个模型的回答并列对照。"

    model_name_or_path_baseline: str = flag("The model before training.", common=True, zh="训练前的模型。")
    model_name_or_path_finetune: str = flag("The model after training.", common=True, zh="训练后的模型。")
    max_new_tokens: int = flag("Longest answer in tokens.", 100, within=ONE_OR_MORE, zh="回答的最大 token 数。")
    num_return_sequences: int = flag(
        "Answers to each prompt; one is greedy, more are sampled.", 1, within=ONE_OR_MORE,
        zh="每个提示的回答数；一个为贪心解码，更多则采样。",
    )
    temperature: float = flag(
        "Sampling temperature, where answers are sampled.", 1.0, within=ABOVE_ZERO,
        zh="采样温度。",
    )
    top_p: float = flag(
        "Where answers are sampled: the likeliest tokens that hold this share of probability.", 1.0, within=SHARE,
        zh="从累计概率达到该比例的最可能 token 中采样；1 = 全部。",
    )
    language: Literal["English", "Chinese", "Japanese"] = flag(
        "Language of the built-in prompts.", "English", common=True,
        zh="内置提示的语言。",
    )
    data_path: list[str] = flag(
        "Prompts of these data sets (their held-out part where they have one) instead.", [], common=True,
        zh="改用这些数据集的提示（有留出部分时用留出部分）。",
    )
    columns: str | None = flag("As in training.", None, zh="同训练。")
    prompts: str | None = flag(
        "Prompts of this text file, one a line, instead.", None, metavar="FILE",
        zh="改用该文本文件中的提示，每行一个。",
    )
    num_prompts: int = flag(
        "How many prompts of each data set, or of the built-in ones.", 6, within=ONE_OR_MORE, common=True,
        zh="每个数据集或内置提示取多少个提示。",
    )
    output: str | None = flag(
        "Also write prompts, answers and figures to this JSON file.", None, metavar="FILE", common=True,
        zh="同时把提示、回答和指标写入该 JSON 文件。",
    )
    seed: int = flag("Random seed.", 1234, within=SEED, zh="随机种子。")
    dtype: Dtype = flag("Type of the weights, as in training.", "auto", common=True, zh="权重的数值类型，同训练。")
    attn_implementation: Attention = flag("Attention kernels, as in training.", "auto", zh="注意力实现，同训练。")

    column_map = CommonArguments.column_map


@dataclass(kw_only=True)
class EvaluateArguments:
    """scripts/evaluate: a model, and the one before training beside it, on records of a data set or on tasks of lm-eval."""

    section: ClassVar[str] = "evaluate"
    title: ClassVar[str] = "evaluate"
    zh: ClassVar[str] = "scripts/evaluate：在数据集或 lm-eval 的任务上评估模型，可与训练前的并列。"

    model_name_or_path: str = flag("The trained model.", aliases=("path",), common=True, zh="训练所得的模型。")
    baseline: str | None = flag(
        "Also evaluate this model, such as the one before training; its metrics stand beside.", None, metavar="MODEL",
        common=True,
        zh="同时评估该模型（例如训练前的模型）；其指标列在旁边。",
    )
    reward_model: str | None = flag(
        "Score the answers with this reward model, and count how often they win. Prompts need no answers then.", None,
        metavar="MODEL", common=True,
        zh="用该奖励模型给回答打分，并统计胜率。此时提示可以没有参考回答。",
    )
    data_path: list[str] = flag(
        "Data sets with prompts and answers; of a set with a held-out part only that.", [], common=True,
        zh="含提示和回答的数据集；有留出部分时只用留出部分。",
    )
    output_dir: str = flag(
        "Folder for eval.html, eval.md, eval.json, generated_predictions.txt and metrics.json.", common=True,
        zh="保存 eval.html、eval.md、eval.json、generated_predictions.txt 和 metrics.json 的文件夹。",
    )
    lm_eval: list[str] = flag(
        "Tasks of lm-eval (EleutherAI's harness), or YAML files of tasks of one's own. Needs requirements-eval.txt.", [],
        metavar="TASK", common=True,
        zh="lm-eval（EleutherAI 评测框架）的任务名，或自己任务的 YAML 文件。需要 requirements-eval.txt。",
    )
    num_fewshot: int | None = flag(
        "With --lm_eval: examples before each question; None: as the task says.", None,
        zh="配合 --lm_eval：每题之前的示例数；缺省：按任务的规定。",
    )
    apply_chat_template: bool = flag(
        "With --lm_eval: ask each question as a message of a dialogue, in the form that the model was trained in.", False,
        zh="配合 --lm_eval：把每题作为一条对话消息，按模型训练时的对话格式提问。",
    )
    ptuning_checkpoint: str | None = flag(
        "Folder of a saved prefix to put before the model's texts; not needed where that folder is the model.", None,
        metavar="FOLDER",
        zh="放在模型文本之前的已保存前缀的文件夹；该文件夹就是模型时不需要。",
    )
    quantization_bit: Literal[0, 4, 8] = flag(
        "Hold the linear layers in 4 or 8 bits; 0 = as they are.", 0, common=True,
        zh="线性层以 4 或 8 位存放；0 = 保持原样。",
    )
    columns: str | None = flag("As in training.", None, zh="同训练。")
    cache_dir: str | None = flag("As in training.", None, zh="同训练。")
    num_examples: int = flag(
        "How many records of each data set, or of each task of lm-eval; 0 = all.", 0,
        aliases=("max_predict_samples", "max_eval_samples"), common=True,
        zh="每个数据集（或 lm-eval 的每个任务）取多少条记录；0 = 全部。",
    )
    max_source_length: int | None = flag(
        "Longest prompt in tokens; longer ones lose their oldest part. None: what the model leaves room for.", None,
        within=LENGTH,
        zh="提示的最大 token 数；超长时丢弃最旧的部分。缺省：模型留出的余地。",
    )
    max_target_length: int = flag(
        "Longest answer in tokens, end token included.", 128, aliases=("max_new_tokens", "val_max_target_length"),
        within=WORD_AND_END, common=True,
        zh="回答的最大 token 数，含结束符。",
    )
    truncate_labels: bool = flag(
        "Compare with the first --max_target_length tokens of the written answer, as published figures do; false: with "
        "all of it.",
        True,
        zh="与参考回答的前 --max_target_length 个 token 比较（已发布的指标如此）；false：与全文比较。",
    )
    per_device_eval_batch_size: int = flag(
        "Prompts that each process answers at once.", 16, within=ONE_OR_MORE,
        zh="每个进程一次回答的提示数。",
    )
    do_sample: bool = flag(
        "Sample, each record with a seed of its own. Off, answers are greedy and two runs agree.", False,
        zh="采样，每条记录有自己的种子。关闭时为贪心解码，两次运行结果相同。",
    )
    temperature: float = flag(
        "With --do_sample: sampling temperature.", 0.95, within=ABOVE_ZERO,
        zh="配合 --do_sample：采样温度。",
    )
    top_p: float = flag(
        "With --do_sample: the likeliest tokens that hold this share of probability.", 0.7, within=SHARE,
        zh="配合 --do_sample：从累计概率达到该比例的最可能 token 中采样。",
    )
    top_k: int = flag(
        "With --do_sample: so many likeliest tokens; 0 = all.", 0,
        zh="配合 --do_sample：从最可能的这么多个 token 中采样；0 = 全部。",
    )
    seed: int = flag("Random seed.", 1234, within=SEED, zh="随机种子。")
    dtype: Dtype = flag("Type of the weights, as in training.", "auto", common=True, zh="权重的数值类型，同训练。")
    attn_implementation: Attention = flag("Attention kernels, as in training.", "auto", zh="注意力实现，同训练。")

    column_map = CommonArguments.column_map


@dataclass(kw_only=True)
class RewardEvalArguments:
    """evaluate/reward_scores.py: scores of good and bad answers."""

    section: ClassVar[str] = "rw_eval"
    title: ClassVar[str] = "rw_eval"
    zh: ClassVar[str] = "evaluate/reward_scores.py：给好回答和坏回答打分。"

    model_name_or_path: str = flag("The reward model.", common=True, zh="奖励模型。")
    data_path: list[str] = flag(
        "Pairs to score (held-out part where a set has one). None: a few built-in pairs.", [], common=True,
        zh="要打分的样本对（有留出部分时用留出部分）。缺省：若干内置样本对。",
    )
    columns: str | None = flag("As in training.", None, zh="同训练。")
    max_seq_len: int = flag(
        "Longest prompt and answer in tokens, as in training.", 512,
        within=PROMPT_AND_END, common=True,
        zh="样本（提示加回答）的最大 token 数。超长时丢弃提示中最旧的部分，从不丢弃结束符。",
    )
    num_pairs: int = flag(
        "How many pairs of each data set; 0 = all.", 1000, common=True,
        zh="每个数据集取多少个样本对；0 = 全部。",
    )
    per_device_eval_batch_size: int = flag("Pairs scored at once.", 16, within=ONE_OR_MORE, zh="一次打分的样本对数。")
    output: str | None = flag(
        "Also write scores and figures to this JSON file.", None, metavar="FILE", common=True,
        zh="同时把分数和指标写入该 JSON 文件。",
    )
    dtype: Dtype = flag("Type of the weights, as in training.", "auto", common=True, zh="权重的数值类型，同训练。")
    attn_implementation: Attention = flag("Attention kernels, as in training.", "auto", zh="注意力实现，同训练。")

    column_map = CommonArguments.column_map


# By their numbers; DPO, which stands for steps 2 and 3, comes last.
STEPS = (SFTArguments, RewardArguments, PPOArguments, DPOArguments)
