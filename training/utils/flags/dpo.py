"""The flags of DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from training.utils.flags.common import SupervisedArguments, flag


@dataclass(kw_only=True)
class DPOArguments(SupervisedArguments):
    """DPO: the SFT model learns from pairs directly, in place of steps 2 and 3."""

    section: ClassVar[str] = "dpo"
    title: ClassVar[str] = "DPO"
    phase: ClassVar[int] = 2

    beta: float = flag(
        "How dear it is to leave the reference: the implicit reward of an answer is beta x (its log-probability - the "
        "reference's).",
        0.1,
    )
    label_smoothing: float = flag(
        "Share of pairs whose answers are taken to be the wrong way round (conservative DPO); less than 0.5.", 0.0,
    )
    ref_model_name_or_path: str | None = flag(
        "The frozen reference. None: the model that the run starts from; under LoRA that is the model without its "
        "adapter, and there is no second copy in memory.",
        None, metavar="FOLDER",
    )
    offload_reference_model: bool = flag("Keep the reference in host memory.", False)
    learning_rate: float = flag("Highest learning rate. 1e-3 in the earlier system, far too high for whole weights.", 1e-6)
    lora_learning_rate: float = flag("Highest learning rate of the adapters.", 1e-5)
