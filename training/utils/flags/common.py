"""The flags that all three steps share, and how a flag is written; steps.py has the rest."""

# ruff: noqa: RUF009  (flag() returns a dataclasses.field)

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal

Dtype = Literal["auto", "fp32", "fp16", "bf16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Stage = Literal[0, 1, 2, 3, "auto"]
# The sizes that a resumed run keeps, and the flags that they are made of in a new one, or where --allow names any of them.
BATCH_FLAGS = {
    "global_batch": ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "rollout": ("per_device_generation_batch_size", "generation_batches"),
    "minibatch": ("per_device_training_batch_size", "gradient_accumulation_steps"),
}


@dataclass(frozen=True)
class Range:
    """The numbers that a flag takes, and the words for one outside. Comparisons are False for NaN."""

    wrong: str
    least: float = -inf
    above: float = -inf
    below: float = inf
    most: float = inf

    def holds(self, value: float) -> bool:
        """Return True for a number inside the range; `above` and `below` leave out their limit, -inf and inf do not count."""
        return self.least <= value <= self.most and self.above < value < self.below


ANY = Range("must be finite")
NOT_NEGATIVE = Range("must not be negative", least=0)
ONE_OR_MORE = Range("must be 1 or more", least=1)
ABOVE_ZERO = Range("must be more than 0", above=0)
BELOW_ONE = Range("must be 0 or more and less than 1", least=0, below=1)
UP_TO_ONE = Range("must lie between 0 and 1", least=0, most=1)
LENGTH = Range("must be 1 or more and at most 1048576", least=1, most=2**20)  # with 10^9 the plan of the memory alone took minutes
PROMPT_AND_END = Range("must be 2 or more, a prompt and the end token, and at most 1048576", least=2, most=2**20)
WORD_AND_END = Range("must be 2 or more, a word and the end token, and at most 1048576", least=2, most=2**20)
SEED = Range("must lie between 0 and 2^63 - 1, what torch takes", least=0, below=2**63)
SHARE = Range("must be more than 0 and at most 1", above=0, most=1)


def flag(
    help: str,
    default: Any = MISSING,
    *,
    aliases: tuple[str, ...] = (),
    within: Range = NOT_NEGATIVE,
    resume: Literal["same", "allow", "layout", "free"] = "same",
    zh: str = "",
    common: bool = False,
    **options: Any,
) -> Any:
    """Return a dataclass field that becomes a flag; required where no default is given.

    aliases: other names, without dashes. within: the range of a number. zh: the meaning in Chinese. common: shown by --help,
    not only by --help all. options: nargs and const for argparse, metavar for --help.

    resume: what a resumed run may have of it. "same": the value of before; "allow": another with --allow; "layout": another,
    as it only says how the same is computed, but the same on all nodes; "free": anything.
    """
    metadata = {"help": help, "zh": zh, "aliases": aliases, "within": within, "resume": resume, "common": common, **options}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


RATE = "Highest learning rate of whole weights and of a prefix; adapters have --lora_learning_rate."
RATE_ZH = "全部权重或前缀的最大学习率；适配器用 --lora_learning_rate。"


@dataclass(kw_only=True)
class CommonArguments:
    """Flags that all three steps share."""

    section: ClassVar[str]  # of a recipe
    title: ClassVar[str]  # in messages
    zh: ClassVar[str]  # the docstring in Chinese, for --help
    phase: ClassVar[int]  # which share of --data_split

    output_dir: str = flag(
        "Folder for the trained model, metrics.jsonl and checkpoints.", resume="free", common=True,
        zh="保存训练所得模型、metrics.jsonl 和检查点的文件夹。",
    )
    config: str | None = flag(
        "YAML recipe: sections launch, sft, reward, ppo and dpo, or this step's flags alone. The command line wins.",
        None, metavar="FILE", resume="free", common=True,
        zh="YAML 配方：含 launch、sft、reward、ppo、dpo 各节，或只含本步骤的参数。命令行优先。",
    )

    # data
    data_path: list[str] = flag(
        "One or more data sets: named sets, hub ids, folders saved by scripts/download_dataset.py, or JSON, JSONL, "
        "CSV and Parquet files.",
        ["Dahoas/rm-static"], common=True,
        resume="layout",
        zh="一个或多个数据集：内置名称、Hub 上的 id、scripts/download_dataset.py 保存的文件夹，"
        "或 JSON、JSONL、CSV、Parquet 文件。",
    )
    data_split: str = flag(
        "Shares of steps 1, 2 and 3. A record belongs to one step by a hash of its content, whatever the machine.",
        "2,4,4",
        zh="第一、二、三步各占的数据比例。一条记录归哪一步由其内容的哈希决定，与机器无关。",
    )
    columns: str | None = flag(
        "Names of the fields in your file where they differ from ours, such as prompt=question,chosen=best_answer.",
        None,
        zh="文件字段名与本项目不同时的对应关系，例如 prompt=question,chosen=best_answer。",
    )
    eval_fraction: float = flag(
        "Share of a set without a held-out part of its own that is kept for evaluation.", 0.05, within=BELOW_ONE,
        zh="数据集没有自带留出部分时，留作评估的比例。",
    )
    cache_dir: str | None = flag(
        "Folder for tokenised data. None: SANBU_CACHE, or sanbu in the user's cache folder; never the shared /tmp.",
        None, aliases=("data_output_path",), resume="free",
        zh="存放分词结果的文件夹。缺省：SANBU_CACHE，或用户缓存目录下的 sanbu；从不使用共享的 /tmp。",
    )
    rebuild_cache: bool = flag(
        "Tokenise again although the cache holds this content.", False, resume="free",
        zh="即使缓存中已有该内容，也重新分词。",
    )
    show_examples: int = flag(
        "Print this many examples of each data set as the model sees them, targets marked; also in OUTPUT/data.txt.", 1,
        resume="free",
        zh="按模型看到的样子打印每个数据集的这么多个样本，并标出训练目标；也写入 OUTPUT/data.txt。",
    )

    # loop
    num_train_epochs: int = flag(
        "Passes over the data.", 1, within=ONE_OR_MORE, resume="free", common=True,
        zh="遍历数据的轮数。",
    )
    max_steps: int = flag(
        "Stop after this many optimizer steps (step 3: rollouts); 0 = at the end of the epochs.", 0, resume="free",
        common=True,
        zh="训练这么多优化器步后停止（第三步按采样轮计）；0 = 跑完全部轮数。",
    )
    gradient_accumulation_steps: int = flag(
        "Micro-batches of each process in one optimizer step.", 1, within=ONE_OR_MORE, common=True,
        resume="layout",
        zh="每个进程在一个优化器步中累积的微批数。",
    )
    max_tokens_per_device: int | None = flag(
        "Tokens of a micro-batch, padding included; the gradient is the same however the batch is cut. Not given: as many "
        "as the batch size per device holds of the longest example, on a CPU 1024 if that is less. 0 = cut by the number of "
        "examples.",
        None,
        resume="layout",
        zh="一个微批的 token 数（含填充）；怎样切分批，梯度都一样。不给时：每设备批大小乘以最长样本的长度，CPU 上不超过 1024。"
        "0 = 按样本数切分。",
    )
    seed: int = flag(
        "Random seed. Give every step the same one: it also decides which records a step gets.", 1234, within=SEED,
        zh="随机种子。各步骤应相同：它也决定每一步分到哪些记录。",
    )
    logging_steps: int = flag(
        "Print and record metrics every this many optimizer steps.", 10, within=ONE_OR_MORE, resume="free",
        zh="每隔多少个优化器步打印并记录指标。",
    )
    eval_interval: int = flag(
        "Evaluate every this many optimizer steps; 0 = at the end of each epoch.", 0, resume="free", common=True,
        zh="每隔多少个优化器步评估一次；0 = 每轮结束时。",
    )
    save_steps: int = flag(
        "Write a checkpoint every this many optimizer steps; 0 = at the end of each epoch.", 0, resume="free",
        common=True,
        zh="每隔多少个优化器步写一个检查点；0 = 每轮结束时。",
    )
    save_total_limit: int = flag(
        "Keep this many of the newest checkpoints; 0 keeps all.", 2, resume="free",
        zh="只保留最新的这么多个检查点；0 = 全部保留。",
    )
    resume: str | None = flag(
        "Continue: alone from the newest whole checkpoint under --output_dir, or from the folder named.", None,
        nargs="?", const="auto", metavar="FOLDER", resume="free", common=True,
        zh="续训：不带值时从 --output_dir 下最新的完整检查点继续，带值时从所给文件夹继续。",
    )
    allow: str | None = flag(
        "With --resume: flags, with commas, that go on with another value than the run began with, such as "
        "learning_rate,lr_scheduler_type. A batch size keeps the run's examples a step unless it is named here.",
        None, metavar="FLAGS", resume="free",
        zh="配合 --resume：允许改用新值的参数，用逗号分隔，例如 learning_rate,lr_scheduler_type。批大小若未列出，每步样本数"
        "保持不变。",
    )
    enable_tensorboard: bool = flag("Write curves for TensorBoard.", False, resume="free", zh="为 TensorBoard 写曲线。")
    tensorboard_path: str | None = flag(
        "Folder of the curves. None: tensorboard under --output_dir.", None, resume="free",
        zh="曲线文件夹。缺省：--output_dir 下的 tensorboard。",
    )

    # optimizer
    lr_scheduler_type: Schedule = flag(
        "How the learning rate changes over the run.", "cosine",
        resume="allow",
        zh="学习率在训练过程中的变化方式。",
    )
    num_warmup_steps: int = flag(
        "Optimizer steps of linear warm-up; at most half of the run is used for it.", 0,
        resume="allow",
        zh="学习率线性预热的优化器步数；最多占全程的一半。",
    )
    optimizer: Literal["auto", "adamw", "fused_adam", "cpu_adam"] = flag(
        "auto: torch's AdamW, or DeepSpeed's CPU Adam where optimizer states are offloaded.", "auto",
        resume="allow",
        zh="auto：torch 的 AdamW；优化器状态卸载到主机时用 DeepSpeed 的 CPU Adam。",
    )
    adam_beta1: float = flag("Decay of the mean of gradients.", 0.9, within=BELOW_ONE, resume="allow", zh="梯度均值的衰减系数。")
    adam_beta2: float = flag(
        "Decay of the mean of squared gradients.", 0.95, within=BELOW_ONE,
        resume="allow",
        zh="梯度平方均值的衰减系数。",
    )
    adam_epsilon: float = flag(
        "Added to the root of the mean square.", 1e-8, within=ABOVE_ZERO,
        resume="allow",
        zh="加在均方根上的小量。",
    )
    max_grad_norm: float = flag(
        "Gradients are scaled down to this norm; 0 = never.", 1.0,
        resume="allow",
        zh="梯度裁剪到该范数；0 = 不裁剪。",
    )

    # numbers
    dtype: Dtype = flag(
        "Type of weights and activations. auto: bf16 where the device computes in it, else fp16, and fp32 on a CPU. "
        "Losses, log-probabilities and their sums are float32 always.",
        "auto", common=True,
        resume="allow",
        zh="权重和激活的数值类型。auto：设备支持时用 bf16，否则 fp16，CPU 上用 fp32。"
        "损失、对数概率及其求和始终为 float32。",
    )
    attn_implementation: Attention = flag(
        "Attention kernels. auto: sdpa where the model has it, else eager.", "auto",
        resume="allow",
        zh="注意力实现。auto：模型支持时用 sdpa，否则 eager。",
    )

    # memory: integers, ZeRO and offload
    quantization_bit: Literal[0, 4, 8] = flag(
        "Hold the linear layers of the frozen base in 4 or 8 bits, under LoRA or P-Tuning; 0 = as they are. The weights "
        "are whole on every process while they are quantised, and ZeRO stage 3 does not split the integers. In step 3: "
        "actor and reference where the actor has adapters, critic and reward model where the critic has.",
        0, common=True,
        zh="在 LoRA 或 P-Tuning 之下，把冻结底座的线性层以 4 或 8 位存放；0 = 保持原样。"
        "量化后每个进程都持有完整权重，ZeRO-3 不切分整数权重。第三步：actor 带适配器时作用于 actor 和参考模型，"
        "critic 带适配器时作用于 critic 和奖励模型。",
    )
    offload: bool = flag(
        "Keep optimizer states in host memory, under ZeRO stage 3 the parameters too.", False, common=True,
        resume="layout",
        zh="把优化器状态放在主机内存，ZeRO-3 下参数也放在主机内存。",
    )
    offload_optimizer: bool = flag(
        "Keep only the optimizer states in host memory (ZeRO stage 1 or more).", False,
        resume="layout",
        zh="只把优化器状态放在主机内存（ZeRO-1 及以上）。",
    )
    offload_param: bool = flag(
        "Keep the parameters in host memory (ZeRO stage 3).", False,
        resume="layout",
        zh="把参数放在主机内存（ZeRO-3）。",
    )
    deepspeed_config: str | None = flag(
        "JSON whose keys win over the DeepSpeed configuration made from the flags. Optimizer, scheduler, batch sizes and "
        "offloaded optimizer states in it must be auto or equal to the flags.", None,
        aliases=("deepscale_config",), metavar="FILE",
        resume="allow",
        zh="JSON 文件，其中的键优先于由参数生成的 DeepSpeed 配置。其中的优化器、学习率调度、批大小和优化器状态卸载须为 auto，"
        "或与参数一致。",
    )
    force: bool = flag(
        "Start although the run should need more memory than there is (docs/en/memory-plan.md).", False, resume="free",
        zh="即使估算所需内存超过现有内存也启动（docs/zh/memory-plan.md）。",
    )

    def __post_init__(self) -> None:
        if self.tensorboard_path is None:
            self.tensorboard_path = str(Path(self.output_dir) / "tensorboard")

    @property
    def column_map(self) -> dict[str, str]:
        """--columns as a dictionary: our name -> the name in the file."""
        return dict(pair.split("=", 1) for pair in self.columns.split(",")) if self.columns else {}

    @property
    def allowed(self) -> list[str]:
        """--allow as a list of names."""
        return [name.strip().removeprefix("--") for name in (self.allow or "").split(",") if name.strip()]

    def prefix_options(self, role: str = "") -> dict[str, Any]:
        """Return the options of a prefix for models/load.py; role as in EngineOptions.of."""
        names = ("pre_seq_len", "prefix_projection", "ptuning_checkpoint")
        return {name: getattr(self, f"{role}_{name}" if role else name) for name in names}


@dataclass(kw_only=True)
class SupervisedArguments(CommonArguments):
    """Flags that steps 1 and 2 and DPO share: one model, examples in batches."""

    model_name_or_path: str = flag(
        "Folder or hub id of the model to start from.", common=True,
        resume="layout",
        zh="起始模型的文件夹或 Hub id。",
    )
    max_seq_len: int = flag(
        "Longest example in tokens, prompt and answer. Longer ones lose the oldest part of the prompt, but a quarter; then "
        "the end of the answer, never the end token.",
        512, within=PROMPT_AND_END, common=True,
        zh="样本（提示加回答）的最大 token 数。超长时丢弃提示中最旧的部分（至少留四分之一），然后是回答的末尾，从不丢弃结束符。",
    )
    per_device_train_batch_size: int = flag(
        "Examples (step 2, DPO: pairs) in a micro-batch of each process.", 16, within=ONE_OR_MORE, common=True,
        resume="layout",
        zh="每个进程一个微批的样本数（第二步和 DPO：样本对数）。",
    )
    per_device_eval_batch_size: int = flag(
        "Examples (step 2, DPO: pairs) of each process at once in evaluation.", 16, within=ONE_OR_MORE, resume="free",
        zh="评估时每个进程一次处理的样本数（第二步和 DPO：样本对数）。",
    )
    global_batch_size: int = flag(
        "Examples of one optimizer step over all processes; sets the accumulation. 0 = per_device_train_batch_size x "
        "gradient_accumulation_steps x processes.",
        0,
        resume="layout",
        zh="所有进程一个优化器步的样本数，由此决定梯度累积。"
        "0 = per_device_train_batch_size x gradient_accumulation_steps x 进程数。",
    )
    eval_iters: int = flag(
        "Evaluate on at most this many micro-batches, the same examples on any number of processes; 0 = on all.", 0,
        resume="free",
        zh="最多评估这么多个微批，样本与进程数无关；0 = 全部。",
    )
    learning_rate: float = flag(RATE, common=True, resume="allow", zh=RATE_ZH)
    weight_decay: float = flag(
        "Weight decay of matrices; biases and norms have none.", 0.0,
        resume="allow",
        zh="矩阵的权重衰减；偏置和归一化层不衰减。",
    )
    dropout: float = flag("Dropout everywhere in the model.", 0.0, within=BELOW_ONE, resume="allow", zh="模型各处的 dropout。")
    gradient_checkpointing: bool = flag(
        "Recompute activations in the backward pass: less memory, a third more work.", False, common=True,
        resume="layout",
        zh="反向传播时重新计算激活：内存更少，计算多三分之一。",
    )
    zero_stage: Stage = flag(
        "ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 weights too. auto: the lowest with which the run fits.",
        0, common=True,
        resume="layout",
        zh="ZeRO 阶段：1 切分优化器状态，2 再切分梯度，3 再切分权重。auto：能放下的最低阶段。",
    )
    lora_dim: int = flag(
        "Rank of LoRA adapters; 0 = train all weights.", 0, common=True,
        zh="LoRA 适配器的秩；0 = 训练全部权重。",
    )
    lora_alpha: float | None = flag(
        "Adapters are scaled by lora_alpha / lora_dim. None: twice --lora_dim, so the scale is 2 whatever the rank.", None,
        zh="适配器乘以 lora_alpha / lora_dim。缺省：--lora_dim 的两倍，因此无论秩多大，缩放都是 2。",
    )
    lora_dropout: float = flag(
        "Dropout in front of the adapters.", 0.0, within=BELOW_ONE,
        resume="allow",
        zh="适配器输入处的 dropout。",
    )
    lora_module_name: str = flag(
        "Modules that get adapters: part of their name, or several with commas; auto = the linear layers of each "
        "block.",
        "auto",
        zh="加适配器的模块：名称的一部分，多个用逗号分隔；auto = 每个块的线性层。",
    )
    lora_learning_rate: float = flag("Highest learning rate of the adapters.", 1e-4, resume="allow", zh="适配器的最大学习率。")
    pre_seq_len: int = flag(
        "P-Tuning v2: train so many learned places in front of every text (step 2: and the score head) and freeze all "
        "else; only they are saved, and the folder names the model they belong to. They want a high --learning_rate, "
        "such as 2e-2. 0 = off; a model folder that holds a saved prefix goes on with it.",
        0,
        zh="P-Tuning v2：在每段文本前训练这么多个可学习的位置（第二步还训练打分头），其余全部冻结；只保存这部分，"
        "文件夹中记下所属模型。需要较大的 --learning_rate，例如 2e-2。0 = 关闭；"
        "模型文件夹中已有前缀时接着训练它。",
    )
    prefix_projection: bool = flag(
        "With --pre_seq_len: make the prefix with a network of two layers, which starts more slowly and is larger.",
        False,
        zh="配合 --pre_seq_len：用两层网络生成前缀，起步更慢，体积更大。",
    )
    ptuning_checkpoint: str | None = flag(
        "Start from the prefix saved in this folder (of this step or, for ChatGLM, a checkpoint-N of its ptuning), put "
        "before the model that it was trained on.",
        None, metavar="FOLDER",
        zh="从该文件夹保存的前缀开始（本步骤保存的，或 ChatGLM ptuning 的 checkpoint-N），放在训练它时所用的模型之前。",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.lora_dim

    @property
    def models(self) -> dict[str, str]:
        """The checkpoints that are read, by role: "model", and for DPO a "reference" of its own."""
        reference = getattr(self, "ref_model_name_or_path", None)
        return {"model": self.model_name_or_path} | ({"reference": reference} if reference else {})
