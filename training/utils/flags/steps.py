"""The flags of the three steps, as dataclasses: one definition for command line, recipes, README and error messages.

parsing.py reads command lines and recipes into them, checks.py finds values that cannot be meant, former_flags.py knows
the flags of earlier systems. What all steps share is in common_arguments.py, step 3 in ppo_arguments.py, DPO in
dpo_arguments.py. Nothing here imports torch: ``--help`` answers at once.
"""

# ruff: noqa: RUF009  (flag() returns a dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from training.utils.flags.common import Attention, CommonArguments, Dtype, SupervisedArguments, flag
from training.utils.flags.dpo import DPOArguments
from training.utils.flags.ppo import PPOArguments


@dataclass(kw_only=True)
class SFTArguments(SupervisedArguments):
    """Step 1: supervised fine-tuning."""

    section: ClassVar[str] = "sft"
    title: ClassVar[str] = "step 1 (SFT)"
    phase: ClassVar[int] = 1

    sft_only_data_path: list[str] = flag("Data sets used whole in this step, outside --data_split.", [])
    max_source_length: int | None = flag(
        "With --max_target_length, instead of --max_seq_len, which becomes the sum: longest prompt in tokens. Longer "
        "ones lose their oldest part, where the earlier system cut off the question at the end.",
        None,
    )
    max_target_length: int | None = flag(
        "Longest answer in tokens, end token included. Longer ones lose their tail, never the end token.", None,
    )
    loss_on: Literal["answer", "all"] = flag(
        "Learn the tokens of the answer, end token included, or those of the prompt too.", "answer",
    )
    learning_rate: float = flag(
        "Highest learning rate. 1e-3 in the earlier systems, which suits adapters, not whole weights.", 2e-5,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        apart = (self.max_source_length, self.max_target_length)
        if None not in apart and self.max_seq_len == type(self).max_seq_len:   # as good as not given
            self.max_seq_len = sum(apart)


@dataclass(kw_only=True)
class RewardArguments(SupervisedArguments):
    """Step 2: the reward model."""

    section: ClassVar[str] = "reward"
    title: ClassVar[str] = "step 2 (reward model)"
    phase: ClassVar[int] = 2

    learning_rate: float = flag("Highest learning rate. 5e-5 in the earlier systems, for a 350M model.", 1e-5)
    center_rewards_coefficient: float = flag(
        "Weight of (chosen + rejected)^2 in the loss, which keeps scores around zero.", 0.0,
    )


@dataclass(kw_only=True)
class PromptEvalArguments:
    """evaluate/side_by_side.py: the answers of two models side by side."""

    section: ClassVar[str] = "prompt_eval"
    title: ClassVar[str] = "prompt_eval"

    model_name_or_path_baseline: str = flag("The model before training.")
    model_name_or_path_finetune: str = flag("The model after training.")
    max_new_tokens: int = flag("Longest answer in tokens.", 100)
    num_return_sequences: int = flag("Answers to each prompt; one is greedy, more are sampled.", 1)
    temperature: float = flag("Sampling temperature, where answers are sampled.", 1.0)
    top_p: float = flag("Where answers are sampled: the likeliest tokens that hold this share of probability.", 1.0)
    language: Literal["English", "Chinese", "Japanese"] = flag("Language of the built-in prompts.", "English")
    data_path: list[str] = flag("Prompts of these data sets (their held-out part where they have one) instead.", [])
    columns: str | None = flag("As in training.", None)
    prompts: str | None = flag("Prompts of this text file, one a line, instead.", None, metavar="FILE")
    num_prompts: int = flag("How many prompts of each data set.", 6)
    output: str | None = flag("Also write prompts, answers and figures to this JSON file.", None, metavar="FILE")
    seed: int = flag("Random seed.", 1234)
    dtype: Dtype = flag("Type of the weights, as in training.", "auto")
    attn_implementation: Attention = flag("Attention kernels, as in training.", "auto")

    column_map = CommonArguments.column_map


@dataclass(kw_only=True)
class EvaluateArguments:
    """evaluate/bleu_rouge.py: answers to the prompts of a data set, scored against the written ones."""

    section: ClassVar[str] = "evaluate"
    title: ClassVar[str] = "evaluate"

    model_name_or_path: str = flag("The trained model.")
    data_path: list[str] = flag("Data sets with prompts and answers; of a set with a held-out part only that.")
    output_dir: str = flag("Folder for generated_predictions.txt and metrics.json.")
    ptuning_checkpoint: str | None = flag(
        "Folder of a saved prefix to put before the model's texts; not needed where that folder is the model.", None,
        metavar="FOLDER",
    )
    quantization_bit: Literal[0, 4, 8] = flag("Hold the linear layers in 4 or 8 bits; 0 = as they are.", 0)
    columns: str | None = flag("As in training.", None)
    cache_dir: str | None = flag("As in training.", None)
    num_examples: int = flag(
        "How many records of each data set; 0 = all.", 0, aliases=("max_predict_samples", "max_eval_samples"),
    )
    max_source_length: int | None = flag(
        "Longest prompt in tokens; longer ones lose their oldest part. None: what the model leaves room for.", None,
    )
    max_target_length: int = flag(
        "Longest answer in tokens, end token included.", 128, aliases=("max_new_tokens", "val_max_target_length"),
    )
    truncate_labels: bool = flag(
        "Compare with the first --max_target_length tokens of the written answer, as published figures do; false: with "
        "all of it.",
        True,
    )
    per_device_eval_batch_size: int = flag("Prompts that each process answers at once.", 16)
    do_sample: bool = flag(
        "Sample, each record with a seed of its own. Off, answers are greedy and two runs agree; the earlier system "
        "sampled without saying its seed.",
        False,
    )
    temperature: float = flag("With --do_sample: sampling temperature.", 0.95)
    top_p: float = flag("With --do_sample: the likeliest tokens that hold this share of probability.", 0.7)
    top_k: int = flag("With --do_sample: so many likeliest tokens; 0 = all.", 0)
    seed: int = flag("Random seed.", 1234)
    dtype: Dtype = flag("Type of the weights, as in training.", "auto")
    attn_implementation: Attention = flag("Attention kernels, as in training.", "auto")
    local_rank: int = flag("Set by the launcher.", -1)

    column_map = CommonArguments.column_map


@dataclass(kw_only=True)
class RewardEvalArguments:
    """evaluate/reward_scores.py: scores of good and bad answers."""

    section: ClassVar[str] = "rw_eval"
    title: ClassVar[str] = "rw_eval"

    model_name_or_path: str = flag("The reward model.")
    data_path: list[str] = flag("Pairs to score (held-out part where a set has one). None: a few built-in pairs.", [])
    columns: str | None = flag("As in training.", None)
    max_seq_len: int = flag("Longest prompt and answer in tokens, as in training.", 512)
    num_pairs: int = flag("How many pairs of each data set; 0 = all.", 1000)
    per_device_eval_batch_size: int = flag("Pairs scored at once.", 16)
    output: str | None = flag("Also write scores and figures to this JSON file.", None, metavar="FILE")
    dtype: Dtype = flag("Type of the weights, as in training.", "auto")
    attn_implementation: Attention = flag("Attention kernels, as in training.", "auto")

    column_map = CommonArguments.column_map


# By their numbers; DPO, which stands for steps 2 and 3, comes last.
STEPS = (SFTArguments, RewardArguments, PPOArguments, DPOArguments)
