"""The flags of DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from training.utils.flags.common import ABOVE_ZERO, RATE, RATE_ZH, Range, SupervisedArguments, flag


@dataclass(kw_only=True)
class DPOArguments(SupervisedArguments):
    """DPO: the SFT model learns from pairs directly, in place of steps 2 and 3."""

    section: ClassVar[str] = "dpo"
    title: ClassVar[str] = "DPO"
    zh: ClassVar[str] = "DPO：SFT 模型直接从样本对学习，代替第二步和第三步。"
    phase: ClassVar[int] = 2

    beta: float = flag(
        "Strength of the KL constraint to the reference: the implicit reward of an answer is beta x (its log-probability - the "
        "reference's).",
        0.1, within=ABOVE_ZERO, common=True,
        resume="allow",
        zh="对参考模型的 KL 约束强度：回答的隐式奖励为 beta x（其对数概率 - 参考模型的对数概率）。",
    )
    label_smoothing: float = flag(
        "Share of pairs whose answers are taken to be the wrong way round (conservative DPO); less than 0.5.", 0.0,
        within=Range("must be 0 or more and less than 0.5, where a pair says nothing any more", least=0, below=0.5),
        resume="allow",
        zh="假定标反了的样本对所占比例（保守 DPO）；小于 0.5。",
    )
    ref_model_name_or_path: str | None = flag(
        "The frozen reference. None: the model that the run starts from; under LoRA that is the model without its "
        "adapter, and there is no second copy in memory.",
        None, metavar="FOLDER",
        zh="冻结的参考模型。缺省：训练的起始模型；使用 LoRA 时即去掉适配器的模型，内存中没有第二份。",
    )
    offload_reference_model: bool = flag(
        "Keep the reference in host memory.", False, resume="layout", zh="把参考模型放在主机内存。",
    )
    learning_rate: float = flag(RATE, 1e-6, common=True, resume="allow", zh=RATE_ZH)
    lora_learning_rate: float = flag("Highest learning rate of the adapters.", 1e-5, resume="allow", zh="适配器的最大学习率。")
