"""The flags that all three steps share, and how a flag is written; arguments.py has the rest."""

# ruff: noqa: RUF009  (flag() returns a dataclasses.field)

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Dtype = Literal["auto", "fp32", "fp16", "bf16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Stage = Literal[0, 1, 2, 3, "auto"]


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
        "YAML recipe: sections launch, sft, reward, ppo and dpo, or this step's flags alone. The command line wins.", None,
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
    force: bool = flag("Start although the run should need more memory than there is (docs/en/memory-plan.md).", False)
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
    """What steps 1 and 2 and DPO share: one model, examples in batches."""

    model_name_or_path: str = flag("Folder or hub id of the model to start from.")
    max_seq_len: int = flag(
        "Longest example in tokens, prompt and answer. Longer ones lose the oldest part of the prompt, never the end "
        "token.",
        512,
    )
    per_device_train_batch_size: int = flag("Examples (step 2, DPO: pairs) in a micro-batch of each process.", 16)
    per_device_eval_batch_size: int = flag("Examples (step 2, DPO: pairs) of each process at once in evaluation.", 16)
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
    zero_stage: Stage = flag(
        "ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 weights too. auto: the lowest with which the run fits.", 0,
    )
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

    @property
    def models(self) -> dict[str, str]:
        """The checkpoints that are read, by role: "model", and for DPO a "reference" of its own."""
        reference = getattr(self, "ref_model_name_or_path", None)
        return {"model": self.model_name_or_path} | ({"reference": reference} if reference else {})
