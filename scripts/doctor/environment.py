"""The variables of the shell: misspelt ones, visible devices, interfaces, and what other nodes would miss."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from errors import UserError
from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Situation
from scripts.launch.commands import FORWARDED, NOT_FORWARDED, build_environment
from scripts.launch.platforms import variable_reasons

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
INTERFACES = {"nccl": ("NCCL_SOCKET_IFNAME",), "hccl": ("HCCL_SOCKET_IFNAME",), "gloo": ()}
# Names that programs read, beside those of configs/platforms.yaml. A name that differs from one of them by one letter is
# taken for a misspelling, so neighbours that exist must all be here.
KNOWN = {
    *VISIBLE,
    "ASCEND_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_PATH",
    "CUDA_LAUNCH_BLOCKING", "ROCM_HOME", "ROCM_PATH", "HIP_LAUNCH_BLOCKING", "PYTORCH_ROCM_ARCH",
    "TORCH_CUDA_ARCH_LIST", "TORCH_EXTENSIONS_DIR", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF",
    "PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE",
    "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_IB_TIMEOUT",
    "NCCL_IB_GID_INDEX", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_NET_GDR_LEVEL",
    "NCCL_NET_GDR_READ", "NCCL_BUFFSIZE", "NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_HCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT", "GLOO_SOCKET_IFNAME",
    "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "HCCL_IF_IP", "HCCL_IF_BASE_PORT", "HCCL_CONNECT_TIMEOUT",
    "HCCL_EXEC_TIMEOUT", "HCCL_EVENT_TIMEOUT", "HCCL_BUFFSIZE", "HCCL_WHITELIST_DISABLE", "HCCL_DETERMINISTIC",
    "ASCEND_LAUNCH_BLOCKING", "ASCEND_GLOBAL_LOG_LEVEL", "ASCEND_SLOG_PRINT_TO_STDOUT", "ASCEND_TOOLKIT_HOME",
    "ASCEND_HOME_PATH", "TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF", "DS_ACCELERATOR", "DS_ENV_FILE",
    "DS_SKIP_CUDA_CHECK", "DEEPSPEED_TIMEOUT", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK",
    "LOCAL_WORLD_SIZE", "NODE_RANK", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "HF_ENDPOINT",
    "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE",
    "TOKENIZERS_PARALLELISM", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "SANBU_CACHE", "SANBU_OVERFLOW_FLAG",
}  # fmt: skip
OTHER_SPELLINGS = {"MASTER_ADDRESS": "MASTER_ADDR", "HF_OFFLINE": "HF_HUB_OFFLINE", "NUM_GPU": "NUM_GPUS"}


# --- spelling ---------------------------------------------------------------------------------------------------------


def one_edit_apart(left: str, right: str) -> bool:
    """Whether one letter added, left out or changed, or two neighbours exchanged, makes one of the other."""
    if len(left) > len(right):
        left, right = right, left
    start = next((index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(left))
    rest_left, rest_right = left[start:], right[start:]
    if len(left) != len(right):
        return rest_right[1:] == rest_left
    swapped = rest_left[:2] == rest_right[1::-1] and rest_left[2:] == rest_right[2:]
    return left != right and (rest_left[1:] == rest_right[1:] or swapped)


def meant(name: str, known: Iterable[str]) -> str | None:
    """The known name that this one looks like; None if it is known itself or like none.

    NCCL_X for HCCL_X is no slip: one in the first letter alone does not count. Short names are too like each other.
    """
    names = set(known)
    if name in names or len(name) < 7:
        return None
    if name in OTHER_SPELLINGS:
        return OTHER_SPELLINGS[name]
    if name.upper() in names:
        return name.upper()
    bare = name.replace("_", "")
    for other in sorted(names):
        if bare == other.replace("_", "") or (one_edit_apart(name, other) and name[1:] != other[1:]):
            return other
    return None


def check_spelling(environ: Mapping[str, str]) -> list[Check]:
    """Variables of the shell that nobody reads, because a letter is wrong."""
    known = KNOWN | set(variable_reasons())
    checks = []
    for name in sorted(environ):
        if (name.isupper() or name.upper() in known) and (other := meant(name, known)):
            checks.append(
                Check("environment", "spelling", WARN, f"{name} is set, which nothing reads", f"did you mean {other}?")
            )
    return checks or [Check("environment", "spelling", OK, "no name that looks like a slip")]


# --- visible devices --------------------------------------------------------------------------------------------------


def check_visible(situation: Situation) -> list[Check]:
    """Visible-devices variables: more than one, and values that are not read as they look."""
    environ, checks = situation.environ, []
    here = [name for name in VISIBLE if name in environ]
    relevant = {"nvidia": VISIBLE[:1], "dcu": VISIBLE[:3], "npu": VISIBLE[3:], "cpu": ()}[situation.vendor]
    if len(here) > 1:
        if situation.vendor == "dcu":
            todo = "keep HIP_VISIBLE_DEVICES alone; ROCR_… and HIP_… are applied one after the other"
        else:
            todo = f"keep {relevant[0]} alone" if relevant else "unset those that are not meant"
        checks.append(Check("environment", "visible devices", WARN, f"{' and '.join(here)} are set together", todo))
    for name in here:
        value = environ[name]
        parts = [part.strip() for part in value.split(",")] if value.strip() else []
        if name not in relevant and relevant:
            why, todo = f"{name} is set, but {situation.vendor} reads {relevant[0]}", f"set {relevant[0]}"
            checks.append(Check("environment", "visible devices", WARN, why, todo))
        elif relevant and (not parts or parts[0] == "-1"):
            checks.append(
                Check("environment", "visible devices", WARN, f"{name}={value!r} hides every device", f"unset {name}")
            )
        elif name == "ASCEND_RT_VISIBLE_DEVICES" and not ascending(value):
            why = f"{name}={value}: torch_npu finds 0 devices unless the numbers rise and stand without blanks"
            checks.append(Check("environment", "visible devices", FAIL, why, f"{name}={repaired(value)}"))
        elif relevant and any(not part.isdigit() for part in parts):
            why = f"{name}={value}: DeepSpeed's launcher reads numbers only"
            checks.append(
                Check("environment", "visible devices", FAIL, why, "give the numbers, or use --launcher torchrun")
            )
        elif len(set(parts)) != len(parts):
            checks.append(
                Check("environment", "visible devices", FAIL, f"{name}={value} names a device twice", "name each once")
            )
    if not checks:
        said = ", ".join(f"{name}={environ[name]}" for name in here) or "none is set: all devices"
        checks.append(Check("environment", "visible devices", OK, said))
    return checks


def ascending(value: str) -> bool:
    """Whether the value is plain rising numbers with commas and nothing else (CANN, envref_07_0028)."""
    if not re.fullmatch(r"\d+(,\d+)*", value):
        return False
    numbers = [int(part) for part in value.split(",")]
    return all(left < right for left, right in itertools.pairwise(numbers))


def repaired(value: str) -> str:
    """The numbers in a value, each once, rising."""
    return ",".join(map(str, sorted({int(part) for part in re.findall(r"\d+", value)}))) or "0"


# --- interfaces -------------------------------------------------------------------------------------------------------


def interface_matches(value: str, interfaces: Iterable[str]) -> list[str]:
    """The interfaces that NCCL and HCCL take for a value: prefixes, ``=`` exact names, ``^`` all but those."""
    names = [part.strip() for part in value.lstrip("^").lstrip("=").split(",") if part.strip()]
    exact, without = value.lstrip("^").startswith("="), value.startswith("^")

    def hit(interface: str) -> bool:
        return any(interface == name if exact else interface.startswith(name) for name in names)

    return [one for one in interfaces if hit(one) != without]


def check_interfaces(situation: Situation, interfaces: list[str] | None = None) -> Check:
    """Whether the interfaces that the environment (or the recipe) names exist on this machine."""
    interfaces = [name for _, name in socket.if_nameindex()] if interfaces is None else interfaces
    settings = dict(situation.environ) | (situation.options.env if situation.options else {})
    backend = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}[situation.accelerator]
    wanted = {name: settings[name] for name in (*INTERFACES[backend], "GLOO_SOCKET_IFNAME") if settings.get(name)}
    for name, value in wanted.items():
        # Gloo takes whole names, without signs.
        found = (
            [one for one in interfaces if one in value.split(",")]
            if name[0] == "G"
            else interface_matches(value, interfaces)
        )
        if not found:
            why = f"{name}={value} fits no interface of this machine ({', '.join(interfaces)})"
            return Check("communication", "interface", FAIL, why, f"set {name} to what `ip route get MASTER` shows")
    if not wanted and situation.several:
        name = (*INTERFACES[backend], "GLOO_SOCKET_IFNAME")[0]
        todo = f"if nodes cannot connect, set {name} to what `ip route get MASTER` shows"
        return Check(
            "communication", "interface", OK, f"none is named; {backend} chooses among {', '.join(interfaces)}", todo
        )
    if not wanted:
        return Check("communication", "interface", SKIP, "one machine, and none is named")
    return Check("communication", "interface", OK, ", ".join(f"{name}={value}" for name, value in wanted.items()))


# --- what other nodes are told ----------------------------------------------------------------------------------------


def check_forwarded(situation: Situation) -> list[Check]:
    """What the launcher sends to other nodes, and what of this shell they will miss."""
    if not (situation.options and situation.options.by_ssh):
        why = "one machine" if not situation.several else "each node brings its own environment"
        return [Check("environment", "forwarded", SKIP, why)]
    try:
        told = build_environment(situation.options, situation.environ).forwarded
    except UserError as error:
        return [Check("environment", "forwarded", FAIL, str(error), "correct the value or the line")]
    left = [
        name for name, value in situation.environ.items() if value and name.startswith(FORWARDED) and name not in told
    ]
    secrets = sorted(name for name in left if re.search(r"TOKEN$|SECRET|PASSWORD|API_KEY", name))
    others = sorted(set(left) - set(secrets) - {name for name in left if NOT_FORWARDED.search(name)})
    hidden = sorted(name for name in left if name.endswith("VISIBLE_DEVICES"))
    checks = [
        Check("environment", "forwarded", OK, f"{len(told)} variables go to the other nodes (--dry-run shows them)")
    ]
    if secrets:
        todo = (
            "log in on each node (hf auth login), or download there first; their values would show in the process list"
        )
        checks.append(Check("environment", "forwarded", WARN, f"never sent: {', '.join(secrets)}", todo))
    if others:
        why = f"cannot be sent, because of a sign in their values: {', '.join(others)}"
        checks.append(Check("environment", "forwarded", WARN, why, "set them on each node, or use --launcher torchrun"))
    if hidden:
        todo = "choose devices by the slots in the hostfile, or use --launcher torchrun on each node"
        checks.append(Check("environment", "forwarded", WARN, f"not sent: {', '.join(hidden)}", todo))
    return checks


def check_env_file(situation: Situation) -> list[Check]:
    """Lines of .deepspeed_env that end DeepSpeed's own launcher with a ValueError (ours skips blank ones and comments)."""
    environ = situation.environ
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    checks = []
    for path in dict.fromkeys((Path(environ.get("HOME", "~")).expanduser() / name, Path(name).absolute())):
        if not path.is_file():
            continue
        bad, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#") or "=" not in line:
                bad.append(f"line {number}" + (f" ({line.strip()[:40]})" if line.strip() else " (blank)"))
        wrong = any(line.strip() and not line.lstrip().startswith("#") and "=" not in line for line in lines)
        if bad:
            why = f"{path}, {', '.join(bad)}: DeepSpeed ends with a ValueError at what is not NAME=VALUE"
            checks.append(
                Check(
                    "environment",
                    name,
                    FAIL if wrong and situation.several else WARN,
                    why,
                    "correct or remove these lines",
                )
            )
        else:
            checks.append(Check("environment", name, OK, f"{path}, {len(lines)} variables"))
    return checks or [Check("environment", ".deepspeed_env", SKIP, "there is none; the launchers write their own")]
