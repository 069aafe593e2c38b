"""Which versions go together: what this project supports, and the vendors' tables.

Sources, read and not tried: DTK drivers HYGON-AI/hcu-dcgm: pkg/dcgm/compatibility.go; DTK wheels FlyAIBox/dcu-in-action:
requirements-dtk*.txt and docs/base/02; CANN and torch_npu Ascend/pytorch: COMPATIBILITY.en.md.
"""

from __future__ import annotations

import re

from packaging.version import InvalidVersion, Version

from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Situation
from scripts.launch.platforms import ROOT

# DTK -> the oldest driver that any row of the vendor's table for Z100 and Z100L names with it
DTK_DRIVER = {
    "21.04": "5.6.25", "21.10": "5.6.25", "22.04": "5.6.25", "22.10": "5.11.40", "23.04": "5.11.40", "23.10": "5.16.29",
    "24.04": "6.2.26", "25.04": "6.2.26", "26.04": "6.3.30",
}  # fmt: skip
DTK_TORCH = {"24.04": ("2.1.0", "2.3.0"), "25.04": ("2.4.1",), "26.04": ("2.9.0",)}
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


def number(text: str | None) -> Version:
    """A version that compares; 0 for what is not one."""
    try:
        return Version(text or "0")
    except InvalidVersion:
        return Version(".".join(re.findall(r"\d+", text or "")[:3]) or "0")


def release(text: str | None) -> str:
    """2.4.1 of 2.4.1+das.opt2.dtk2504 and of 2.4.1.post2."""
    return number(text).base_version


def supported() -> dict[str, tuple[str, str]]:
    """Package -> oldest and newest version that pyproject.toml allows; empty where that file is not."""
    path = ROOT / "pyproject.toml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {name: (low, high) for name, low, high in re.findall(r'"([\w-]+)>=([\d.]+),<=([\d.]+)"', text)}


def check_packages(situation: Situation) -> list[Check]:
    """torch, DeepSpeed and transformers against the range this project supports, and whether they import together."""
    versions, broken = situation.facts.get("versions", {}), situation.facts.get("import", {})
    checks, ranges = [], supported()
    for name in ("torch", "deepspeed", "transformers"):
        found = versions.get(name)
        if not situation.facts:
            checks.append(Check("versions", name, SKIP, "the probe of torch gave no answer"))
            continue
        if found is None:
            checks.append(Check("versions", name, FAIL, "not installed", "pip install -r requirements.txt"))
            continue
        low, high = ranges.get(name, ("0", found))
        if broken.get(name):
            checks.append(
                Check("versions", name, FAIL, f"{found} does not import: {broken[name]}", repair(name, versions))
            )
        elif number(found) < number(low):
            checks.append(Check("versions", name, FAIL, f"{found} is older than {low}", f"install {low} to {high}"))
        elif number(release(found)) > number(high):
            todo = f"if something fails, install {high}"
            checks.append(
                Check("versions", name, WARN, f"{found} is newer than {high}, the newest that was tested", todo)
            )
        elif trouble := conflict(name, versions):
            checks.append(Check("versions", name, WARN, *trouble))
        else:
            checks.append(Check("versions", name, OK, f"{found}, within {low} to {high}"))
    return checks


def conflict(name: str, versions: dict[str, str | None]) -> tuple[str, str] | None:
    """What is known not to work together though each is in its range: why, and what to do."""
    torch, deepspeed = versions.get("torch"), versions.get("deepspeed")
    if (
        name == "deepspeed"
        and number(release(deepspeed)) < number("0.14.4")
        and number(release(torch)) >= number("2.4")
    ):
        if "+" in str(deepspeed):  # a vendor's build, which brings its own repair
            return None
        return (
            f"{deepspeed} from the package index does not import with torch {torch}: it wants a function that 2.4 removed",
            "install deepspeed 0.14.4 or newer, or the vendor's build of 0.14.2",
        )
    if (
        name == "transformers"
        and number(release(versions.get(name))) >= number("5")
        and number(release(torch)) < number("2.4")
    ):
        return f"transformers {versions[name]} wants torch 2.4 or newer, here is {torch}", "install torch 2.4 or newer"
    return None


def repair(name: str, versions: dict[str, str | None]) -> str:
    """What to do about a library that does not import."""
    known = conflict(name, versions)
    return known[1] if known else "install the versions of requirements.txt, or the vendor's wheels for this machine"


def check_dtk(driver: str | None, toolkit: str | None) -> Check:
    """DTK against the driver under it."""
    if toolkit is None:
        return Check(
            "platform",
            "DTK",
            WARN,
            "no DTK is found in ROCM_PATH or /opt/dtk",
            "install it, then source /opt/dtk/env.sh",
        )
    short = ".".join(toolkit.split(".")[:2])
    needed = DTK_DRIVER.get(short)
    if driver is None or needed is None:
        state = (
            f"DTK {toolkit}; the tables do not say which driver it needs"
            if driver
            else f"DTK {toolkit}, driver unknown"
        )
        return Check("platform", "DTK", WARN, state, "compare with the vendor's release notes")
    if number(driver) < number(needed):
        return Check(
            "platform",
            "DTK",
            FAIL,
            f"DTK {toolkit} needs driver {needed}, this is {driver}",
            "update the driver, or take an older DTK",
        )
    return Check("platform", "DTK", OK, f"DTK {toolkit} on driver {driver} ({needed} or newer)")


def check_dtk_torch(torch: str, toolkit: str | None) -> Check:
    """The vendor's torch against the DTK that is installed."""
    label = re.search(r"dtk(\d\d)(\d\d)", torch)
    if label is None:
        todo = "install the wheels of the DAS list for your DTK; other ROCm builds do not know these chips"
        return Check("versions", "torch for DTK", WARN, f"torch {torch} does not name a DTK", todo)
    made_for = f"{label[1]}.{label[2]}"
    if toolkit and not toolkit.startswith(made_for):
        return Check("versions", "torch for DTK", FAIL, f"torch {torch} was built for DTK {made_for}, installed is {toolkit}",
                     f"install the torch of DTK {toolkit}, or DTK {made_for}")  # fmt: skip
    known = DTK_TORCH.get(made_for, ())
    if known and release(torch) not in known:
        return Check("versions", "torch for DTK", WARN, f"torch {torch}; the tables list {' and '.join(known)} for DTK {made_for}",
                     "compare with the vendor's list")  # fmt: skip
    return Check("versions", "torch for DTK", OK, f"torch {torch} for DTK {made_for}")


def check_torch_npu(versions: dict[str, str | None], cann: str | None) -> list[Check]:
    """torch_npu against torch and against CANN."""
    torch, npu = versions.get("torch"), versions.get("torch_npu")
    if npu is None:
        todo = f"pip install torch_npu=={release(torch)}" if torch else "install torch (CPU build) and torch_npu"
        return [Check("versions", "torch_npu", FAIL, "not installed, and the platform is Ascend", todo)]
    checks = []
    if release(torch) != release(npu):
        checks.append(Check("versions", "torch_npu", FAIL, f"torch_npu {npu} with torch {torch}: the numbers must be the same",
                            f"pip install torch_npu=={release(torch)}"))  # fmt: skip
    else:
        checks.append(Check("versions", "torch_npu", OK, f"{npu}, as torch {torch}"))
    if cann is None:
        checks.append(
            Check("versions", "CANN", WARN, "CANN is not found", "source /usr/local/Ascend/ascend-toolkit/set_env.sh")
        )
    elif cann not in CANN_TORCH_NPU:
        checks.append(
            Check("versions", "CANN", WARN, f"CANN {cann} is not in the table", "compare with the notes of torch_npu")
        )
    elif npu not in CANN_TORCH_NPU[cann]:
        fitting = ", ".join(CANN_TORCH_NPU[cann])
        checks.append(
            Check(
                "versions",
                "CANN",
                WARN,
                f"CANN {cann} is listed with torch_npu {fitting}, not {npu}",
                "install one of those",
            )
        )
    else:
        checks.append(Check("versions", "CANN", OK, f"CANN {cann} with torch_npu {npu}"))
    return checks
