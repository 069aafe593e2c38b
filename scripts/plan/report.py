"""Everything that scripts.plan prints, as one dictionary."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from errors import refuse
from scripts.launch.platforms import MachineKind, platform_named
from scripts.plan.section import plan_arguments, platform_machine
from steps import STEPS, Step
from training.utils.flags.checks import validate
from training.utils.flags.parse import FlagParser, is_required, read_recipe
from training.utils.flags.recipe import Recipe
from training.utils.memory.arithmetic import GIB, Machine, Plan

if TYPE_CHECKING:
    from training.utils.memory.fit import StepMemory


def step_arguments(
    step: Step, recipe: Recipe | None, flags: list[str], model: str | None = None, reward_model: str | None = None
) -> Any:
    """Return the arguments of the step: from the recipe, then from the command line. UserError as in the step itself."""
    parser = FlagParser(step.arguments_class)
    if recipe:
        refuse(step.section not in recipe.sections, f"{recipe.path} has no section {step.section}; name another --step.")
    given = (read_recipe(recipe.path, parser) if recipe else {}) | parser.read(flags)
    ppo = step.section == "ppo"
    refuse(reward_model and not ppo, f"--reward-model belongs to --step 3, not to --step {step.choice}; drop it.")
    first, second = "actor_model_name_or_path" if ppo else "model_name_or_path", "critic_model_name_or_path"
    given |= {first: model} if model else {}
    refuse(first not in given, "no model: name one (--models lists those that are known), or a --config that does.")
    if ppo and (reward_model or model or second not in given):
        given[second] = reward_model or given[first]
    required = (one.name for one in fields(step.arguments_class) if is_required(one))
    args = step.arguments_class(**dict.fromkeys(required, "unused") | given)
    validate(args)
    return args


def machine_of(options: argparse.Namespace, launch: dict[str, Any]) -> tuple[Machine, MachineKind | None]:
    """Return the machine of the flags, of the recipe's launch section and of the platform, and that platform."""
    name = options.platform or launch.get("platform")
    platform = platform_named(name) if name else None
    unknown = platform is None and None in (options.devices, options.device_memory)
    refuse(unknown, "no machine: give --platform (see configs/platforms.yaml), or --devices and --device-memory.")
    nodes = options.nodes or launch.get("num_nodes") or (platform.nodes if platform else 1)
    devices = options.devices or nodes * (launch.get("processes") or platform.devices)
    shared = f"--devices {devices} cannot be shared evenly by --nodes {nodes}"
    refuse(devices % nodes, f"{shared}; devices count all nodes together.")
    per_node = devices // nodes
    if platform:
        machine = platform_machine(platform, nodes=nodes, per_node=per_node)
    else:
        machine = Machine(devices, per_node, options.device_memory * GIB, 64.0 * per_node * GIB)
    if options.device_memory and machine.accelerator:
        machine = replace(machine, device_memory=options.device_memory * GIB)
    return replace(machine, host_memory=options.host_memory * GIB) if options.host_memory else machine, platform


def row_of(memory: StepMemory, found: Plan) -> dict[str, Any]:
    """Return one setting as a row of the table."""
    return {
        "flags": memory.flags_of(found.setting),
        "verdict": found.verdict,
        "moment": found.moment,
        "card_gib": {name: round(size / GIB, 3) for name, size in found.card.items()},
        "host_gib": {name: round(size / GIB, 3) for name, size in found.host.items()},
        **totals(found),
        "largest_batch": memory.largest_batch(found.setting, found.machine),
    }


def totals(found: Plan | None) -> dict[str, float | None]:
    """Return GiB of a card and of a host."""
    return {
        "card_total_gib": found and round(found.on_card / GIB, 2),
        "host_total_gib": found and round(found.on_host / GIB, 2),
    }


def instead(memory: StepMemory, machine: Machine) -> list[dict[str, Any]]:
    """Return what could be trained instead: adapters, and in step 3 adapters over shared weights; [] for a step with adapters."""
    if any(memory.is_adapted(role) for role in memory.roles):
        return []
    ranks = {f"{memory.roles[role]}lora_dim": 16 for role in memory.trained}
    words = " ".join(f"--{name} 16" for name in ranks)
    choices = {words: ranks}
    one_network = len({config.to_json_string() for config in memory.configs.values()}) == 1
    if memory.ppo and memory.args.reward_model and "critic" in memory.roles and one_network:
        choices[f"{words} --memory_mode shared"] = ranks | {"memory_mode": "shared"}
    rows = []
    for words, changes in choices.items():
        other = memory.with_flags(**changes)
        found = other.cheapest(machine)
        rows.append({
            "flags": words + (f" {other.flags_of(found.setting)}" if found else ""),
            "verdict": found.verdict if found else "no",
            **totals(found),
            "largest_batch": other.largest_batch(found.setting, machine) if found else 0,
        })
    return rows


def report(model: str | None, options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Return everything that is printed. model: the word in front of the flags, flags: those of the step."""
    step = next(step for step in STEPS if step.choice == options.step)
    recipe = Recipe.read(options.config) if options.config else None
    args = step_arguments(step, recipe, flags, model, options.reward_model)
    machine, platform = machine_of(options, recipe.launch if recipe else {})
    dtype, attention = (platform.dtype, platform.attention) if platform else ("bf16", "sdpa")
    warnings.filterwarnings("ignore", category=FutureWarning)  # a flag of transformers has a new name
    found = plan_arguments(args, recipe, machine, dtype, attention)
    memory = found.memory
    rows = [row_of(memory, memory.plan(setting, machine)) for setting in memory.settings()]
    best, smaller = memory.cheapest(machine), ""
    if best is None:
        best, smaller = memory.cheapest(machine, 1), f"--{memory.batch_flag} 1 "
    others = instead(memory, machine)
    counts = {role: memory.network(role).weights for role in args.models}
    return {
        "models": {role: {"path": path, "parameters": counts[role].total} for role, path in args.models.items()},
        "trained_parameters": {role: counts[role].trained for role in memory.trained},
        "step": step.choice,
        "machine": platform.name if platform else "the machine given",
        "devices": machine.devices,
        "per_node": machine.per_node,
        "device_memory_gib": machine.device_memory / GIB,
        "host_memory_gib": machine.host_memory / GIB,
        "dtype": memory.dtype,
        "attention": memory.attention,
        "length": memory.length,
        "batch_flag": memory.batch_flag,
        "batch": getattr(args, memory.batch_flag),
        "as_given": {"verdict": found.plan.verdict, **totals(found.plan)},
        "settings": rows,
        "instead": others,
        "recommended": None if best is None else smaller + memory.flags_of(best.setting),
    }
