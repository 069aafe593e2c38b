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
) -> tuple[Any, set[str]]:
    """Return the arguments of the step, from the recipe, then from the command line, and the names of those that were given.

    Raises UserError as the step itself does.
    """
    parser = FlagParser(step.arguments_class)
    if recipe:
        refuse(step.section not in recipe.sections, f"{recipe.path} has no section {step.section}; name another --step.")
    given = (read_recipe(recipe.path, parser) if recipe else {}) | parser.read(flags)
    ppo = step.section == "ppo"
    refuse(reward_model and not ppo, f"--reward-model belongs to --step 3, not to --step {step.choice}; drop it.")
    first, second = "actor_model_name_or_path" if ppo else "model_name_or_path", "critic_model_name_or_path"
    given |= {first: model} if model else {}
    named = set(given)
    refuse(first not in given, "no model: name one (--models lists those that are known), or a --config that does.")
    if ppo and (reward_model or model or second not in given):
        given[second] = reward_model or given[first]
    required = (one.name for one in fields(step.arguments_class) if is_required(one))
    args = step.arguments_class(**dict.fromkeys(required, "unused") | given)
    validate(args)
    return args, named | ({second} if reward_model else set())


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


def assumed(
    memory: StepMemory, given: set[str], options: argparse.Namespace, platform: MachineKind | None, machine: Machine
) -> list[str]:
    """Return what the figures rest on and nobody said, each with the flag that says it."""
    args, host = memory.args, f"{machine.host_memory / GIB:.0f} GiB of host memory a node"
    lengths = ("max_prompt_seq_len", "max_answer_seq_len") if memory.ppo else ("max_seq_len",)
    values = [name for name in (memory.batch_flag, *lengths) if name not in given and not args.max_tokens_per_device]
    critic = memory.ppo and "critic" in args.models and "critic_model_name_or_path" not in given
    found = {
        f"{host} (--host-memory)": not (platform or options.host_memory),
        f"{memory.dtype} (--dtype)": not platform and args.dtype == "auto",
        f"{memory.attention} (--attn_implementation)": not platform and args.attn_implementation == "auto",
        "critic and reward model of the actor's network (--reward-model)": critic,
        ", ".join(f"--{name} {getattr(args, name)}" for name in values): values,
    }
    return [words for words in found if found[words]]


def row_of(memory: StepMemory, found: Plan) -> dict[str, Any]:
    """Return one setting as a row of the table."""
    return {
        "flags": memory.flags_of(found.setting),
        "verdict": found.verdict,
        "moment": found.moment,
        "card_gib": {name: round(size / GIB, 3) for name, size in found.card.items()},
        "host_gib": {name: round(size / GIB, 3) for name, size in found.host.items()},
        "card_total_gib": round(found.on_card / GIB, 2),
        "host_total_gib": round(found.on_host / GIB, 2),
        "largest_batch": memory.largest_batch(found.setting, found.machine),
    }


def could_answer(plans: list[tuple[StepMemory, Plan]]) -> list[tuple[StepMemory, Plan]]:
    """Return the plans that fit and need less of card or host than each faster one of their variant; if none fits, the nearest."""
    found: list[tuple[StepMemory, Plan]] = []
    for memory, plan in plans:
        faster = [other for one, other in found if one is memory]
        wasteful = any(other.on_card <= plan.on_card and other.on_host <= plan.on_host for other in faster)
        found += [(memory, plan)] if plan.fits and not wasteful else []
    return found or [min(plans, key=lambda one: one[1].load)]


def instead(memory: StepMemory, machine: Machine) -> list[dict[str, Any]]:
    """Return the fastest way with LoRA on all that learns, for a step that was asked for without; [] if there is none."""
    if not memory.without_adapters:
        return []
    found = memory.with_flags(**dict.fromkeys(memory.without_adapters, 16)).cheapest(machine)
    return [row_of(*found)] if found else []


def report(model: str | None, options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Return everything that is printed. model: the word in front of the flags, flags: those of the step."""
    step = next(step for step in STEPS if step.choice == options.step)
    recipe = Recipe.read(options.config) if options.config else None
    args, given = step_arguments(step, recipe, flags, model, options.reward_model)
    machine, platform = machine_of(options, recipe.launch if recipe else {})
    dtype, attention = (platform.dtype, platform.attention) if platform else ("bf16", "sdpa")
    warnings.filterwarnings("ignore", category=FutureWarning)  # a flag of transformers has a new name
    found = plan_arguments(args, recipe, machine, dtype, attention)
    memory, batch, smaller = found.memory, None, ""
    best = memory.cheapest(machine)
    if best is None:
        best, batch, smaller = memory.cheapest(machine, 1), 1, f"--{memory.batch_flag} 1 "
    plans = [(one, one.plan(setting, machine, batch)) for one, setting in memory.ways(machine)]
    counts = {role: memory.network(role).weights for role in args.models}
    return {
        "recommended": None if best is None else smaller + best[0].flags_of(best[1].setting),
        "answer": row_of(*best) if best else None,
        "assumed": assumed(memory, given | ({memory.batch_flag} if batch else set()), options, platform, machine),
        "models": {role: {"path": path, "parameters": counts[role].total} for role, path in args.models.items()},
        "trained_parameters": {role: counts[role].trained for role in memory.trained},
        "step": step.choice,
        "machine": platform.name if platform else "as given",
        "devices": machine.devices,
        "per_node": machine.per_node,
        "device_memory_gib": machine.device_memory / GIB,
        "host_memory_gib": machine.host_memory / GIB,
        "dtype": memory.dtype,
        "attention": memory.attention,
        "length": memory.length,
        "batch_flag": memory.batch_flag,
        "batch": batch or getattr(args, memory.batch_flag),
        "as_given": {"verdict": found.plan.verdict, "card_total_gib": round(found.plan.on_card / GIB, 2)},
        "settings": [row_of(*one) for one in (plans if options.all else could_answer(plans))],
        "left_out": 0 if options.all else len(plans) - len(could_answer(plans)),
        "instead": instead(memory, machine),
        "ways_out": memory.ways_out,
    }
