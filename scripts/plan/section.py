"""The plan of one section of a recipe for one machine: for scripts.plan, the doctor, the pods and the tables of docs/."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from errors import UserError
from models.checkpoint_folder import check_positions
from scripts.launch.platforms import MachineKind
from scripts.plan.known import UnknownModel, config_of, find_config
from steps import SECTIONS, step_of
from training.utils.flags.parse import parse
from training.utils.flags.recipe import Recipe
from training.utils.memory.arithmetic import GIB, Machine
from training.utils.run.inputs import check_adapters, longest_text

if TYPE_CHECKING:
    from training.utils.memory.fit import SectionPlan

__all__ = ["UnknownModel", "plan_section", "plan_sections", "platform_machine"]


def platform_machine(platform: MachineKind, *, nodes: int | None = None, per_node: int | None = None) -> Machine:
    """Return the machine that configs/platforms.yaml describes, or one with other nodes and processes of that kind."""
    nodes, per_node, card = nodes or platform.nodes, per_node or platform.devices, platform.accelerator != "cpu"
    memory = platform.device_memory_gib * GIB if card else 0.0
    return Machine(nodes * per_node, per_node, memory, platform.host_memory_gib * GIB, accelerator=card)


def plan_section(
    recipe: Recipe, section: str, platform: MachineKind, *, machine: Machine | None = None, flags: Sequence[str] = ()
) -> SectionPlan:
    """Return the plan of a section. machine: None for the platform's own; flags: further flags of the step.

    A folder that another section still has to write counts as the model which that section starts from. Raises UserError for
    wrong flags, UnknownModel for a model that is neither known by name nor here.
    """
    args = parse(step_of(section).arguments_class, ["--config", recipe.path, *flags])
    return plan_arguments(args, recipe, machine or platform_machine(platform), platform.dtype, platform.attention)


def check_section(recipe: Recipe, section: str) -> None:
    """Raise UserError for wrong flags and models of a section, as plan_section does, without a plan and without torch."""
    models_of(parse(step_of(section).arguments_class, ["--config", recipe.path]), recipe)


def models_of(args: Any, recipe: Recipe | None) -> dict[str, Any]:
    """Return role -> the model that a step starts from. Raise UserError for one that is not here or too small for the step."""
    models = {role: recipe.model_of(str(model)) if recipe else model for role, model in args.models.items()}
    for role, model in models.items():
        check_positions(find_config(model), str(model), *longest_text(args))
        check_adapters(args, role, find_config(model))
    return models


def plan_arguments(args: Any, recipe: Recipe | None, machine: Machine, dtype: str, attention: str) -> SectionPlan:
    """Return the plan of a step's arguments; recipe: the file that they come from, if any."""
    models = models_of(args, recipe)  # a wrong name or length is told before torch is imported
    from training.utils.memory.fit import section_plan

    configs = {role: config_of(model) for role, model in models.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer names of what transformers is asked to do on the meta device
        return section_plan(args, configs, machine, dtype=dtype, attention=attention)


def plan_sections(recipe: Recipe, platform: MachineKind, machine: Machine | None = None) -> dict[str, SectionPlan | UserError]:
    """Return the plan of every section of a recipe, or the error that stands in its way."""
    logger = logging.getLogger("sanbu")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the step itself says what replaces a former flag
    found: dict[str, SectionPlan | UserError] = {}
    try:
        for section in (name for name in SECTIONS if name in recipe.sections):
            try:
                found[section] = plan_section(recipe, section, platform, machine=machine)
            except UserError as error:
                found[section] = error
    finally:
        logger.setLevel(level)
    return found
