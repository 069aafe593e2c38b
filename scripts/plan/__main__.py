"""Will it fit? The memory of a step on a card and a host, for every way to share and to move it, before anything starts.

    python -m scripts.plan chatglm-6b --step 1 --platform dcu_z100l --per_device_train_batch_size 4
    python -m scripts.plan chatglm-6b --reward-model chatglm-6b --step 3 --devices 8 --device-memory 32 --host-memory 512
    python -m scripts.plan --config configs/dcu_z100l/chatglm-6b.yaml --step 2 --json

MODEL stands first: a known name (--models lists them), a folder, or a config.json; without it the recipe's. All flags of
the step may follow (lengths, batches, --lora_dim, --quantization_bit, …), a recipe may give them. No weights are read.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from errors import UserError, told

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "configs" / "model_shapes.json"
STEPS = {"1": "SFTArguments", "2": "RewardArguments", "3": "PPOArguments", "dpo": "DPOArguments"}
WRITES = {"output_dir", "model_name_or_path"}
SECTIONS = {"1": "sft", "2": "reward", "3": "ppo", "dpo": "dpo"}


def build_parser() -> argparse.ArgumentParser:
    """The flags of the plan itself."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plan", usage="python -m scripts.plan [MODEL] [flags] [flags of the step]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--reward-model", help="step 3: what critic and reward model start from (default: the same as MODEL)")
    add("--step", choices=tuple(STEPS), default="1", help="1 fine-tuning, 2 reward model, 3 PPO, dpo (default: 1)")
    add("--config", metavar="FILE", help="a recipe: its section for the step gives flags, its launch section the platform")
    add("--platform", help="machine of configs/platforms.yaml: devices, memory, dtype, attention")
    add("--devices", type=int, help="devices of all nodes together")
    add("--nodes", type=int, help="nodes (default: the platform's, else 1)")
    add("--device-memory", type=float, metavar="GIB", help="usable memory of one device in GiB")
    add("--host-memory", type=float, metavar="GIB", help="memory of one node in GiB")
    add("--json", action="store_true", help="the same as JSON")
    add("--models", action="store_true", help="list the known models and end")
    return parser


def known_models() -> dict[str, dict[str, Any]]:
    """The models of configs/model_shapes.json."""
    return json.loads(SHAPES.read_text(encoding="utf-8"))


def config_of(model: str) -> Any:
    """The config of a known model, a folder or a config.json. UserError for none of these, with a near name."""
    import transformers

    import models  # noqa: F401  (registers ChatGLM)

    transformers.logging.set_verbosity_error()
    AutoConfig = transformers.AutoConfig

    from models.families import FAMILIES

    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: not a config.json ({error}).") from error
        if not isinstance(content, dict) or content.get("model_type") not in FAMILIES:
            kind = content.get("model_type") if isinstance(content, dict) else None
            raise UserError(f"{path}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}.")
        return AutoConfig.from_pretrained(path.parent) if path.name == "config.json" else built(content)
    shapes = known_models()
    wanted = model.lower()
    for name, entry in shapes.items():
        if wanted == name or wanted in [hub.lower() for hub in entry["hub"]]:
            return built(entry["config"])
    if path.parent != Path() and path.parent.is_dir():
        raise UserError(f"model {model}: no config.json there; name a folder with one, or one of {', '.join(shapes)}.")
    near = difflib.get_close_matches(wanted.rsplit("/", 1)[-1], shapes, 1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"model {model!r} is neither a folder nor known; known are {', '.join(shapes)}.{hint}")


def source_of(model: str, written: dict[str, str]) -> str:
    """What a folder that an earlier step of the recipe has still to write will come from; every other model is itself."""
    while model in written and not Path(model).is_dir():
        model = written[model]
    return model


def built(content: dict[str, Any]) -> Any:
    """A config from the fields of a config.json."""
    from transformers import AutoConfig

    from models.chatglm.configuration import chatglm_config_class

    content = dict(content)
    kind = content.pop("model_type")
    if kind == "chatglm":
        return chatglm_config_class(content)(**content)
    return AutoConfig.for_model(kind, **content)


def step_arguments(options: argparse.Namespace, rest: list[str]) -> Any:
    """The flags of the step: from the recipe, then from the command line. UserError as in the step itself."""
    from training.utils.flags import steps as arguments
    from training.utils.flags.checks import validate
    from training.utils.flags.parse import FlagParser, as_tokens, load_recipe

    parser = FlagParser(getattr(arguments, STEPS[options.step]))
    given: dict[str, Any] = {}
    section = SECTIONS[options.step]
    options.launch, options.written = {}, {}
    if options.config:
        recipe = load_recipe(options.config)
        options.launch = recipe.get("launch", {})
        if section not in recipe:
            raise UserError(f"{options.config} has no section {section}; name another --step.")
        given = parser.read([token for key, value in recipe[section].items() for token in as_tokens(str(key), value)])
        earlier = [recipe[name] for name in ("sft", "reward") if name != section and name in recipe]
        options.written = {one["output_dir"]: one["model_name_or_path"] for one in earlier if one.keys() >= WRITES}
    given |= parser.read(rest)
    name = "actor_model_name_or_path" if section == "ppo" else "model_name_or_path"
    if options.model:
        given[name] = options.model
    if name not in given:
        raise UserError("no model: name one (--models lists those that are known), or a --config that does.")
    if section == "ppo":
        if options.reward_model:
            given["critic_model_name_or_path"] = options.reward_model
        elif options.model or "critic_model_name_or_path" not in given:
            given["critic_model_name_or_path"] = given[name]
    elif options.reward_model:
        raise UserError(f"--reward-model belongs to --step 3, not to --step {options.step}; drop it.")
    for one in fields(parser.args_class):
        if one.default is MISSING and one.default_factory is MISSING and one.name not in given:
            given[one.name] = "unused"
    (args,) = parser.parse_dict(given)
    validate(args)
    return args


def machine_of(options: argparse.Namespace) -> tuple[Any, str, str, str]:
    """The machine, its dtype and attention, and what to call it."""
    from scripts.launch.platforms import platform_named
    from training.utils.memory.arithmetic import GIB, Machine

    name = options.platform or options.launch.get("platform")
    own = (options.devices, options.device_memory)
    platform = platform_named(name) if name else None
    if platform is None and None in own:
        raise UserError("no machine: give --platform (see configs/platforms.yaml), or --devices and --device-memory.")
    for flag in ("devices", "nodes", "device_memory", "host_memory"):
        value = getattr(options, flag)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be more than 0.")
    nodes = options.nodes or options.launch.get("num_nodes") or (platform.nodes if platform else 1)
    each = options.launch.get("processes") or (platform.devices if platform else 1)
    devices = options.devices or nodes * each
    if devices % nodes:
        raise UserError(f"--devices {devices} cannot be shared evenly by --nodes {nodes}; devices count all nodes together.")
    memory = options.device_memory or platform.device_memory_gib
    host = options.host_memory or (platform.host_memory_gib if platform else 64.0 * devices / nodes)
    card = platform is None or platform.accelerator != "cpu"
    machine = Machine(devices, devices // nodes, memory * GIB if card else 0.0, host * GIB, accelerator=card)
    dtype, attention = (platform.dtype, platform.attention) if platform else ("bf16", "sdpa")
    return machine, dtype, attention, name or "the machine given"


def gib(size: float) -> str:
    """Two digits behind the point, nothing for nothing."""
    return f"{size / 2**30:.2f}" if size >= 2**30 / 200 else "."


def rows_of(memory: Any, machine: Any) -> list[dict[str, Any]]:
    """One row for each setting, the fastest first."""
    rows = []
    for candidate in memory.candidates():
        found = memory.plan(candidate.setting, machine)
        rows.append({
            "flags": candidate.flags, "verdict": found.verdict, "moment": found.moment,
            "card_gib": {name: round(size / 2**30, 3) for name, size in found.card.items()},
            "host_gib": {name: round(size / 2**30, 3) for name, size in found.host.items()},
            "card_total_gib": round(found.on_card / 2**30, 2), "host_total_gib": round(found.on_host / 2**30, 2),
            "largest_batch": memory.largest_batch(candidate.setting, machine),
        })  # fmt: skip
    return rows


def variants(memory: Any, machine: Any) -> list[tuple[str, Any]]:
    """What would be trained instead, and its memory: as the flags say, with adapters, and in step 3 over shared weights."""
    import dataclasses

    from training.utils.memory.fit import StepMemory

    def changed(**flags: Any) -> Any:
        args = dataclasses.replace(memory.args, **flags)
        return StepMemory(args, memory.configs, dtype=memory.dtype, attn=memory.attn, prefixed=memory.prefixed)

    lora = {("lora_dim" if role == "model" else f"{role}_lora_dim"): 16 for role in memory.trained}
    if any(getattr(memory.args, name) for name in lora) or any(memory.flag(role, "pre_seq_len") for role in memory.roles):
        return []
    found = [(" ".join(f"--{name} 16" for name in lora), changed(**lora))]
    if memory.ppo and memory.args.reward_model and memory.configs["actor"].to_dict() == memory.configs["critic"].to_dict():
        found.append((found[0][0] + " --memory_mode shared", changed(**lora, memory_mode="shared")))
    return found


def report(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Everything that is printed, as one dictionary."""
    import torch

    from models.device import DTYPES
    from training.utils.memory.fit import StepMemory

    args = step_arguments(options, rest)
    machine, dtype, attention, title = machine_of(options)
    dtype = dtype if args.dtype == "auto" else args.dtype
    attention = attention if args.attn_implementation == "auto" else args.attn_implementation
    paths = dict(getattr(args, "models", {})) or {"model": args.model_name_or_path}
    if getattr(args, "ref_model_name_or_path", None):
        paths["reference"] = args.ref_model_name_or_path
    configs = {role: config_of(source_of(path, options.written)) for role, path in paths.items()}
    memory = StepMemory(args, configs, dtype=DTYPES[dtype], attn=attention)
    with torch.random.fork_rng(devices=[]):
        rows = rows_of(memory, machine)
        best = memory.cheapest(machine)
        if best is None:
            best_at_one = memory.cheapest(machine, 1)
        other = []
        for flags, changed in variants(memory, machine):
            found = changed.cheapest(machine)
            other.append({
                "flags": flags + (f" {found[0].flags}" if found else ""), "verdict": found[1].verdict if found else "no",
                "card_total_gib": round(found[1].on_card / 2**30, 2) if found else None,
                "host_total_gib": round(found[1].on_host / 2**30, 2) if found else None,
                "largest_batch": changed.largest_batch(found[0].setting, machine) if found else 0,
            })  # fmt: skip
        as_given = memory.plan(memory.setting, machine)
    batch = "per_device_training_batch_size" if memory.ppo else "per_device_train_batch_size"
    chosen = best or best_at_one
    return {
        "models": {role: {"path": path, "parameters": memory.footprint(role).weights.total} for role, path in paths.items()},
        "trained_parameters": {role: memory.footprint(role).weights.trained for role in memory.trained},
        "step": options.step, "machine": title, "devices": machine.devices, "per_node": machine.per_node,
        "device_memory_gib": machine.device_memory / 2**30, "host_memory_gib": machine.host_memory / 2**30,
        "dtype": dtype, "attention": attention, "length": memory.length, "batch_flag": batch, "batch": getattr(args, batch),
        "as_given": {"verdict": as_given.verdict, "card_total_gib": round(as_given.on_card / 2**30, 2),
                     "host_total_gib": round(as_given.on_host / 2**30, 2)},
        "settings": rows, "instead": other,
        "recommended": None if chosen is None else (("" if best else f"--{batch} 1 ") + chosen[0].flags),
    }  # fmt: skip


PARTS = (
    ("weights", "weights"), ("gradients", "grad"), ("optimizer", "optim"), ("activations", "activ"), ("logits", "logits"),
    ("kv_cache", "kv"), ("gathered", "gather"), ("buffers", "buffers"), ("reserve", "reserve"),
)  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for role, model in found["models"].items():
        trained = found["trained_parameters"].get(role)
        learns = "" if trained is None else f", {trained:,} trained"
        lines.append(f"{role:<10} {model['path']}: {model['parameters']:,} parameters{learns}")
    card = f"{found['device_memory_gib']:.0f} GiB a card, " if found["device_memory_gib"] else ""
    lines.append(
        f"machine    {found['machine']}: {found['devices']} processes, {card}{found['host_memory_gib']:.0f} GiB a host; "
        f"{found['dtype']}, {found['attention']} attention"
    )
    lines.append(f"step {found['step']:<5} --{found['batch_flag']} {found['batch']}, rows of {found['length']} tokens")
    lines.append("")
    lines.append("GiB of one card at the moment that needs the most (host: of one node), the fastest setting first")
    heads = "".join(f"{short:>9}" for _, short in PARTS)
    lines.append(f"       {heads}{'card':>9}{'host':>9}{'batch':>7}  flags; when")
    for row in found["settings"]:
        cells = "".join(f"{gib(row['card_gib'].get(name, 0.0) * 2**30):>9}" for name, _ in PARTS)
        lines.append(
            f"{row['verdict']:<7}{cells}{row['card_total_gib']:>9.2f}{row['host_total_gib']:>9.1f}{row['largest_batch']:>7}  "
            f"{row['flags']}; {row['moment']}"
        )
    lines.append("batch: the largest that fits with that setting")
    for row in found["instead"]:
        size = "" if row["card_total_gib"] is None else f"{row['card_total_gib']:.2f} GiB a card, "
        lines.append(f"instead    {row['flags']}: {row['verdict']}, {size}largest batch {row['largest_batch']}")
    lines.append("")
    if found["recommended"] is None:
        lines.append("nothing fits: more cards, adapters (--lora_dim), or a smaller model")
    else:
        lines.append(f"recommended    {found['recommended']}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the plan. Returns the exit code: 0, or 1 if nothing fits."""
    words = list(sys.argv[1:] if argv is None else argv)
    # The model stands first: further back argparse would take the value of a step's flag for it.
    model = words.pop(0) if words and not words[0].startswith("-") else None
    options, rest = build_parser().parse_known_args(words)
    options.model = model
    if options.models:
        print("\n".join(f"{name:<14} {', '.join(entry['hub'])}" for name, entry in known_models().items()))
        return 0
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)   # a flag of transformers has a new name
    found = report(options, rest)
    print(json.dumps(found, indent=1) if options.json else text(found))
    return 0 if found["recommended"] else 1


if __name__ == "__main__":
    sys.exit(told(main)())
