"""The machine as its tools and its torch describe it: platform, driver, toolkit, torch build, dtypes, operators."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Output, Situation, run_tool
from scripts.doctor.versions import check_dtk, check_dtk_torch, check_packages, check_torch_npu

NAMES = {"nvidia": "NVIDIA", "dcu": "Hygon DCU", "npu": "Ascend NPU"}
TOOLS = {"nvidia": ("nvidia-smi",), "dcu": ("hy-smi", "rocm-smi"), "npu": ("npu-smi",)}
QUERY = {
    "nvidia-smi": ("--query-gpu=index,name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits"),
    "hy-smi": ("--showdriverversion",), "rocm-smi": ("--showdriverversion",), "npu-smi": ("info",),
}  # fmt: skip
BUSY = 0.1  # of a card's memory, taken by others
TITLES = {"cuda": "NVIDIA", "dcu": "Hygon DCU", "npu": "Ascend NPU", "cpu": "no accelerator"}


@dataclass(frozen=True)
class Driver:
    """What a vendor's tool says: the driver's version, and the cards (0 where the tool was not asked for them)."""

    tool: str
    version: str | None
    cards: int


# --- drivers ----------------------------------------------------------------------------------------------------------


def ask_tools(environ: Mapping[str, str], seconds: float) -> dict[str, tuple[str, Output]]:
    """vendor -> the first of its tools that is installed and what it said; vendors without one are left out."""
    found = {}
    for vendor, tools in TOOLS.items():
        for tool in tools:
            output = run_tool([tool, *QUERY[tool]], seconds, environ)
            if output is not None:
                found[vendor] = (tool, output)
                break
    return found


def read_tool(tool: str, output: Output) -> Driver | None:
    """The driver in a tool's answer; None if it failed or says nothing that can be read."""
    if output.code != 0:
        return None
    if tool == "nvidia-smi":
        rows = [[cell.strip() for cell in line.split(",")] for line in output.text.splitlines() if line.count(",") >= 4]
        return Driver(tool, rows[0][2], len(rows)) if rows else None
    if tool == "npu-smi":
        version = re.search(r"Version:\s*([\w.]+)", output.text)
        return (
            Driver(tool, version[1], len(re.findall(r"^\|\s*\d+\s+\w*910\w*\s", output.text, re.M)))
            if version
            else None
        )
    version = re.search(r"driver version\s*:?\s*([\d.]+\d)", output.text, re.I)
    return Driver(tool, version[1], 0) if version else None


def check_drivers(situation: Situation, tools: dict[str, tuple[str, Output]]) -> list[Check]:
    """Each vendor's tool; one that does not answer is a failure only where the run is meant for that vendor."""
    checks = []
    for vendor, names in TOOLS.items():
        ours = situation.vendor == vendor
        if vendor not in tools:
            where = f"{' or '.join(names)} is not installed"
            todo = "install the driver; in a container mount the host's tools" if ours else ""
            checks.append(Check("platform", f"{NAMES[vendor]} driver", WARN if ours else SKIP, where, todo))
            continue
        tool, output = tools[vendor]
        driver = read_tool(tool, output)
        if driver is None:
            why = f"{tool}: {output.reason}" if output.code != 0 else f"{tool} says nothing that could be read"
            todo = f"run {tool} by hand; load or reinstall the driver, and show the devices to the container"
            checks.append(Check("platform", f"{NAMES[vendor]} driver", FAIL if ours else WARN, why, todo))
            continue
        cards = f", {driver.cards} card{'s' if driver.cards != 1 else ''}" if driver.cards else ""
        checks.append(Check("platform", f"{NAMES[vendor]} driver", OK, f"{driver.version} by {tool}{cards}"))
    return checks


# --- platform ---------------------------------------------------------------------------------------------------------


def check_platform(situation: Situation) -> list[Check]:
    """Which platform torch finds and why, and whether it is the one that is asked for."""
    facts = situation.facts
    if "platform" not in facts:
        return [Check("platform", "detected", FAIL, f"torch cannot be asked: {facts.get('error', 'no answer')}",
                      "pip install -r requirements.txt, or the vendor's torch, into this Python")]  # fmt: skip
    found, build = facts["platform"], facts.get("build", {})
    because = {
        "cpu": "torch sees no card" if situation.environ.get("DS_ACCELERATOR") != "cpu" else "DS_ACCELERATOR=cpu",
        "npu": f"torch_npu sees {len(facts.get('cards', []))} cards",
        "dcu": f"torch is a HIP build ({build.get('hip')}) and sees {len(facts.get('cards', []))} cards",
        "cuda": f"torch is a CUDA build ({build.get('cuda')}) and sees {len(facts.get('cards', []))} cards",
    }[found]
    if facts.get("refused") and situation.environ.get("DS_ACCELERATOR"):
        todo = f"torch finds {found} ({because}): unset DS_ACCELERATOR, or choose another recipe or --platform"
        return [Check("platform", "detected", FAIL, facts["refused"], todo)]
    if situation.platform and situation.platform.accelerator != facts["torch_device"]:
        wanted = situation.platform
        return [Check("platform", "detected", FAIL, f"{found} ({because}), but platform {wanted.name} needs {wanted.accelerator}",
                      "check driver and torch build, or choose another recipe or --platform")]  # fmt: skip
    checks = [Check("platform", "detected", OK, f"{found}: {TITLES[found]}, {because}")]
    if situation.vendor != {"cuda": "nvidia"}.get(found, found):
        why = f"{found}, {because}, but platform {situation.platform.name} is {situation.platform.title}"
        checks = [
            Check("platform", "detected", WARN, why, "choose the recipe for this machine: dtypes and variables differ")
        ]
    cards, wanted_cards = facts.get("cards", []), situation.options.processes if situation.options else None
    if found != "cpu" and wanted_cards and wanted_cards > len(cards) and not situation.several:
        checks.append(Check("platform", "cards", FAIL, f"the run wants {wanted_cards}, torch sees {len(cards)}",
                            f"--num_gpus {len(cards)}, or show more of them"))  # fmt: skip
    if error := facts.get("cards_error"):
        checks.append(Check("platform", "cards", FAIL, f"they do not answer: {error}", "check the driver"))
    for index, card in enumerate(cards):
        total, free = card["total"], card["free"]
        size = f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free" if total else ""
        busy = bool(total) and free < (1 - BUSY) * total
        todo = "another process uses it: end that one, or choose other cards" if busy else ""
        checks.append(
            Check("platform", f"card {index}", WARN if busy else OK, f"{card['name']} ({card['chip']}){size}", todo)
        )
    return checks


def check_torch_build(situation: Situation, tools: dict[str, tuple[str, Output]]) -> Check:
    """Whether torch was built for the cards whose driver answers."""
    facts, versions = situation.facts, situation.facts.get("versions", {})
    if "build" not in facts:
        return Check("versions", "torch build", SKIP, "torch gave no answer")
    build, torch = facts["build"], versions.get("torch")
    kind = f"HIP {build['hip']}" if build["hip"] else f"CUDA {build['cuda']}" if build["cuda"] else "CPU"
    drivers = {vendor: read_tool(*said) for vendor, said in tools.items()}
    on_cpu = situation.platform is not None or situation.environ.get("DS_ACCELERATOR") == "cpu"
    state = WARN if situation.accelerator == "cpu" and on_cpu else FAIL
    if drivers.get("nvidia") and not build["cuda"]:
        return Check("versions", "torch build", state, f"torch {torch} is a {kind} build beside NVIDIA cards",
                     "install the CUDA build of torch")  # fmt: skip
    if drivers.get("dcu") and not build["hip"]:
        todo = "install the vendor's wheel again with --no-deps; a resolver has put another torch in its place"
        return Check("versions", "torch build", state, f"torch {torch} is a {kind} build beside DCUs", todo)
    if drivers.get("npu") and not versions.get("torch_npu"):
        return Check(
            "versions", "torch build", state, "NPUs, but no torch_npu", f"install the torch_npu of torch {torch}"
        )
    if versions.get("torch_npu") and facts.get("platform") != "npu":
        why = f"torch_npu {versions['torch_npu']} is installed, but no NPU answers"
        return Check(
            "versions",
            "torch build",
            WARN,
            why,
            "the launchers set DS_ACCELERATOR; with DeepSpeed alone set it yourself",
        )
    return Check("versions", "torch build", OK, f"torch {torch}, {kind} build")


# --- toolkit ----------------------------------------------------------------------------------------------------------


def toolkit_version(vendor: str, environ: Mapping[str, str]) -> str | None:
    """The version that DTK or CANN leaves in a file of its folder; None where there is none."""
    if vendor == "dcu":
        homes = [environ.get(name) for name in ("ROCM_HOME", "ROCM_PATH", "DTKROOT")] + ["/opt/dtk"]
        patterns, wanted = (".info/version",), r"(\d\d\.\d\d[\w.]*)"
    else:
        homes = [environ.get(name) for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")]
        homes += ["/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/nnae/latest"]
        patterns = ("*-linux/ascend_*_install.info", "version.cfg", "compiler/version.info", "opp/version.info")
        wanted = r"version\s*=\s*\[?(?:[\d.]*:)?([1-9][\w.]*)"
    for home in filter(None, homes):
        for pattern in patterns:
            for path in sorted(Path(home).glob(pattern)):
                if match := re.search(wanted, path.read_text(encoding="utf-8", errors="replace"), re.I):
                    return match[1]
    return None


def check_toolkit(situation: Situation, tools: dict[str, tuple[str, Output]]) -> list[Check]:
    """CUDA toolkit, DTK or CANN of the platform, against driver and torch."""
    versions, vendor = situation.facts.get("versions", {}), situation.vendor
    if vendor == "cpu":
        return [Check("platform", "toolkit", SKIP, "a CPU needs none")]
    said = read_tool(*tools[vendor]) if vendor in tools else None
    if vendor == "dcu":
        toolkit = toolkit_version(vendor, situation.environ)
        checks = [check_dtk(said.version if said else None, toolkit)]
        return [*checks, *([check_dtk_torch(versions["torch"], toolkit)] if versions.get("torch") else [])]
    if vendor == "npu":
        return check_torch_npu(versions, toolkit_version(vendor, situation.environ))
    return [check_nvcc(situation)]


def check_nvcc(situation: Situation) -> Check:
    """The CUDA toolkit, which only DeepSpeed's own operators need, against torch's CUDA."""
    home = situation.environ.get("CUDA_HOME") or situation.environ.get("CUDA_PATH")
    output = run_tool([f"{home}/bin/nvcc" if home else "nvcc", "--version"], situation.seconds, situation.environ)
    built = situation.facts.get("build", {}).get("cuda")
    if output is None:
        where = f"no nvcc in {home}/bin" if home else "nvcc is not on PATH"
        todo = (
            "needed by --optimizer fused_adam and cpu_adam only: install the toolkit of torch's CUDA, and set CUDA_HOME"
        )
        return Check("platform", "CUDA toolkit", WARN, where, todo)
    match = re.search(r"release (\d+)\.(\d+)", output.text)
    if match is None:
        return Check("platform", "CUDA toolkit", WARN, f"nvcc: {output.reason}", "reinstall the toolkit")
    if built and match[1] != built.split(".")[0]:
        why = f"nvcc {match[1]}.{match[2]}, but torch was built with CUDA {built}: DeepSpeed's operators do not build"
        return Check(
            "platform",
            "CUDA toolkit",
            WARN,
            why,
            f"put a toolkit {built.split('.')[0]}.x first on PATH, and set CUDA_HOME",
        )
    return Check("platform", "CUDA toolkit", OK, f"nvcc {match[1]}.{match[2]}, torch's CUDA {built}")


# --- dtypes and operators ---------------------------------------------------------------------------------------------


def check_dtype(situation: Situation) -> list[Check]:
    """What the chip can train in, by table and by trial, against what the recipe asks for."""
    found = situation.facts.get("dtypes")
    if found is None:
        why = situation.facts.get("dtypes_error", "torch gave no answer")
        return [
            Check("dtype", "probe", FAIL if "dtypes_error" in situation.facts else SKIP, why, "see the platform above")
        ]
    checks, able = [], [name for name in found["table"] if name == "fp32" or found["works"][name]]
    broken = [name for name in found["table"] if name not in able]
    why = f"{found['chip']} trains in {', '.join(able)}"
    if broken:
        why += f"; {', '.join(broken)} is in the table, but a product in it came out wrong"
    checks.append(Check("dtype", "probe", WARN if broken else OK, why, "update driver and torch" if broken else ""))
    sections = {name: values.get("dtype", "auto") for name, values in situation.recipe.items() if name != "launch"}
    if wrong := [f"{name}: {dtype}" for name, dtype in sections.items() if dtype not in (*able, "auto")]:
        checks.append(
            Check("dtype", "recipe", FAIL, f"{', '.join(wrong)} on {found['chip']}", f"--dtype {able[0]}, or auto")
        )
    elif sections:
        checks.append(Check("dtype", "recipe", OK, ", ".join(f"{name}: {dtype}" for name, dtype in sections.items())))
    if found.get("first_ascend"):
        why = f"{found['chip']} is of the FIRST Ascend 910 generation: it has no infinity, overflow goes unseen by DeepSpeed"
        todo = "in fp16 watch loss_scale: here the chip's overflow flag decides; if every step is skipped, see docs/en/launching.md"
        checks.append(Check("dtype", "overflow", WARN, why, todo))
    checks.append(Check("dtype", "attention", OK, f"--attn_implementation auto is {found['attention']} here"))
    return checks


def check_compiler(situation: Situation, plans: dict[str, dict]) -> list[Check]:
    """What DeepSpeed needs to build an operator, and which optimizer the run will have."""
    environ = situation.environ
    wanted = {
        "cpu_adam" if one["optimizer"] == "auto" and one["offload"] and situation.accelerator != "cpu" else
        "adamw" if one["optimizer"] == "auto" else one["optimizer"] for one in plans.values() if "optimizer" in one
    } or {"adamw"}  # fmt: skip
    builds = wanted & {"cpu_adam", "fused_adam"}
    # On an NPU fused_adam is Python around torch's own operator (DeepSpeed, op_builder/npu/fused_adam.py).
    builds -= {"fused_adam"} if situation.accelerator == "npu" else set()
    home = {"nvidia": ("CUDA_HOME", "/usr/local/cuda"), "dcu": ("ROCM_HOME", "/opt/dtk")}.get(situation.vendor)
    missing = []
    if run_tool([environ.get("CXX", "c++"), "--version"], situation.seconds, environ) is None:
        missing.append("a C++ compiler (g++ 9 or newer)")
    if run_tool(["ninja", "--version"], situation.seconds, environ) is None and not situation.facts.get(
        "versions", {}
    ).get("ninja"):
        missing.append("ninja")
    if (
        home
        and not any(environ.get(name) for name in (home[0], home[0].replace("HOME", "PATH")))
        and not Path(home[1]).is_dir()
    ):
        missing.append(home[0])
    fused = situation.facts.get("ops", {}).get("fused_adamw")
    torch_adamw = "torch's fused AdamW" if fused else "torch's plain AdamW"
    if not missing:
        checks = [
            Check("operators", "builds", OK, "compiler and ninja are here" + (f", {home[0]} too" if home else ""))
        ]
    else:
        why = f"missing: {', '.join(missing)}; DeepSpeed's own optimizers cannot be built"
        todo = "install them" if builds else "nothing, unless you give --optimizer cpu_adam or fused_adam"
        checks = [Check("operators", "builds", WARN if builds else OK, why, todo)]
    used = [f"DeepSpeed's {name}" if not missing or name not in builds else f"{torch_adamw} in place of {name}"
            for name in sorted(wanted - {"adamw"})]  # fmt: skip
    used += [torch_adamw] if "adamw" in wanted else []
    todo = (
        f"python -m scripts.doctor --build {sorted(builds)[0]} builds it now, for later runs too"
        if builds and not missing
        else ""
    )
    checks.append(Check("operators", "optimizer", OK, " and ".join(used), todo))
    return checks


def check_environment_of_vendor(situation: Situation) -> Check:
    """Whether the vendor's env file was sourced: its libraries are not found otherwise."""
    places = {"dcu": ("ROCM_PATH", "ROCM_HOME", "/opt/dtk/env.sh"),
              "npu": ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/set_env.sh")}  # fmt: skip
    if situation.vendor not in places:
        return Check("platform", "vendor environment", SKIP, "this platform has no file to source")
    *names, path = places[situation.vendor]
    if any(situation.environ.get(name) for name in names):
        return Check(
            "platform",
            "vendor environment",
            OK,
            f"{next(name for name in names if situation.environ.get(name))} is set",
        )
    todo = f"source {path}; on other nodes --venv_script {path}, since shells that ssh opens do not read it"
    return Check("platform", "vendor environment", WARN, f"neither of {', '.join(names)} is set", todo)


def software(situation: Situation, plans: dict[str, dict]) -> list[Check]:
    """All of the above."""
    tools = ask_tools(situation.environ, situation.seconds)
    return [
        *check_platform(situation), *check_drivers(situation, tools), *check_toolkit(situation, tools),
        check_environment_of_vendor(situation), *check_packages(situation), check_torch_build(situation, tools),
        *check_dtype(situation), *check_compiler(situation, plans),
    ]  # fmt: skip
