"""The parts of the doctor that load torch or touch a device; each runs in a process of its own and prints one line of JSON.

python -m scripts.doctor.probe facts | all_reduce BACKEND SECONDS | build OPTIMIZER | memory RECIPE MACHINE
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from errors import UserError
from scripts.doctor.result import MARK

PACKAGES = ("torch", "torch_npu", "deepspeed", "transformers", "peft", "ninja")


def reason(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def facts() -> dict[str, Any]:
    """Versions, platform, cards, dtypes, operators. What fails is written down, and the rest is asked nevertheless."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "executable": sys.executable, "versions": {}}
    for name in PACKAGES:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = None
    from models import device

    found["build"] = device.torch_build()
    try:
        platform = device.detect_platform()
    except UserError as error:  # DS_ACCELERATOR names what is not here; what is?
        found["refused"] = str(error)
        del os.environ["DS_ACCELERATOR"]
        platform = device.detect_platform()
    found |= {"platform": platform.name, "torch_device": platform.torch_device, "backend": platform.backend}
    parts = {"cards": device.cards, "dtypes": lambda: dtypes(platform), "ops": lambda: ops(platform), "import": imports}
    for name, ask in parts.items():
        try:
            found[name] = ask()
        except Exception as error:  # a driver fails in its own ways
            found[f"{name}_error"] = reason(error)
    return found


def dtypes(platform: Any) -> dict[str, Any]:
    """What the table says of the chip, and what a probe of each dtype says."""
    from models import device

    device.set_device(platform, 0)
    chip = device.chip_name(platform)
    works = {name: device.probe_dtype(device.DTYPES[name], platform) for name in ("fp16", "bf16")}
    found = {"chip": chip, "table": list(device.chip_dtypes(chip)), "works": works}
    attention = device.attention_implementation("auto", platform)
    return {**found, "first_ascend": device.is_first_ascend(chip), "attention": attention}


def ops(platform: Any) -> dict[str, Any]:
    """Whether torch's fused AdamW steps here."""
    import torch

    parameter = torch.nn.Parameter(torch.ones(4, device=platform.torch_device))
    parameter.grad = torch.ones_like(parameter)
    try:
        torch.optim.AdamW([parameter], fused=True).step()
    except (RuntimeError, NotImplementedError) as error:
        return {"fused_adamw": False, "why": reason(error)}
    return {"fused_adamw": True}


def imports() -> dict[str, str | None]:
    """What happens when the libraries are imported: None, or the error."""
    found: dict[str, str | None] = {}
    for name in ("deepspeed", "transformers"):
        try:
            __import__(name)
            found[name] = None
        except Exception as error:  # an import runs anything
            found[name] = reason(error)
    return found


def all_reduce(backend: str, seconds: float) -> dict[str, Any]:
    """Sum 0..255 times (rank + 1) over all processes; with two of them the elements add up to 3 x 32640."""
    import torch
    import torch.distributed as dist

    from models.device import detect_platform, set_device

    device = set_device(detect_platform(), int(os.environ["RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    values = torch.arange(256, dtype=torch.float32, device=device) * (dist.get_rank() + 1)
    dist.all_reduce(values)
    found = {"sum": float(values.sum()), "processes": dist.get_world_size()}
    dist.destroy_process_group()
    return found


def build(name: str) -> dict[str, Any]:
    """Build and step one of DeepSpeed's optimizers, as training/utils/engine/build.py would: cpu_adam or fused_adam."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    from models.device import detect_platform, set_device

    device = torch.device("cpu") if name == "cpu_adam" else set_device(detect_platform(), 0)
    parameter = torch.nn.Parameter(torch.ones(16, device=device))
    parameter.grad = torch.ones_like(parameter)
    (DeepSpeedCPUAdam if name == "cpu_adam" else FusedAdam)([parameter], lr=0.1).step()
    return {"moved": bool((parameter.detach() < 1).all())}


def memory(path: str, where: dict[str, Any]) -> dict[str, Any]:
    """What each section of a recipe takes on a machine (the fields of Machine, and the platform).

    Models of earlier steps, which do not exist yet, are planned as what those steps start from.
    """
    from scripts.launch.platforms import platform_named
    from scripts.plan.section import plan_sections
    from training.utils.flags.recipe import Recipe
    from training.utils.memory.arithmetic import Machine

    recipe, platform = Recipe.read(path), platform_named(where.pop("platform"))
    found: dict[str, Any] = {}
    for section, one in plan_sections(recipe, platform, Machine(**where)).items():
        if isinstance(one, UserError):
            found[section] = {"error": str(one)}
            continue
        counts = {role: one.memory.footprint(role).weights for role in one.memory.shape.trained}
        flags = recipe.sections[section]
        found[section] = {
            "verdict": one.plan.verdict,
            "card": one.plan.on_card,
            "host": one.plan.on_host,
            "dtype": one.dtype,
            "weights": {role: weights.total for role, weights in counts.items()},
            "trained": {role: weights.trained for role, weights in counts.items()},
            "keep": flags.get("save_total_limit", 2),
            "refusal": one.refusal,
            "offload": one.plan.setting.offload_optimizer,
            "optimizer": flags.get("optimizer", "auto"),
        }
    return found


if __name__ == "__main__":
    part, *words = sys.argv[1:]
    if part == "facts":
        answer = facts()
    elif part == "all_reduce":
        answer = all_reduce(words[0], float(words[1]))
    elif part == "build":
        answer = build(words[0])
    else:
        answer = memory(words[0], json.loads(words[1]))
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
