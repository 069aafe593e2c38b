"""Will it fit? The memory of a step on a card and a host, for every way to share and to move it, before anything starts.

    python -m scripts.plan chatglm-6b --step 1 --platform dcu_z100l --per_device_train_batch_size 4
    python -m scripts.plan qwen3-8b --step 3 --devices 1 --device-memory 24 --actor_lora_dim 16 --critic_lora_dim 16
    python -m scripts.plan --config configs/dcu_z100l/chatglm-6b.yaml --step 2 --json

MODEL stands first: a known name (--models lists them), a folder, a config.json, or an id of the hub that is downloaded;
without it the recipe's. All flags of the step may follow (lengths, batches, --lora_dim, --quantization_bit, …), a recipe may
give them. No weights are read.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from errors import CommandLine, UserError, refuse, told
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


CHINESE = """放得下吗？在启动之前算出一个步骤在每张卡和主机上需要多少内存，并给出建议。

    python -m scripts.plan chatglm-6b --step 1 --platform dcu_z100l --per_device_train_batch_size 4
    python -m scripts.plan qwen3-8b --step 3 --devices 1 --device-memory 24 --actor_lora_dim 16 --critic_lora_dim 16
    python -m scripts.plan --config configs/dcu_z100l/chatglm-6b.yaml --step 2 --json

模型写在最前面：已知的名字（--models 列出）、文件夹、config.json，或已下载的 hub 名。后面可以跟该步骤的任何参数（长度、批大小、
--lora_dim、--quantization_bit……），配方也可以给出它们。不读取权重。
"""
# What a variant asks of the run, by a word of its flags
WANTS = {
    "--memory_mode shared": "a reward model that is an adapter over the SFT model: step 2 with --lora_dim",
    "--quantization_bit 4": "a base rounded to 4 bits; 8 bits lie between",
}


def build_parser() -> CommandLine:
    """Return the parser of the plan's own flags."""
    usage = "python -m scripts.plan [MODEL] [flags] [flags of the step]"
    words = {"prog": "python -m scripts.plan", "usage": usage, "description": __doc__, "zh": CHINESE}
    parser = CommandLine("--help lists the flags.", **words)
    add = parser.add_argument
    critic = "step 3: what critic and reward model start from (default: the same as MODEL)"
    add("--reward-model", help=critic, zh="第 3 步：critic 和奖励模型的起点（缺省：与 MODEL 相同）")
    choices = tuple(step.choice for step in STEPS)
    step = "1 fine-tuning, 2 reward model, 3 PPO, dpo (default: 1)"
    add("--step", choices=choices, default="1", help=step, zh="1 微调，2 奖励模型，3 PPO，dpo（缺省：1）")
    recipe = "a recipe: its section for the step gives flags, its launch section the platform; or a config.json, as MODEL"
    add("--config", metavar="FILE", help=recipe, zh="配方：一节给出该步骤的参数，launch 给出平台；或 config.json，等同 MODEL")
    platform = "machine of configs/platforms.yaml: devices, memory, dtype, attention"
    add("--platform", help=platform, zh="configs/platforms.yaml 中的机器：设备、内存、精度、注意力")
    add("--devices", type=int, help="devices of all nodes together", zh="所有节点的设备总数")
    add("--nodes", type=int, help="nodes (default: the platform's, else 1)", zh="节点数（缺省：平台的节点数，否则为 1）")
    add("--device-memory", type=float, metavar="GIB", help="usable memory of one device in GiB", zh="一个设备可用的内存，GiB")
    host = "memory of one node in GiB (default: the platform's, else 64 a device is assumed)"
    add("--host-memory", type=float, metavar="GIB", help=host, zh="一个节点的内存，GiB（缺省：平台的值，否则假设每个设备 64）")
    every = "print all settings, not only those that could be the answer"
    add("--all", action="store_true", help=every, zh="列出所有设置，而不只是可能成为答案的设置")
    add("--json", action="store_true", help="the same as JSON", zh="以 JSON 输出")
    add("--models", action="store_true", help="list the known models and end", zh="列出已知的模型后结束")
    return parser


def text(found: dict[str, Any]) -> str:
    """Return the report for people: the answer and what it rests on, models and machine, and the table that it comes from."""
    lines, best, cards = [], found["answer"], found["device_memory_gib"]
    if best is None:
        lines.append(f"recommended    nothing fits: {found['ways_out']}")
    else:
        card = f"{best['card_total_gib']:.2f} of {cards:.0f} GiB a card, " if cards else ""
        host = f"{best['host_total_gib']:.1f} of {found['host_memory_gib']:.0f} GiB a host"
        lines += [
            f"recommended    {found['recommended']}",
            f"               {best['verdict']}: {card}{host}; a micro-batch of {found['batch']}, at most {best['largest_batch']}",
            *(f"wants          {wanted}" for flag, wanted in WANTS.items() if flag in found["recommended"]),
        ]
    lines += [f"assumed        {'; '.join(found['assumed'])}"] if found["assumed"] else []
    for row in found["instead"]:
        size = f"{row['card_total_gib']:.2f} GiB a card, " if cards else ""
        lines.append(f"instead        {row['flags']}: {row['verdict']}, {size}largest batch {row['largest_batch']}")
    lines.append("")
    for role, model in found["models"].items():
        trained = found["trained_parameters"].get(role)
        learns = "" if trained is None else f", {trained:,} trained"
        lines.append(f"{role:<10} {model['path']}: {model['parameters']:,} parameters{learns}")
    card = f"{cards:.0f} GiB a card, " if cards else ""
    count = f"{found['devices']} process{'es' * (found['devices'] > 1)}"
    lines += [
        f"machine    {found['machine']}: {count}, {card}{found['host_memory_gib']:.0f} GiB a host; "
        f"{found['dtype']}, {found['attention']} attention",
        f"step {found['step']:<5} --{found['batch_flag']} {found['batch']}, rows of {found['length']} tokens",
        "",
        *table(found),
    ]
    return "\n".join(lines)


def table(found: dict[str, Any]) -> list[str]:
    """Return the settings as lines: the columns that hold something, the totals, the largest batch, flags and moment."""
    rows = found["settings"]
    columns = {name: head for name, head in COLUMNS.items() if any(row["card_gib"].get(name, 0) >= 0.005 for row in rows)}
    lines = ["GiB of one card at the moment that needs the most (host: of one node), the fastest setting first"]
    lines.append(f"       {''.join(f'{head:>9}' for head in columns.values())}{'card':>9}{'host':>9}{'batch':>7}  flags; when")
    each = [re.findall(r"--\w+(?: [^-]\S*)?", row["flags"]) for row in rows]
    shared = [flag for flag in each[0] if all(flag in flags for flags in each)] if len(rows) > 1 else []
    lines += [f"all with {' '.join(shared)}, and"] if shared else []
    for row, flags in zip(rows, each, strict=True):
        own = " ".join(flag for flag in flags if flag not in shared) or "nothing more"
        sizes = (row["card_gib"].get(name, 0.0) for name in columns)
        cells = "".join(f"{size:>9.2f}" if size >= 0.005 else f"{'.':>9}" for size in sizes)
        lines.append(
            f"{row['verdict']:<7}{cells}{row['card_total_gib']:>9.2f}{row['host_total_gib']:>9.1f}{row['largest_batch']:>7}  "
            f"{own}; {row['moment']}"
        )
    lines.append("batch: the largest that fits with that setting")
    return [*lines, f"{found['left_out']} more do not fit, or are slower and take no less: --all"] if found["left_out"] else lines


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
    if options.config and (options.config.endswith(".json") or Path(options.config).is_dir()):
        refuse(model, f"MODEL {model} and --config {options.config} both name a model; drop one of the two.")
        model, options.config = options.config, None
    found = report(model, options, flags)
    print(json.dumps(found, indent=1) if options.json else text(found))
    return 0 if found["recommended"] else 1


if __name__ == "__main__":
    sys.exit(told(main)())
