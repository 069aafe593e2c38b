"""The flags of step 3."""

# ruff: noqa: RUF009  (flag() returns a dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from training.utils.flags.common import (
    ABOVE_ZERO,
    BELOW_ONE,
    LENGTH,
    ONE_OR_MORE,
    SHARE,
    UP_TO_ONE,
    CommonArguments,
    Stage,
    flag,
)

# What is trained, and the frozen model that starts from the same weights.
ROLES = {
    "actor": {"role": "actor", "frozen": "reference", "frozen_zh": "参考模型"},
    "critic": {"role": "critic", "frozen": "reward model", "frozen_zh": "奖励模型"},
}


def both(help: str, default: Any, *, zh: str, critic: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Return the flags of actor and critic by role, for a field called role_NAME. Options as in flag().

    The texts may name {role} and {frozen}. critic: what is different in the critic's; only the actor's flag has aliases.
    """
    actor = options | {"help": help, "default": default, "zh": zh}
    flags = {"actor": actor, "critic": actor | {"aliases": ()} | (critic or {})}
    for role, words in ROLES.items():
        flags[role] |= {text: flags[role][text].format(**words) for text in ("help", "zh")}
    return {role: flag(**options) for role, options in flags.items()}


def with_roles(cls: type) -> type:
    """Put actor_NAME and critic_NAME in the place of each field role_NAME; for a class that is no dataclass yet."""
    hints = cls.__annotations__
    cls.__annotations__ = {}
    for name, hint in hints.items():
        if not name.startswith("role_"):
            cls.__annotations__[name] = hint
            continue
        for role, field in getattr(cls, name).items():
            cls.__annotations__[role + name.removeprefix("role")] = hint
            setattr(cls, role + name.removeprefix("role"), field)
        delattr(cls, name)
    return cls


@dataclass(kw_only=True)
@with_roles
class PPOArguments(CommonArguments):
    """Step 3: PPO."""

    section: ClassVar[str] = "ppo"
    title: ClassVar[str] = "step 3 (PPO)"
    zh: ClassVar[str] = "第三步：PPO。"
    phase: ClassVar[int] = 3

    actor_model_name_or_path: str = flag(
        "The SFT model: actor and reference start from it.", common=True,
        resume="layout",
        zh="SFT 模型：actor 和参考模型由它开始。",
    )
    critic_model_name_or_path: str | None = flag(
        "The reward model: critic and reward model start from it. Required, but for --reward_model false without a critic "
        "(--advantage grpo, rloo, reinforce++).",
        None, common=True,
        resume="layout",
        zh="奖励模型：critic 和奖励模型由它开始。必需，除非 --reward_model false 且没有 critic（--advantage grpo、"
        "rloo、reinforce++）。",
    )

    # lengths and batches
    max_prompt_seq_len: int = flag(
        "Longest prompt in tokens; longer ones are left out and counted.", 256, within=LENGTH, common=True,
        zh="提示的最大 token 数；超长的提示不用，并计数。",
    )
    max_answer_seq_len: int = flag(
        "Longest answer in tokens.", 256, within=LENGTH, common=True,
        zh="回答的最大 token 数。",
    )
    per_device_generation_batch_size: int = flag(
        "Prompts that each process answers at once.", 16, aliases=("per_device_train_batch_size",), within=ONE_OR_MORE,
        common=True,
        resume="layout",
        zh="每个进程一次回答的提示数。",
    )
    generation_batches: int = flag(
        "Such batches in one rollout.", 1, aliases=("generation_batch_numbers",), within=ONE_OR_MORE,
        resume="layout",
        zh="一个采样轮中这样的批数。",
    )
    num_return_sequences: int = flag(
        "Answers to each prompt of a rollout; grpo and rloo compare them with each other. All answers to the prompts of a "
        "generation batch are in work at once.",
        1, within=ONE_OR_MORE,
        zh="一个采样轮中每个提示的回答数；grpo 和 rloo 在其间比较。一个生成批的全部回答同时生成。",
    )
    per_device_training_batch_size: int = flag(
        "Answers in a micro-batch of each process; times gradient_accumulation_steps a minibatch.", 16,
        aliases=("per_device_mini_train_batch_size",), within=ONE_OR_MORE, common=True,
        resume="layout",
        zh="每个进程一个微批的回答数；乘以 gradient_accumulation_steps 即一个小批。",
    )
    ppo_epochs: int = flag("Passes over a rollout.", 1, within=ONE_OR_MORE, resume="allow", zh="每个采样轮的数据训练几遍。")

    # sampling
    temperature: float = flag("Sampling temperature.", 1.0, within=ABOVE_ZERO, resume="allow", zh="采样温度。")
    top_p: float = flag(
        "Sample from the likeliest tokens that hold this share of probability; 1 = all.", 1.0, within=SHARE,
        resume="allow",
        zh="从累计概率达到该比例的最可能 token 中采样；1 = 全部。",
    )
    top_k: int = flag(
        "Sample from this many likeliest tokens; 0 = all.", 0,
        resume="allow",
        zh="从最可能的这么多个 token 中采样；0 = 全部。",
    )

    stop_strings: list[str] = flag(
        "An answer also ends with the token that completes one of these texts; such an end counts as one, as the end token "
        "does.",
        [],
        resume="allow",
        zh="生成的 token 使其中任一文本完整出现时，回答也就此结束；与结束符同等看待。",
    )
    generation_weights: Literal["auto", "gathered", "layerwise"] = flag(
        "Under ZeRO-3. gathered: each process gathers the whole actor once a rollout. layerwise: the weights stay split and "
        "every token fetches every layer, slow, in little memory. auto: gathered where they fit beside the cache.",
        "auto",
        resume="layout",
        zh="用于 ZeRO-3。gathered：每个进程每个采样轮收集一次完整的 actor。layerwise：权重保持切分，"
        "每个 token 逐层收集，慢但省内存。auto：缓存之外放得下时用 gathered。",
    )

    # KL penalty
    kl_coef: float = flag(
        "Weight of the KL penalty against the reference.", 0.05, common=True,
        resume="allow",
        zh="KL 惩罚系数（相对参考模型）。",
    )
    kl_in: Literal["reward", "loss"] = flag(
        "Take the penalty off each token's reward, or add it to the loss.", "reward",
        resume="allow",
        zh="从每个 token 的奖励中扣除 KL 惩罚，或加到损失上。",
    )
    kl_target: float = flag(
        "After each rollout --kl_coef is moved so that the KL comes to this many nats an answer; 0 = it stays.", 0.0,
        resume="allow",
        zh="每个采样轮后调整 --kl_coef，使每个回答的 KL 接近这么多 nat；0 = 不调整。",
    )
    kl_horizon: float = flag(
        "With --kl_target: answers in which the coefficient can change by a fifth at most.", 10_000.0,
        within=ABOVE_ZERO,
        resume="allow",
        zh="配合 --kl_target：系数每变化至多五分之一所对应的回答数。",
    )

    # rewards
    reward_model: bool = flag(
        "The reward model scores. false: only --reward_function and --reward_endpoint do, and it is not loaded.", True,
        zh="由奖励模型打分。false：只用 --reward_function 和 --reward_endpoint，不加载奖励模型。",
    )
    reward_function: list[str] = flag(
        "Python functions that score, each as FILE.py:NAME, called with a list of prompts and one of answers "
        "(docs/en/rewards.md).",
        [], common=True,
        resume="allow",
        zh="打分的 Python 函数，写作 FILE.py:NAME，以提示列表和回答列表调用（docs/zh/rewards.md）。",
    )
    reward_endpoint: list[str] = flag(
        'Servers that score: POST of JSON {"prompts": [...], "answers": [...], "ended": [...]}, answered by {"scores": [...]} '
        "(docs/en/rewards.md).",
        [],
        resume="free",
        zh='打分的服务：POST JSON {"prompts": [...], "answers": [...], "ended": [...]}，返回 {"scores": [...]}'
        "（docs/zh/rewards.md）。",
    )
    reward_weights: str | None = flag(
        "Weights of the sources in the sum that is the score, in the order reward model, functions, endpoints: with "
        "commas, such as 1,0.5 (--reward_weights=-1,2 if the first is negative). 0: only in the log. None: 1 each.",
        None,
        resume="allow",
        zh="各来源在总分中的权重，依次为奖励模型、函数、服务，用逗号分隔，"
        "例如 1,0.5（第一个为负时写 --reward_weights=-1,2）。0：只记日志。缺省：各为 1。",
    )
    reward_timeout: float = flag(
        "Seconds that an endpoint has for its answer.", 60.0, within=ABOVE_ZERO, resume="free",
        zh="等待打分服务答复的秒数。",
    )
    reward_retries: int = flag(
        "Further attempts at an endpoint that is down, slow or busy, after 1, 2, 4, … seconds (60 at most).", 5,
        resume="free",
        zh="服务宕机、缓慢或繁忙时的重试次数，间隔 1、2、4、… 秒（至多 60）。",
    )
    normalize_reward: bool = flag(
        "Subtract the mean of the reward model's scores and divide by their spread, as step 2 stored them.", True,
        zh="奖励模型的分数减去均值、除以标准差，二者由第二步保存。",
    )
    clip_reward_value: float = flag(
        "Scores are cut to +- this, after normalisation; 0 = never.", 5.0,
        resume="allow",
        zh="归一化后的分数截断到 ± 该值；0 = 不截断。",
    )
    missing_eos_penalty: float = flag(
        "Taken off the normalised score of an answer that did not end within the limit.", 1.0,
        resume="allow",
        zh="回答在长度上限内没有结束时，从归一化分数中扣除的值。",
    )
    overlong_penalty: float = flag(
        "Taken off the normalised score of an answer as long as the limit; less for shorter ones, see --overlong_tokens.",
        0.0,
        resume="allow",
        zh="回答达到长度上限时从归一化分数中扣除的值；较短的扣得少，见 --overlong_tokens。",
    )
    overlong_tokens: int = flag(
        "The overlong penalty begins so many tokens before the limit and grows in a straight line.", 0,
        resume="allow",
        zh="超长惩罚从上限前这么多个 token 开始，线性增加。",
    )
    whiten_rewards: bool = flag(
        "Scale the rewards of a rollout's tokens to variance 1; their mean stays.", False,
        resume="allow",
        zh="把一个采样轮中各 token 的奖励缩放到方差为 1，均值不变。",
    )

    # advantages
    advantage: Literal["gae", "grpo", "rloo", "reinforce++"] = flag(
        "Estimate of a token's merit. gae: rewards to come against the critic's value; reinforce++: rewards to come against those "
        "of all answers; grpo, rloo: the answer's reward against those of the other answers to its prompt. Only gae has a "
        "critic.",
        "gae", common=True,
        zh="优势的估计方法。gae：后续奖励与 critic 的价值相比；reinforce++：后续奖励与所有回答的相比；grpo、rloo："
        "回答的奖励与同一提示的其他回答相比。只有 gae 需要 critic。",
    )
    gamma: float = flag("Discount from token to token.", 1.0, within=UP_TO_ONE, resume="allow", zh="逐 token 的折扣因子。")
    lam: float = flag(
        "Lambda of generalised advantage estimation.", 0.95, within=UP_TO_ONE,
        resume="allow",
        zh="广义优势估计（GAE）的 lambda。",
    )
    whiten_advantages: bool = flag(
        "Scale the advantages of a rollout to mean 0, variance 1 (gae and reinforce++; grpo and rloo have a scale of their "
        "own).",
        True,
        resume="allow",
        zh="把一个采样轮的优势归一化为均值 0、方差 1（gae 和 reinforce++；grpo 和 rloo 有自己的尺度）。",
    )
    old_log_probs: Literal["auto", "forward"] = flag(
        "Log-probabilities of the policy that answered, which the ratio is taken against. forward: from a forward of their own; "
        "auto: in float32 those that sampling has computed anyway, once they were found equal to the forward's (1e-4).",
        "auto",
        resume="allow",
        zh="作为概率比分母的采样策略的对数概率。forward：单独做一次前向计算；auto：float32 下直接用采样时算出的值，"
        "但须先核对与前向计算一致（1e-4）。",
    )

    # losses
    cliprange: float = flag(
        "The ratio of probabilities counts up to 1 +- this.", 0.2, within=ABOVE_ZERO,
        resume="allow",
        zh="概率比的裁剪范围：1 ± 该值。",
    )
    cliprange_low: float | None = flag(
        "The ratio counts down to 1 - this. None: --cliprange.", None, within=ABOVE_ZERO,
        resume="allow",
        zh="概率比的下限为 1 - 该值。缺省：--cliprange。",
    )
    cliprange_high: float | None = flag(
        "The ratio counts up to 1 + this. None: --cliprange.", None, within=ABOVE_ZERO,
        resume="allow",
        zh="概率比的上限为 1 + 该值。缺省：--cliprange。",
    )
    dual_clip: float = flag(
        "A token with negative advantage A costs at most -A times this (more than 1, such as 3); 0 = off.", 0.0,
        resume="allow",
        zh="优势 A 为负的 token，损失至多为 -A 乘以该值（大于 1，例如 3）；0 = 关闭。",
    )
    cliprange_value: float = flag(
        "The critic's value counts up to +- this around its old value.", 0.2, within=ABOVE_ZERO,
        resume="allow",
        zh="critic 的价值相对旧值的裁剪范围：± 该值。",
    )
    entropy_coef: float = flag("Weight of the entropy bonus.", 0.0, resume="allow", zh="熵奖励的权重。")
    loss_reduction: Literal["token", "sequence"] = flag(
        "Mean over all tokens of a minibatch, or over its answers of the mean over an answer's tokens.", "token",
        resume="allow",
        zh="对小批内全部 token 取平均，或先在每个回答内平均、再对回答平均。",
    )
    max_approx_kl: float = flag(
        "End the passes over a rollout once a minibatch lies this far (nats a token) from the policy that sampled; 0 = "
        "never.",
        0.0,
        resume="allow",
        zh="某个小批与采样策略的距离达到该值（每 token 的 nat）时，结束对该采样轮的训练；0 = 从不。",
    )
    critic_warmup_rollouts: int = flag(
        "Train only the critic for this many rollouts.", 0,
        zh="最初这么多个采样轮只训练 critic。",
    )

    # optimizer; warm-up, logging and the rest count in this step's own units
    role_learning_rate: float = both(
        "Highest learning rate of the {role}; its adapters have --{role}_lora_learning_rate.", 1e-6,
        critic={"default": 5e-6}, common=True,
        resume="allow",
        zh="{role} 的最大学习率；其适配器用 --{role}_lora_learning_rate。",
    )
    role_weight_decay: float = both("Weight decay of the {role}'s matrices.", 0.0, resume="allow", zh="{role} 各矩阵的权重衰减。")
    num_warmup_steps: int = flag(
        "Optimizer steps of linear warm-up; at most half of the run is used for it.", 10,
        resume="allow",
        zh="学习率线性预热的优化器步数；最多占全程的一半。",
    )

    # models
    role_dropout: float = both(
        "Dropout of the {role}; above 0 the ratio of probabilities is noise.", 0.0, within=BELOW_ONE,
        resume="allow",
        zh="{role} 的 dropout；大于 0 时概率比带有噪声。",
        critic={"help": "Dropout of the critic.", "zh": "critic 的 dropout。"},
    )
    role_gradient_checkpointing: bool = both(
        "Recompute the {role}'s activations in the backward pass.", False,
        resume="layout",
        zh="反向传播时重新计算 {role} 的激活。",
    )
    role_zero_stage: Stage = both(
        "ZeRO stage of the {role}; at 3 the {frozen} is sharded too.", 0, common=True,
        resume="layout",
        zh="{role} 的 ZeRO 阶段；为 3 时{frozen_zh}也切分。",
    )
    memory_mode: Literal["separate", "shared"] = flag(
        "separate: actor, reference, critic and reward model have weights of their own. shared: the actor's weights are in "
        "memory once, frozen, and the four are adapters and heads over them. It needs --actor_lora_dim, --critic_lora_dim, and "
        "a reward model that step 2 trained with --lora_dim from the actor's folder (docs/en/memory-modes.md).",
        "separate", common=True,
        zh="separate：actor、参考模型、critic、奖励模型各有自己的权重。shared：actor 的权重在内存中只有一份且冻结，"
        "四者是其上的适配器和打分头；需要 --actor_lora_dim、--critic_lora_dim，"
        "以及第二步用 --lora_dim 从 actor 的文件夹训练出的奖励模型（docs/zh/memory-modes.md）。",
    )
    offload_reference_model: bool = flag(
        "Keep the reference in host memory.", False, resume="layout", zh="把参考模型放在主机内存。",
    )
    offload_reward_model: bool = flag(
        "Keep the reward model in host memory.", False, resume="layout", zh="把奖励模型放在主机内存。",
    )
    role_lora_dim: int = both(
        "Rank of the {role}'s LoRA adapters; 0 = train all weights.", 0, common=True,
        zh="{role} 的 LoRA 适配器的秩；0 = 训练全部权重。",
    )
    role_lora_alpha: float | None = both(
        "As --lora_alpha. None: twice --{role}_lora_dim.", None,
        zh="同 --lora_alpha。缺省：--{role}_lora_dim 的两倍。",
    )
    role_lora_module_name: str = both(
        "As --lora_module_name, for the {role}.", "auto",
        zh="同 --lora_module_name，用于 {role}。",
    )
    role_lora_learning_rate: float = both(
        "Highest learning rate of the {role}'s adapters.", 1e-5, critic={"default": 5e-5},
        resume="allow",
        zh="{role} 的适配器的最大学习率。",
    )
    role_pre_seq_len: int = both(
        "P-Tuning v2 of the actor: train so many learned places in front of every text, freeze all "
        "else. The reference is the model without them. A model folder that holds a saved prefix, as step "
        "1 writes, needs no flag: the actor goes on with that prefix, the reference keeps it as it is.",
        0, aliases=("pre_seq_len",),
        zh="actor 的 P-Tuning v2：在每段文本前训练这么多个可学习的位置，其余全部冻结。参考模型是不带前缀的模型。"
        "模型文件夹中已有前缀（如第一步所写）时无需此参数：actor 接着训练它，参考模型保持其原样。",
        critic={
            "help": "P-Tuning v2 of the critic, its score head included; as for the actor.",
            "zh": "critic 的 P-Tuning v2，连同打分头；其余同 actor。",
        },
    )
    role_prefix_projection: bool = both(
        "As --prefix_projection, for the {role}.", False, aliases=("prefix_projection",),
        zh="同 --prefix_projection，用于 {role}。",
    )
    role_ptuning_checkpoint: str | None = both(
        "Folder of a saved prefix that actor and reference start with; as if that folder were the model.", None,
        aliases=("ptuning_checkpoint",), metavar="FOLDER",
        zh="actor 和参考模型起始所用前缀的文件夹；等同于把该文件夹当作模型。",
        critic={
            "help": "Folder of a saved prefix that critic and reward model start with.",
            "zh": "critic 和奖励模型起始所用前缀的文件夹。",
        },
    )

    # around the loop
    align_overflow: bool = flag(
        "With fp16: where the gradients of actor or critic overflow, both leave the step out, not that one alone. Both "
        "gradients are in memory at once then.",
        False,
        resume="allow",
        zh="用 fp16 时：actor 或 critic 任一梯度溢出，两者都跳过这一步，而不只是溢出的一方。"
        "此时两者的梯度同时占用内存。",
    )
    enable_ema: bool = flag(
        "Keep a moving average of the actor's trained weights (float32, in host memory, split over the processes) and save "
        "it as a model of its own in output_dir/actor_ema.",
        False,
        zh="维护 actor 所训权重的滑动平均（float32，在主机内存，按进程切分），"
        "并作为单独的模型保存到 output_dir/actor_ema。",
    )
    ema_decay: float = flag(
        "With --enable_ema: what the average keeps at each optimizer step; it looks back over about 1 / (1 - this) steps.",
        0.992, within=BELOW_ONE,
        resume="allow",
        zh="配合 --enable_ema：滑动平均在每个优化器步保留的比例；约回看 1 / (1 - 该值) 步。",
    )
    unsupervised_dataset_name: str | None = flag(
        "Keep the language: mix plain text into the actor's optimizer steps. A file, a folder or a data set of the hub "
        "(NAME or NAME:CONFIG); each step reads as many blocks of max_prompt_seq_len + max_answer_seq_len tokens as it has "
        "answers.",
        None,
        zh="保持语言能力：在 actor 的优化器步中混入纯文本。文件、文件夹或 Hub 数据集（NAME 或 NAME:CONFIG）；"
        "每步读取与回答数相同的文本块，每块 max_prompt_seq_len + max_answer_seq_len 个 token。",
    )
    unsupervised_text_column: str | None = flag(
        'Field of that data set that holds the text. None: "text", or the only field that is text.', None,
        zh="该数据集中存放文本的字段。缺省：text，或唯一的文本字段。",
    )
    unsup_coef: float = flag(
        "Weight of the mean log-likelihood of that text beside PPO's loss (gamma in eq. 2 of InstructGPT).", 27.8,
        resume="allow",
        zh="该文本平均对数似然相对 PPO 损失的权重（InstructGPT 式 2 中的 gamma）。",
    )

    # evaluation and log
    eval_prompts: int = flag(
        "Held-out prompts answered in each evaluation; 0 = no evaluation.", 64, resume="free",
        zh="每次评估回答的留出提示数；0 = 不评估。",
    )
    eval_interval: int = flag(
        "Evaluate every this many rollouts; 0 = only before and after.", 50, resume="free", common=True,
        zh="每隔多少个采样轮评估一次；0 = 只在训练前后。",
    )
    save_steps: int = flag(
        "Write a checkpoint every this many rollouts; 0 = only the result.", 50, resume="free", common=True,
        zh="每隔多少个采样轮写一个检查点；0 = 只保存结果。",
    )
    logging_steps: int = flag(
        "Print and record metrics every this many rollouts.", 1, within=ONE_OR_MORE, resume="free",
        zh="每隔多少个采样轮打印并记录指标。",
    )
    print_answers: bool = flag(
        "Print a few prompts with answers and scores.", False, resume="free",
        zh="打印若干提示及其回答和分数。",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cliprange_low is None:
            self.cliprange_low = self.cliprange
        if self.cliprange_high is None:
            self.cliprange_high = self.cliprange
        for role in ROLES:
            if getattr(self, f"{role}_lora_alpha") is None:
                setattr(self, f"{role}_lora_alpha", 2.0 * getattr(self, f"{role}_lora_dim"))

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
        """The number of answers that a process has in work while it samples."""
        return self.per_device_generation_batch_size * self.num_return_sequences

    @property
    def has_critic(self) -> bool:
        """Only generalised advantage estimation asks what an answer is worth before it is finished."""
        return self.advantage == "gae"
