"""Versions that go together: the range of this project, and the vendors' tables.

Sources, read and not tried: DTK drivers HYGON-AI/hcu-dcgm: pkg/dcgm/compatibility.go; DTK wheels
FlyAIBox/dcu-in-action: requirements-dtk*.txt and docs/base/02; CANN and torch_npu Ascend/pytorch: COMPATIBILITY.en.md.
"""

import re
from collections.abc import Mapping

from packaging.version import Version

from scripts.doctor.result import FAIL, OK, WARN, Check, Situation
from scripts.launch.platforms import ROOT

# DTK -> the oldest driver that any row of the vendor's table for Z100 and Z100L names with it
DTK_DRIVER = {
    **dict.fromkeys(("21.04", "21.10", "22.04"), "5.6.25"),
    **dict.fromkeys(("22.10", "23.04"), "5.11.40"),
    "23.10": "5.16.29",
    **dict.fromkeys(("24.04", "25.04"), "6.2.26"),
    "26.04": "6.3.30",
}
DTK_TORCH = {"24.04": ("2.1.0", "2.3.0"), "25.04": ("2.4.1",), "26.04": ("2.9.0",)}
WITHOUT_TORCH = (("5.20.0", "2.6"), ("5.15.0", "2.5"))  # transformers from -> without this torch it goes on as if there were none
CANN_TORCH_NPU = {
    "9.1.0": ("2.12.0", "2.11.0", "2.10.0.post4", "2.9.0.post6", "2.7.1.post8"),
    "9.0.0": ("2.9.0.post2", "2.8.0.post4", "2.7.1.post4"),
    "8.5.0": ("2.9.0", "2.8.0.post2", "2.7.1.post2", "2.6.0.post5"),
    "8.3.RC1": ("2.8.0", "2.7.1", "2.6.0.post3", "2.1.0.post17"),
    "8.2.RC1": ("2.6.0", "2.5.1.post1", "2.1.0.post13"),
    "8.1.RC1": ("2.5.1", "2.4.0.post4", "2.3.1.post6", "2.1.0.post12"),
    "8.0.0": ("2.4.0.post2", "2.3.1.post4", "2.1.0.post10"),
    "8.0.RC3": ("2.4.0", "2.3.1.post2", "2.1.0.post8"),
    "8.0.RC2": ("2.3.1", "2.2.0.post2", "2.1.0.post6"),
    "8.0.RC1": ("2.2.0", "2.1.0.post4"),
    "7.0.0": ("2.1.0", "2.0.1.post1"),
}


def release(version: str) -> str:
    """Return 2.4.1 for 2.4.1+das.opt2.dtk2504 and for 2.4.1.post2."""
    return Version(version).base_version


def check_versions(situation: Situation) -> list[Check]:
    """Compare packages with the range of pyproject.toml and, on DCU and NPU, with the vendor's tables."""
    facts, vendor = situation.facts, situation.vendor
    installed, tools = facts.get("versions", {}), facts.get("tools", {})
    driver, toolkit = tools.get("driver"), tools.get("toolkit")
    checks = []
    if "versions" in facts:
        pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for name, low, high in re.findall(r'"(torch|deepspeed|transformers)>=([\d.]+),<=([\d.]+)"', pyproject):
            judged = judge_package(name, low, high, installed, facts.get("import", {}).get(name))
            checks.append(Check("versions", name, *judged))
    if vendor == "cuda":
        checks.append(Check("platform", "CUDA", *judge_cuda(driver, toolkit, facts.get("build", {}).get("cuda"))))
    if vendor == "dcu":
        checks.append(Check("platform", "DTK", *judge_dtk(driver, toolkit)))
        if "torch" in installed:
            checks.append(Check("versions", "torch for DTK", *judge_dtk_torch(installed["torch"], toolkit)))
    if vendor == "npu":
        checks.append(Check("versions", "torch_npu", *judge_torch_npu(installed)))
        if "torch_npu" in installed:
            checks.append(Check("versions", "CANN", *judge_cann(installed["torch_npu"], toolkit)))
    return checks


def judge_package(name: str, low: str, high: str, installed: Mapping[str, str], error: str | None) -> tuple[str, ...]:
    """Return state, reason and advice for a package whose import ended with an error, if any."""
    version = installed.get(name)
    if version is None:
        return FAIL, "not installed", "pip install -r requirements.txt"
    if error:
        todo = "install the versions of requirements.txt, or the vendor's wheels for this machine"
        return FAIL, f"{version} does not import: {error}", todo
    if Version(version) < Version(low):
        return FAIL, f"{version} is older than {low}", f"install {low} to {high}"
    if Version(release(version)) > Version(high):
        why = f"{version} is newer than {high}, the newest that was tested"
        return WARN, why, f"if something fails, install {high}"
    for since, needed in WITHOUT_TORCH if name == "transformers" else ():
        torch = installed.get("torch", needed)
        if Version(version) >= Version(since) and Version(release(torch)) < Version(needed):
            why = f"{version} does without torch {torch}: from {since} on it wants {needed}"
            return FAIL, why, f"install torch {needed} or newer, or the versions of requirements-oldest.txt"
    # 0.14.2 and 0.14.3 of the package index want a function that torch 2.4 removed; vendors' builds have a repair.
    old = name == "deepspeed" and "+" not in version and Version(version) < Version("0.14.4")
    if old and Version(installed.get("torch", "0")) >= Version("2.4"):
        return WARN, f"{version} from the package index does not import with torch 2.4", "install 0.14.4 or newer"
    return OK, f"{version}, within {low} to {high}"


def judge_cuda(driver: str | None, toolkit: str | None, built: str | None) -> tuple[str, ...]:
    """Compare NVIDIA's driver and nvcc, which only DeepSpeed's own optimizers need, with torch's CUDA."""
    if driver is None:
        return WARN, "nvidia-smi tells no driver", "install the driver; in a container mount the host's tools"
    if toolkit and built and toolkit.split(".")[0] != built.split(".")[0]:
        why = f"nvcc {toolkit}, but torch was built with CUDA {built}: DeepSpeed's optimizers do not build"
        return WARN, why, f"put a toolkit {built.split('.')[0]}.x first on PATH, and set CUDA_HOME"
    return OK, f"driver {driver}, torch for CUDA {built}, nvcc {toolkit or 'absent'}"


def judge_dtk(driver: str | None, toolkit: str | None) -> tuple[str, ...]:
    """Compare DTK with the driver under it."""
    if toolkit is None:
        return WARN, "no DTK in ROCM_PATH or /opt/dtk", "install it, then source /opt/dtk/env.sh"
    needed = DTK_DRIVER.get(".".join(toolkit.split(".")[:2]))
    if driver is None or needed is None:
        why = f"DTK {toolkit} with driver {driver or 'unknown'}: not in the tables"
        return WARN, why, "compare with the vendor's release notes"
    if Version(driver) < Version(needed):
        return FAIL, f"DTK {toolkit} needs driver {needed}, this is {driver}", "update the driver, or take an older DTK"
    return OK, f"DTK {toolkit} on driver {driver} ({needed} or newer)"


def judge_dtk_torch(torch: str, toolkit: str | None) -> tuple[str, ...]:
    """Compare the vendor's torch with the DTK that is installed."""
    label = re.search(r"dtk(\d\d)(\d\d)", torch)
    if label is None:
        todo = "install the vendor's wheel for your DTK (with --no-deps, if a resolver put another torch in its place)"
        return WARN, f"torch {torch} does not name a DTK", todo
    made_for = f"{label[1]}.{label[2]}"
    if toolkit and not toolkit.startswith(made_for):
        return FAIL, f"torch {torch} was built for DTK {made_for}, not {toolkit}", f"install the torch of DTK {toolkit}"
    known = DTK_TORCH.get(made_for, ())
    if known and release(torch) not in known:
        why = f"torch {torch}; the tables list {' and '.join(known)} for DTK {made_for}"
        return WARN, why, "compare with the vendor's list"
    return OK, f"torch {torch} for DTK {made_for}"


def judge_torch_npu(installed: Mapping[str, str]) -> tuple[str, ...]:
    """Compare torch_npu with torch."""
    torch, npu = installed.get("torch", "0"), installed.get("torch_npu")
    if npu and release(torch) == release(npu):
        return OK, f"{npu}, as torch {torch}"
    why = f"torch_npu {npu or 'is not installed,'} with torch {torch}"
    return FAIL, why, f"pip install torch_npu=={release(torch)}"


def judge_cann(npu: str, cann: str | None) -> tuple[str, ...]:
    """Compare CANN with torch_npu."""
    if cann is None:
        return WARN, "CANN is not found", "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
    if cann not in CANN_TORCH_NPU:
        return WARN, f"CANN {cann} is not in the table", "compare with the notes of torch_npu"
    fitting = CANN_TORCH_NPU[cann]
    if npu not in fitting:
        return WARN, f"CANN {cann} is listed with torch_npu {', '.join(fitting)}, not {npu}", "install one of those"
    return OK, f"CANN {cann} with torch_npu {npu}"
