"""Will it fit? The memory of a step on a card and a host, for every way to share and to move it, before anything starts.

    python -m scripts.plan chatglm-6b --step 1 --platform dcu_z100l --per_device_train_batch_size 4
    python -m scripts.plan chatglm-6b --reward-model chatglm-6b --step 3 --devices 8 --device-memory 32 --host-memory 512
    python -m scripts.plan --config configs/dcu_z100l/chatglm-6b.yaml --step 2 --json

MODEL stands first: a known name (--models lists them), a folder, or a config.json; without it the recipe's. All flags of
the step may follow (lengths, batches, --lora_dim, --quantization_bit, …), a recipe may give them. No weights are read.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from errors import CommandLine, UserError, told
from scripts.plan.known import known_models
from scripts.plan.report import report
from steps import STEPS

COLUMNS = {
    "weights": "weights",
    "gradients": "grad",
    "optimizer": "optim",
    "activations": "activ",
    "logits": "logits",
    "kv_cache": "kv",
    "gathered": "gather",
    "buffers": "buffers",
    "reserve": "reserve",
}


def build_parser() -> CommandLine:
    """Return the parser of the plan's own flags."""
    usage = "python -m scripts.plan [MODEL] [flags] [flags of the step]"
    parser = CommandLine("--help lists the flags.", prog="python -m scripts.plan", usage=usage, description=__doc__)
    add = parser.add_argument
    add("--reward-model", help="step 3: what critic and reward model start from (default: the same as MODEL)")
    choices = tuple(step.choice for step in STEPS)
    add("--step", choices=choices, default="1", help="1 fine-tuning, 2 reward model, 3 PPO, dpo (default: 1)")
    add("--config", metavar="FILE", help="a recipe: its section for the step gives flags, its launch section the platform")
    add("--platform", help="machine of configs/platforms.yaml: devices, memory, dtype, attention")
    add("--devices", type=int, help="devices of all nodes together")
    add("--nodes", type=int, help="nodes (default: the platform's, else 1)")
    add("--device-memory", type=float, metavar="GIB", help="usable memory of one device in GiB")
    add("--host-memory", type=float, metavar="GIB", help="memory of one node in GiB")
    add("--json", action="store_true", help="the same as JSON")
    add("--models", action="store_true", help="list the known models and end")
    return parser


def text(found: dict[str, Any]) -> str:
    """Return the report for people: models and machine, the answer, and the table that it comes from."""
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
    if found["recommended"] is None:
        lines.append("nothing fits: more cards, adapters (--lora_dim), or a smaller model")
    else:
        lines.append(f"recommended    {found['recommended']}")
    for row in found["instead"]:
        size = "" if row["card_total_gib"] is None else f"{row['card_total_gib']:.2f} GiB a card, "
        lines.append(f"instead    {row['flags']}: {row['verdict']}, {size}largest batch {row['largest_batch']}")
    lines += ["", "GiB of one card at the moment that needs the most (host: of one node), the fastest setting first"]
    heads = "".join(f"{head:>9}" for head in COLUMNS.values())
    lines.append(f"       {heads}{'card':>9}{'host':>9}{'batch':>7}  flags; when")
    for row in found["settings"]:
        sizes = (row["card_gib"].get(name, 0.0) for name in COLUMNS)
        cells = "".join(f"{size:>9.2f}" if size >= 0.005 else f"{'.':>9}" for size in sizes)
        lines.append(
            f"{row['verdict']:<7}{cells}{row['card_total_gib']:>9.2f}{row['host_total_gib']:>9.1f}{row['largest_batch']:>7}  "
            f"{row['flags']}; {row['moment']}"
        )
    return "\n".join([*lines, "batch: the largest that fits with that setting"])


def main(argv: list[str] | None = None) -> int:
    """Print the plan. Return the exit code: 0, or 1 if nothing fits."""
    words = list(sys.argv[1:] if argv is None else argv)
    # The model stands first: further back argparse would take the value of a step's flag for it.
    model = words.pop(0) if words and not words[0].startswith("-") else None
    options, flags = build_parser().parse_known_args(words)
    if options.models:
        print("\n".join(f"{name:<14} {', '.join(entry['hub'])}" for name, entry in known_models().items()))
        return 0
    for name in ("devices", "nodes", "device_memory", "host_memory"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be more than 0.")
    found = report(model, options, flags)
    print(json.dumps(found, indent=1) if options.json else text(found))
    return 0 if found["recommended"] else 1


if __name__ == "__main__":
    sys.exit(told(main)())
