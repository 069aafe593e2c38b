"""The flags of step 3."""

# ruff: noqa: RUF009  (flag() returns a dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from training.utils.flags.common import CommonArguments, Stage, flag


@dataclass(kw_only=True)
class PPOArguments(CommonArguments):
    """Step 3: PPO."""

    section: ClassVar[str] = "ppo"
    title: ClassVar[str] = "step 3 (PPO)"
    phase: ClassVar[int] = 3

    actor_model_name_or_path: str = flag("The SFT model: actor and reference start from it.")
    critic_model_name_or_path: str | None = flag(
        "The reward model: critic and reward model start from it. Required, but for --reward_model false without a critic "
        "(--advantage grpo, rloo, reinforce++).",
        None,
    )

    # lengths and batches
    max_prompt_seq_len: int = flag("Longest prompt in tokens; longer ones are left out and counted.", 256)
    max_answer_seq_len: int = flag("Longest answer in tokens.", 256)
    per_device_generation_batch_size: int = flag(
        "Prompts that each process answers at once.", 16, aliases=("per_device_train_batch_size",),
    )
    generation_batches: int = flag("Such batches in one rollout.", 1, aliases=("generation_batch_numbers",))
    num_return_sequences: int = flag(
        "Answers to each prompt of a rollout; grpo and rloo compare them with each other. All answers to the prompts of a "
        "generation batch are in work at once.",
        1,
    )
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

    stop_strings: list[str] = flag(
        "An answer also ends with the token that completes one of these texts; such an end counts as one, as the end token "
        "does.",
        [],
    )
    generation_weights: Literal["auto", "gathered", "layerwise"] = flag(
        "Under ZeRO-3. gathered: each process gathers the whole actor once a rollout. layerwise: the weights stay split and "
        "every token fetches every layer, slow, in little memory. auto: gathered where they fit beside the cache.",
        "auto",
    )
    release_inference_cache: bool = flag(
        "After each rollout give the card memory that it took back to the driver. Weights and cache of a rollout are always "
        "let go of; without this torch keeps their memory for itself.",
        False,
    )

    # KL penalty
    kl_coef: float = flag("Weight of the KL penalty against the reference. Was fixed: 0.1 or, in forks, 0.02.", 0.05)
    kl_estimator: Literal["k1", "k2", "k3"] = flag(
        "Estimate of a token's KL from d, its difference of log-probabilities: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. "
        "In the reward k1 has the right gradient; in the loss the gradient is k2's, the right one there, for all three.",
        "k1",
    )
    kl_in: Literal["reward", "loss"] = flag("Take the penalty off each token's reward, or add it to the loss.", "reward")
    kl_clip: float | None = flag(
        "A token's estimate counts up to +- this; 0 = however far. None: 10 for k2 and k3, which explode on unlikely "
        "tokens, 0 for k1.",
        None,
    )
    kl_target: float = flag(
        "After each rollout --kl_coef is moved so that the KL comes to this many nats an answer; 0 = it stays.", 0.0,
    )
    kl_horizon: float = flag(
        "With --kl_target: answers in which the coefficient can change by a fifth at most.", 10_000.0,
    )

    # rewards
    reward_model: bool = flag(
        "The reward model scores. false: only --reward_function and --reward_endpoint do, and it is not loaded.", True,
    )
    reward_function: list[str] = flag(
        "Python functions that score, each as FILE.py:NAME, called with a list of prompts and one of answers "
        "(docs/en/rewards.md).",
        [],
    )
    reward_endpoint: list[str] = flag(
        'Servers that score: POST of JSON {"prompts": [...], "answers": [...]}, answered by {"scores": [...]}.', [],
    )
    reward_weights: str | None = flag(
        "Weights of the sources in the sum that is the score, in the order reward model, functions, endpoints: with "
        "commas, such as 1,0.5 (--reward_weights=-1,2 if the first is negative). 0: only in the log. None: 1 each.",
        None,
    )
    reward_timeout: float = flag("Seconds that an endpoint has for its answer.", 60.0)
    reward_retries: int = flag(
        "Further attempts at an endpoint that is down, slow or busy, after 1, 2, 4, … seconds (60 at most).", 5,
    )
    normalize_reward: bool = flag(
        "Subtract the mean of the reward model's scores and divide by their spread, as step 2 stored them.", True,
    )
    clip_reward_value: float = flag("Scores are cut to +- this, after normalisation; 0 = never.", 5.0)
    missing_eos_penalty: float = flag(
        "Taken off the normalised score of an answer that did not end within the limit.", 1.0,
    )
    overlong_penalty: float = flag(
        "Taken off the normalised score of an answer as long as the limit; less for shorter ones, see --overlong_tokens.",
        0.0,
    )
    overlong_tokens: int = flag(
        "The overlong penalty begins so many tokens before the limit and grows in a straight line.", 0,
    )
    whiten_rewards: bool = flag("Scale the rewards of a rollout's tokens to variance 1; their mean stays.", False)

    # advantages
    advantage: Literal["gae", "grpo", "rloo", "reinforce++"] = flag(
        "How good a token was. gae: rewards to come against the critic's value; reinforce++: rewards to come against those "
        "of all answers; grpo, rloo: the answer's reward against those of the other answers to its prompt. Only gae has a "
        "critic.",
        "gae",
    )
    gamma: float = flag("Discount from token to token.", 1.0)
    lam: float = flag("Lambda of generalised advantage estimation.", 0.95)
    whiten_advantages: bool = flag(
        "Scale the advantages of a rollout to mean 0, variance 1 (gae and reinforce++; grpo and rloo have a scale of their "
        "own).",
        True,
    )
    old_log_probs: Literal["auto", "forward"] = flag(
        "Log-probabilities of the policy that answered, which the ratio is taken against. forward: from a forward of their own; "
        "auto: in float32 those that sampling has computed anyway, once they were found equal to the forward's (1e-4).",
        "auto",
    )
    sampler_correction: float = flag(
        "Weigh each token by its probability in training over that in sampling, kept between 1 / this and this; 0 = off. "
        "Of use where rollouts are computed in other numbers than training.",
        0.0,
    )

    # losses
    cliprange: float = flag("The ratio of probabilities counts up to 1 +- this.", 0.2)
    cliprange_low: float | None = flag("The ratio counts down to 1 - this. None: --cliprange.", None)
    cliprange_high: float | None = flag("The ratio counts up to 1 + this. None: --cliprange.", None)
    dual_clip: float = flag(
        "A token with negative advantage A costs at most -A times this (more than 1, such as 3); 0 = off.", 0.0,
    )
    cliprange_value: float = flag("The critic's value counts up to +- this around its old value.", 0.2)
    entropy_coef: float = flag("Weight of the entropy bonus.", 0.0)
    loss_reduction: Literal["token", "sequence"] = flag(
        "Mean over all tokens of a minibatch, or over its answers of the mean over an answer's tokens.", "token",
    )
    max_approx_kl: float = flag(
        "End the passes over a rollout once a minibatch lies this far (nats a token) from the policy that sampled; 0 = "
        "never.",
        0.0,
    )
    critic_warmup_rollouts: int = flag("In the first rollouts, so many, only the critic learns.", 0)

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
    memory_mode: Literal["separate", "shared"] = flag(
        "separate: actor, reference, critic and reward model have weights of their own. shared: the actor's weights are in "
        "memory once, frozen, and the four are adapters and heads over them. It needs --actor_lora_dim, --critic_lora_dim, and "
        "a reward model that step 2 trained with --lora_dim from the actor's folder (docs/en/memory-modes.md).",
        "separate",
    )
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

    # around the loop
    align_overflow: bool = flag(
        "With fp16: where the gradients of actor or critic overflow, both leave the step out, not that one alone. Both "
        "gradients are in memory at once then.",
        False,
    )
    enable_ema: bool = flag(
        "Keep a moving average of the actor's trained weights (float32, in host memory, split over the processes) and save "
        "it as a model of its own in output_dir/actor_ema.",
        False,
    )
    ema_decay: float = flag(
        "With --enable_ema: what the average keeps at each optimizer step; it looks back over about 1 / (1 - this) steps.",
        0.992,
    )
    unsupervised_dataset_name: str | None = flag(
        "Keep the language: mix plain text into the actor's optimizer steps. A file, a folder or a data set of the hub "
        "(NAME or NAME:CONFIG); each step reads as many blocks of max_prompt_seq_len + max_answer_seq_len tokens as it has "
        "answers.",
        None,
    )
    unsupervised_dataset_config_name: str | None = flag("Configuration of that data set on the hub.", None)
    unsupervised_text_column: str | None = flag(
        'Field of that data set that holds the text. None: "text", or the only field that is text.', None,
    )
    unsup_coef: float = flag(
        "Weight of the mean log-likelihood of that text beside PPO's loss (gamma in eq. 2 of InstructGPT).", 27.8,
    )

    # evaluation and log
    eval_prompts: int = flag("Held-out prompts answered in each evaluation; 0 = no evaluation.", 64)
    eval_interval: int = flag("Evaluate every so many rollouts; 0 = only before and after.", 50)
    save_steps: int = flag("Write a checkpoint every so many rollouts; 0 = only the result.", 50)
    logging_steps: int = flag("Print and record figures every so many rollouts.", 1)
    print_answers: bool = flag("Print a few prompts with answers and scores.", False)
    print_answers_interval: int = flag(
        "Keep a few answers in samples.jsonl every so many rollouts, and with --print_answers print them.", 1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_clip is None:
            self.kl_clip = 0.0 if self.kl_estimator == "k1" else 10.0
        if self.cliprange_low is None:
            self.cliprange_low = self.cliprange
        if self.cliprange_high is None:
            self.cliprange_high = self.cliprange
        if self.actor_lora_alpha is None:
            self.actor_lora_alpha = 2.0 * self.actor_lora_dim
        if self.critic_lora_alpha is None:
            self.critic_lora_alpha = 2.0 * self.critic_lora_dim

    @property
    def reward_weight_list(self) -> list[float]:
        """--reward_weights as numbers; [] if not given. ValueError if they are none."""
        return [float(weight) for weight in self.reward_weights.split(",")] if self.reward_weights else []

    @property
    def models(self) -> dict[str, str]:
        """The checkpoints that are read: actor and, unless neither a critic nor the reward model is wanted, critic."""
        wanted = {"actor": True, "critic": self.has_critic or self.reward_model}
        return {role: getattr(self, f"{role}_model_name_or_path") for role in wanted if wanted[role]}

    @property
    def answers_at_once(self) -> int:
        """How many answers a process has in work while it samples."""
        return self.per_device_generation_batch_size * self.num_return_sequences

    @property
    def has_critic(self) -> bool:
        """Only generalised advantage estimation asks what an answer is worth before it is finished."""
        return self.advantage == "gae"
