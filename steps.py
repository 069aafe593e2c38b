"""The training steps, one row each. Whoever lists, names, starts or orders steps asks here. Imports nothing heavy."""

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Step:
    """One training step.

    choice: the value of --step in scripts.plan, scripts.k8s and scripts.pod. number: the step's place in its method.
    section: the section of a recipe. room: the folder under training/. title: the name in tables and reports.
    arguments: the class of its flags in training.utils.flags.steps. folder: where train.py puts its models.
    needs: the sections whose models it reads in train.py's plan; step 2 may start from another model than step 1's.
    """

    choice: str
    number: int
    section: str
    room: str
    title: str
    arguments: str
    folder: str
    needs: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module that runs the step: ``python -m MODULE``."""
        return f"training.{self.room}.main"

    @property
    def arguments_class(self) -> type:
        """The dataclass of the step's flags."""
        return getattr(import_module("training.utils.flags.steps"), self.arguments)


STEPS = (
    Step("1", 1, "sft", "step1_sft", "supervised fine-tuning", "SFTArguments", "actor-models"),
    Step("2", 2, "reward", "step2_reward", "reward model", "RewardArguments", "reward-models"),
    Step("3", 3, "ppo", "step3_ppo", "PPO", "PPOArguments", "step3-models", ("sft", "reward")),
    Step("dpo", 2, "dpo", "step2_dpo", "DPO", "DPOArguments", "dpo-models", ("sft",)),
)
SECTIONS = tuple(step.section for step in STEPS)
METHODS = {"ppo": ("sft", "reward", "ppo"), "dpo": ("sft", "dpo")}  # sections in the order of a method


def step_of(section: str) -> Step:
    """Return the step that reads this section of a recipe. Raise KeyError for any other word."""
    return {step.section: step for step in STEPS}[section]
