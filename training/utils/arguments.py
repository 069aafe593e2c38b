"""The flags of the three steps, as dataclasses: one definition for command line, recipes, README and error messages.

parsing.py reads command lines and recipes into them, checks.py finds values that cannot be meant, former_flags.py knows
the flags of earlier systems. Nothing here imports torch: ``--help`` answers at once.
"""

# ruff: noqa: RUF009  (flag() returns a dataclasses.field)

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Dtype = Literal["auto", "fp32", "fp16", "bf16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Stage = Literal[0, 1, 2, 3]


def flag(help: str, default: Any = MISSING, *, aliases: tuple[str, ...] = (), **options: Any) -> Any:
    """A dataclass field that HfArgumentParser turns into a flag; required where no default is given.

    aliases: other names, without dashes. options go to argparse (nargs, const, metavar).
    """
    metadata = {"help": help if default is not MISSING else f"Required. {help}", **options}
    if aliases:
        metadata["aliases"] = [f"--{name}" for alias in aliases for name in (alias, alias.replace("_", "-"))]
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class CommonArguments:
    """What all three steps share."""

    section: ClassVar[str]   # of a recipe
    title: ClassVar[str]     # in messages
    phase: ClassVar[int]     # which share of --data_split

    output_dir: str = flag("Folder for the trained model, metrics.jsonl and checkpoints.")
    config: str | None = flag(
        "YAML recipe: sections launch, sft, reward and ppo, or this step's flags alone. The command line wins.", None,
        metavar="FILE",
    )

    # data
    data_path: list[str] = flag(
        "One or more data sets: named sets, hub ids, folders saved by scripts/download_dataset.py, or JSON, JSONL, "
        "CSV and Parquet files.",
        ["Dahoas/rm-static"],
    )
    data_split: str = flag(
        "Shares of steps 1, 2 and 3. A record belongs to one step by a hash of its content, whatever the machine.",
        "2,4,4",
    )
    columns: str | None = flag(
        "Names of the fields in your file where they differ from ours, such as prompt=question,chosen=best_answer.",
        None,
    )
    eval_fraction: float = flag("Share of a set without a held-out part of its own that is kept for evaluation.", 0.05)
    cache_dir: str | None = flag(
        "Folder for tokenised data. None: SANBU_CACHE, or sanbu in the user's cache folder; never the shared /tmp.",
        None, aliases=("data_output_path",),
    )
    rebuild_cache: bool = flag("Tokenise again although the cache holds this content.", False)

    # loop
    num_train_epochs: int = flag("Passes over the data.", 1)
    max_steps: int = flag("Stop after so many optimizer steps (step 3: rollouts); 0 = when the epochs are done.", 0)
    gradient_accumulation_steps: int = flag("Micro-batches of each process in one optimizer step.", 1)
    max_tokens_per_device: int = flag(
        "Cut micro-batches by this number of tokens, padding included, instead of by the number of examples; 0 = off.",
        0,
    )
    seed: int = flag(
        "Random seed. The same in every step: the earlier systems leaked data where step 3 had none.", 1234,
    )
    logging_steps: int = flag("Print and record figures every so many optimizer steps.", 10)
    eval_interval: int = flag("Evaluate every so many optimizer steps; 0 = at the end of each epoch.", 0)
    save_steps: int = flag("Write a checkpoint every so many optimizer steps; 0 = at the end of each epoch.", 0)
    save_total_limit: int = flag("Keep only the newest checkpoints, so many; 0 = all.", 2)
    resume: str | None = flag(
        "Continue: alone from the newest whole checkpoint under --output_dir, or from the folder named.", None,
        nargs="?", const="auto", metavar="FOLDER",
    )
    enable_tensorboard: bool = flag("Write curves for TensorBoard.", False)
    tensorboard_path: str | None = flag("Folder of the curves. None: tensorboard under --output_dir.", None)

    # optimizer
    lr_scheduler_type: Schedule = flag("How the learning rate changes over the run.", "cosine")
    num_warmup_steps: int = flag("Optimizer steps of linear warm-up; at most half of the run is used for it.", 0)
    optimizer: Literal["auto", "adamw", "fused_adam", "cpu_adam"] = flag(
        "auto: torch's AdamW, or DeepSpeed's CPU Adam where optimizer states are offloaded.", "auto",
    )
    adam_beta1: float = flag("Decay of the mean of gradients.", 0.9)
    adam_beta2: float = flag("Decay of the mean of squared gradients.", 0.95)
    adam_epsilon: float = flag("Added to the root of the mean square.", 1e-8)
    max_grad_norm: float = flag("Gradients are scaled down to this norm; 0 = never.", 1.0)

    # numbers
    dtype: Dtype = flag(
        "Type of weights and activations. auto: bf16 where the device computes in it, else fp16, and fp32 on a CPU "
        "(the earlier systems' fp16 overflowed often). Losses, log-probabilities and their sums are float32 always.",
        "auto",
    )
    attn_implementation: Attention = flag("Attention kernels. auto: sdpa where the model has it, else eager.", "auto")
    only_optimize_lora: bool = flag(
        "With LoRA all other weights are frozen, but for a score head. Always so: false with LoRA is refused.",
        True,
    )

    # memory: integers, ZeRO and offload
    quantization_bit: Literal[0, 4, 8] = flag(
        "Hold the linear layers of the frozen base in 4 or 8 bits, under LoRA or P-Tuning; 0 = as they are. The weights "
        "are whole on every process while they are quantised, and ZeRO stage 3 does not split the integers. In step 3: "
        "actor and reference where the actor has adapters, critic and reward model where the critic has.",
        0,
    )
    offload: bool = flag("Keep optimizer states in host memory, under ZeRO stage 3 the parameters too.", False)
    offload_optimizer: bool = flag("Keep only the optimizer states in host memory (ZeRO stage 1 or more).", False)
    offload_param: bool = flag("Keep the parameters in host memory (ZeRO stage 3).", False)
    zero_hpz_partition_size: int = flag(
        "ZeRO++ (stage 3): second copy of the weights over this number of cards, those of one node; 1 = off.", 1,
    )
    zero_quantized_weights: bool = flag("ZeRO++ (stage 3): gather weights in 8 bits.", False)
    zero_quantized_gradients: bool = flag("ZeRO++ (stage 3): reduce gradients in 4 bits.", False)
    zero_quantized_nontrainable_weights: bool = flag("ZeRO++ (stage 3): hold frozen weights in 8 bits.", False)
    deepspeed_config: str | None = flag(
        "JSON whose keys win over the DeepSpeed configuration made from the flags.", None,
        aliases=("deepscale_config",), metavar="FILE",
    )
    local_rank: int = flag("Set by the launcher.", -1)

    def __post_init__(self) -> None:
        if self.tensorboard_path is None:
            self.tensorboard_path = str(Path(self.output_dir) / "tensorboard")

    @property
    def column_map(self) -> dict[str, str]:
        """--columns as a dictionary: our name -> the name in the file."""
        return dict(pair.split("=", 1) for pair in self.columns.split(",")) if self.columns else {}

    def prefix_options(self, role: str = "") -> dict[str, Any]:
        """What the factory needs to know of a prefix; role as in EngineOptions.of."""
        names = ("pre_seq_len", "prefix_projection", "ptuning_checkpoint")
        return {name: getattr(self, f"{role}_{name}" if role else name) for name in names}


@dataclass(kw_only=True)
class SupervisedArguments(CommonArguments):
    """What steps 1 and 2 share: one model, examples in batches."""

    model_name_or_path: str = flag("Folder or hub id of the model to start from.")
    max_seq_len: int = flag(
        "Longest example in tokens, prompt and answer. Longer ones lose the oldest part of the prompt, never the end "
        "token.",
        512,
    )
    per_device_train_batch_size: int = flag("Examples (step 2: pairs) in a micro-batch of each process.", 16)
    per_device_eval_batch_size: int = flag("Examples (step 2: pairs) of each process at once in evaluation.", 16)
    global_batch_size: int = flag(
        "Examples of one optimizer step over all processes; sets the accumulation. 0 = per_device_train_batch_size x "
        "gradient_accumulation_steps x processes.",
        0,
    )
    eval_iters: int = flag("Evaluate on at most so many micro-batches of each process; 0 = on all.", 0)
    learning_rate: float = flag("Highest learning rate.")
    weight_decay: float = flag("Weight decay of matrices; biases and norms have none.", 0.0)
    dropout: float = flag(
        "Dropout everywhere in the model. 0 where the earlier systems kept the model's own (often 0.1): one or two "
        "epochs do not need it.",
        0.0,
    )
    gradient_checkpointing: bool = flag(
        "Recompute activations in the backward pass: less memory, a third more work.", False,
    )
    zero_stage: Stage = flag("ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 weights too.", 0)
    lora_dim: int = flag("Rank of LoRA adapters; 0 = train all weights.", 0)
    lora_alpha: float | None = flag(
        "Adapters are scaled by lora_alpha / lora_dim. None: twice --lora_dim, so the scale is 2 whatever the rank "
        "(it was fixed at 1 / lora_dim).",
        None,
    )
    lora_dropout: float = flag("Dropout in front of the adapters.", 0.0)
    lora_module_name: str = flag(
        "Modules that get adapters: part of their name, or several with commas; auto = the linear layers of each "
        "block.",
        "auto",
    )
    lora_learning_rate: float = flag(
        "Highest learning rate of the adapters. 5e-4 in the earlier systems, whose scale 1 / lora_dim made steps tiny.",
        1e-4,
    )
    pre_seq_len: int = flag(
        "P-Tuning v2: train so many learned places in front of every text (step 2: and the score head) and freeze all "
        "else; only they are saved, and the folder names the model they belong to. They want a high --learning_rate: "
        "the published launchers have 2e-2. 0 = off; a model folder that holds a saved prefix goes on with it.",
        0,
    )
    prefix_projection: bool = flag(
        "With --pre_seq_len: make the prefix with a network of two layers, which starts more slowly and is larger.",
        False,
    )
    ptuning_checkpoint: str | None = flag(
        "Start from the prefix saved in this folder (of this step or, for ChatGLM, a checkpoint-N of the original "
        "trainer's), put before the model that it was trained on.",
        None, metavar="FOLDER",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.lora_dim


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
class PPOArguments(CommonArguments):
    """Step 3: PPO."""

    section: ClassVar[str] = "ppo"
    title: ClassVar[str] = "step 3 (PPO)"
    phase: ClassVar[int] = 3

    actor_model_name_or_path: str = flag("The SFT model: actor and reference start from it.")
    critic_model_name_or_path: str = flag("The reward model: critic and reward model start from it.")

    # lengths and batches
    max_prompt_seq_len: int = flag("Longest prompt in tokens; longer ones are left out and counted.", 256)
    max_answer_seq_len: int = flag("Longest answer in tokens.", 256)
    per_device_generation_batch_size: int = flag(
        "Prompts that each process answers at once.", 16, aliases=("per_device_train_batch_size",),
    )
    generation_batches: int = flag("Such batches in one rollout.", 1, aliases=("generation_batch_numbers",))
    per_device_training_batch_size: int = flag(
        "Answers in a micro-batch of each process; times gradient_accumulation_steps a minibatch.", 16,
        aliases=("per_device_mini_train_batch_size",),
    )
    ppo_epochs: int = flag("Passes over a rollout.", 1)

    # sampling
    temperature: float = flag(
        "Sampling temperature. The earlier systems were greedy: nothing to compare, nothing to learn.", 1.0,
    )
    top_p: float = flag("Sample from the likeliest tokens that hold this share of probability; 1 = all.", 1.0)
    top_k: int = flag("Sample from so many likeliest tokens; 0 = all.", 0)

    # reward and objective
    kl_coef: float = flag("Weight of the KL penalty against the reference. Was fixed: 0.1 or, in forks, 0.02.", 0.05)
    kl_estimator: Literal["k1"] = flag("k1: the difference of log-probabilities, in the reward of each token.", "k1")
    normalize_reward: bool = flag(
        "Subtract the mean of the reward model's scores and divide by their spread, as step 2 stored them.", True,
    )
    clip_reward_value: float = flag("Scores are cut to +- this, after normalisation; 0 = never.", 5.0)
    missing_eos_penalty: float = flag(
        "Taken off the normalised score of an answer that did not end within the limit.", 1.0,
    )
    gamma: float = flag("Discount from token to token.", 1.0)
    lam: float = flag("Lambda of generalised advantage estimation.", 0.95)
    whiten_advantages: bool = flag("Scale the advantages of a rollout to mean 0, variance 1.", True)
    cliprange: float = flag("The ratio of probabilities counts up to 1 +- this.", 0.2)
    cliprange_value: float = flag("The critic's value counts up to +- this around its old value.", 0.2)

    # optimizer; warm-up, logging and the rest count in this step's own units
    actor_learning_rate: float = flag(
        "Highest learning rate of the actor. 9.65e-6 in the earlier systems; those that sample use 1e-6 to 3e-6.",
        1e-6,
    )
    critic_learning_rate: float = flag("Highest learning rate of the critic.", 5e-6)
    actor_weight_decay: float = flag("Weight decay of the actor's matrices.", 0.0)
    critic_weight_decay: float = flag("Weight decay of the critic's matrices.", 0.0)
    num_warmup_steps: int = flag(
        "Optimizer steps of linear warm-up; at most half of the run. The earlier 100 was a fifth of a published run.",
        10,
    )

    # models
    actor_dropout: float = flag("Dropout of the actor; above 0 the ratio of probabilities is noise.", 0.0)
    critic_dropout: float = flag("Dropout of the critic.", 0.0)
    actor_gradient_checkpointing: bool = flag("Recompute the actor's activations in the backward pass.", False)
    critic_gradient_checkpointing: bool = flag("Recompute the critic's activations in the backward pass.", False)
    actor_zero_stage: Stage = flag("ZeRO stage of the actor; at 3 the reference is sharded too.", 0)
    critic_zero_stage: Stage = flag("ZeRO stage of the critic; at 3 the reward model is sharded too.", 0)
    offload_reference_model: bool = flag("Keep the reference in host memory.", False)
    offload_reward_model: bool = flag("Keep the reward model in host memory.", False)
    actor_lora_dim: int = flag("Rank of the actor's LoRA adapters; 0 = train all weights.", 0)
    critic_lora_dim: int = flag("Rank of the critic's LoRA adapters; 0 = train all weights.", 0)
    actor_lora_alpha: float | None = flag("As --lora_alpha. None: twice --actor_lora_dim.", None)
    critic_lora_alpha: float | None = flag("As --lora_alpha. None: twice --critic_lora_dim.", None)
    actor_lora_module_name: str = flag("As --lora_module_name, for the actor.", "auto")
    critic_lora_module_name: str = flag("As --lora_module_name, for the critic.", "auto")
    actor_lora_learning_rate: float = flag("Highest learning rate of the actor's adapters (5e-4 before).", 1e-5)
    critic_lora_learning_rate: float = flag("Highest learning rate of the critic's adapters (5e-4 before).", 5e-5)
    actor_pre_seq_len: int = flag(
        "P-Tuning v2 of the actor: train so many learned places in front of every text, freeze all "
        "else. The reference is the model without them. A model folder that holds a saved prefix, as step "
        "1 writes, needs no flag: the actor goes on with that prefix, the reference keeps it as it is.",
        0, aliases=("pre_seq_len",),
    )
    critic_pre_seq_len: int = flag("P-Tuning v2 of the critic, its score head included; as for the actor.", 0)
    actor_prefix_projection: bool = flag("As --prefix_projection, for the actor.", False, aliases=("prefix_projection",))
    critic_prefix_projection: bool = flag("As --prefix_projection, for the critic.", False)
    actor_ptuning_checkpoint: str | None = flag(
        "Folder of a saved prefix that actor and reference start with; as if that folder were the model.", None,
        aliases=("ptuning_checkpoint",), metavar="FOLDER",
    )
    critic_ptuning_checkpoint: str | None = flag(
        "Folder of a saved prefix that critic and reward model start with.", None, metavar="FOLDER",
    )

    # evaluation and log
    eval_prompts: int = flag("Held-out prompts answered in each evaluation; 0 = no evaluation.", 64)
    eval_interval: int = flag("Evaluate every so many rollouts; 0 = only before and after.", 50)
    save_steps: int = flag("Write a checkpoint every so many rollouts; 0 = only the result.", 50)
    logging_steps: int = flag("Print and record figures every so many rollouts.", 1)
    print_answers: bool = flag("Print a few prompts with answers and scores.", False)
    print_answers_interval: int = flag("With --print_answers: every so many rollouts.", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actor_lora_alpha is None:
            self.actor_lora_alpha = 2.0 * self.actor_lora_dim
        if self.critic_lora_alpha is None:
            self.critic_lora_alpha = 2.0 * self.critic_lora_dim


@dataclass(kw_only=True)
class PromptEvalArguments:
    """step1_sft/prompt_eval.py: the answers of two models side by side."""

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
    """step1_sft/evaluate.py: answers to the prompts of a data set, scored against the written ones."""

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
    """step2_reward/rw_eval.py: scores of good and bad answers."""

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


STEPS = (SFTArguments, RewardArguments, PPOArguments)
