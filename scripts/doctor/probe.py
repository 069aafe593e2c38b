"""The parts of the doctor that load torch, touch a device or run on another host. Each prints one line of JSON.

python -m scripts.doctor.probe facts [VENDOR] | packages | all_reduce BACKEND | host ADDRESS PORT
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.doctor.result import MARK

PACKAGES = ("torch", "torch_npu", "deepspeed", "transformers")
# vendor -> folders of the toolkit, files in them that hold its version, and the version in such a file
TOOLKITS = {
    "dcu": (("$ROCM_HOME", "$ROCM_PATH", "/opt/dtk"), (".info/version",), r"(\d\d\.\d\d[\w.]*)"),
    "npu": (
        ("$ASCEND_TOOLKIT_HOME", "$ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest"),
        ("*-linux/ascend_*_install.info", "version.cfg", "compiler/version.info"),
        r"version\s*=\s*\[?(?:[\d.]*:)?([1-9][\w.]*)",
    ),
}


def reason(error: BaseException) -> str:
    """Return the first line of an error, with its kind."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]


def versions() -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    return {one.name: one.version for name in PACKAGES for one in distributions(name=name)}


def facts(vendor: str = "") -> dict[str, Any]:
    """Return versions, platform, cards, toolkit and dtypes. An error of one of these stands in its place.

    vendor: whose driver and toolkit count (cuda, dcu, npu, cpu), where not those of the platform that torch finds.
    """
    from models import device

    found: dict[str, Any] = {"versions": versions(), "build": device.torch_build()}
    try:
        platform = device.detect_platform()
    except UserError as error:  # DS_ACCELERATOR names what is not here
        found["refused"] = str(error)
        del os.environ["DS_ACCELERATOR"]
        platform = device.detect_platform()
    found |= {"platform": platform.name, "torch_device": platform.torch_device, "backend": platform.backend}
    parts = {
        "cards": device.cards,
        "dtypes": lambda: dtypes(platform),
        "tools": lambda: tools(vendor or platform.name),
    }
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # a driver fails in its own ways
            found[f"{name}_error"] = reason(error)
    return found


def packages() -> dict[str, Any]:
    """Return the errors of DeepSpeed's and transformers' imports by name."""
    errors = {}
    for name in ("deepspeed", "transformers"):
        try:
            import_module(name)
        except Exception as error:  # an import runs anything
            errors[name] = reason(error)
    return {"import": errors}


def dtypes(platform: Any) -> dict[str, Any]:
    """Return the dtypes of the chip by the table, and the result of a product in each."""
    from models import device

    device.set_device(platform, 0)
    chip = device.chip_name(platform)
    return {
        "chip": chip,
        "table": list(device.chip_dtypes(chip)),
        "works": {name: device.probe_dtype(device.DTYPES[name], platform) for name in ("fp16", "bf16")},
        "first_ascend": device.is_first_ascend(chip),
        "attention": device.attention_implementation("auto", platform),
    }


def tools(vendor: str) -> dict[str, str | None]:
    """Return the versions of driver and toolkit: NVIDIA's by torch.utils.collect_env, others' by their own means."""
    if vendor in TOOLKITS:
        return {"toolkit": toolkit_version(vendor), "driver": dcu_driver() if vendor == "dcu" else None}
    from torch.utils import collect_env

    run = collect_env.run
    return {"toolkit": collect_env.get_running_cuda_version(run), "driver": collect_env.get_nvidia_driver_version(run)}


def dcu_driver() -> str | None:
    """Return the driver's version by hy-smi or rocm-smi."""
    for tool in ("hy-smi", "rocm-smi"):
        try:
            done = subprocess.run([tool, "--showdriverversion"], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if match := re.search(r"driver version\s*:?\s*([\d.]+\d)", done.stdout, re.I):
            return match[1]
    return None


def toolkit_version(vendor: str) -> str | None:
    """Return the version that DTK or CANN leaves in a file of its folder."""
    homes, patterns, wanted = TOOLKITS[vendor]
    for home in map(os.path.expandvars, homes):
        for path in (path for pattern in patterns for path in sorted(Path(home).glob(pattern))):
            if match := re.search(wanted, path.read_text(encoding="utf-8", errors="replace"), re.I):
                return match[1]
    return None


def all_reduce(backend: str) -> dict[str, Any]:
    """Sum over all processes. Raise RuntimeError for a wrong sum."""
    import torch
    import torch.distributed as dist

    from models.device import detect_platform, set_device

    device = set_device(detect_platform(), int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    values = torch.arange(256, dtype=torch.float32, device=device) * (dist.get_rank() + 1)
    dist.all_reduce(values)
    size, total = dist.get_world_size(), float(values.sum())
    dist.destroy_process_group()
    if total != 32640 * size * (size + 1) / 2:
        raise RuntimeError(f"one of {size} processes has the sum {total:g}")
    return {"processes": size}


def host(address: str = "", port: str = "") -> dict[str, Any]:
    """Return versions, clock and cards of this host, and whether it reaches the first node. Imports no torch."""
    cards = [path for path in Path("/dev").iterdir() if re.fullmatch(r"(nvidia|davinci)\d+", path.name)]
    found = {"versions": versions(), "clock": time.time(), "cards": len(cards)}
    if address:
        try:
            socket.create_connection((address, int(port)), timeout=5).close()
        except OSError as error:
            found["unreachable"] = reason(error)
    return found


if __name__ == "__main__":
    part, *words = sys.argv[1:]
    try:
        answer = {"facts": facts, "packages": packages, "all_reduce": all_reduce, "host": host}[part](*words)
    except Exception as error:  # the doctor reports it
        answer = {"error": reason(error)}
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
