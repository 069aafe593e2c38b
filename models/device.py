"""Devices: which platform this is, what it can compute, and the few calls that differ between platforms.

The only file that names ``torch.cuda`` (a test sees to it). Platforms: cuda (NVIDIA), dcu (Hygon; a HIP build of torch,
so it answers to the cuda names), npu (Ascend, torch_npu), cpu.
"""

import importlib.util
import logging
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import psutil
import torch

from errors import UserError

logger = logging.getLogger("sanbu")


@dataclass(frozen=True)
class Platform:
    """A kind of machine: our name, torch's device type, the backend of its process groups."""

    name: str  # cuda | dcu | npu | cpu
    torch_device: str  # cuda | npu | cpu
    backend: str  # nccl | hccl | gloo


PLATFORMS = {
    "cuda": Platform("cuda", "cuda", "nccl"),
    "dcu": Platform("dcu", "cuda", "nccl"),  # the library behind the name is RCCL
    "npu": Platform("npu", "npu", "hccl"),
    "cpu": Platform("cpu", "cpu", "gloo"),
}
# Why transformers' eager attention is taken where sdpa would be.
SDPA_TROUBLE = {
    "dcu": "the vendor's sdpa may call a flash library that does not serve every chip",
    "npu": "not every chip generation serves sdpa",
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def detect_platform() -> Platform:
    """Find the platform and say it to DeepSpeed through DS_ACCELERATOR, whose own detection takes an importable
    torch_npu for an NPU.

    DS_ACCELERATOR, when set (cuda, dcu, npu, cpu), decides. UserError if the device it names does not answer.
    """
    wanted = os.environ.get("DS_ACCELERATOR", "").lower()
    if wanted and wanted not in PLATFORMS:
        raise UserError(
            f"DS_ACCELERATOR={wanted} is not supported; set it to one of {', '.join(PLATFORMS)}, or leave it unset."
        )
    hip, name = torch.version.hip is not None, "cpu"
    if wanted in ("", "npu") and not hip and _npu_answers():
        name = "npu"
    elif wanted in ("", "cuda", "dcu") and _cuda_answers():
        name = "dcu" if hip else "cuda"
    elif wanted not in ("", "cpu"):
        raise UserError(
            f"DS_ACCELERATOR={wanted}, but torch {torch.__version__} finds no such device; check the driver and the "
            "visible devices, install the torch build for it, or set DS_ACCELERATOR=cpu."
        )
    platform = PLATFORMS[name]
    os.environ["DS_ACCELERATOR"] = platform.torch_device
    return platform


def _cuda_answers() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() > 0


def _npu_answers() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        import torch_npu  # noqa: F401  (gives torch its npu module)
    except (ImportError, OSError, RuntimeError) as error:  # installed in an image whose machine has no driver
        logger.warning("torch_npu is installed but does not load (%s); looking for other devices.", error)
        return False
    return torch.npu.device_count() > 0


def _backend_module() -> ModuleType | None:
    """Return torch.cuda, torch.npu, or None on a CPU."""
    name = _current().torch_device
    return None if name == "cpu" else getattr(torch, name)


@lru_cache(maxsize=1)
def _current() -> Platform:
    return detect_platform()


def device_count() -> int:
    """Return the number of cards that this process may use; 0 on a CPU."""
    module = _backend_module()
    return 0 if module is None else module.device_count()


def has_accelerator() -> bool:
    """Return True where there is a card beside the CPU."""
    return _current().torch_device != "cpu"


def set_device(platform: Platform, local_rank: int) -> torch.device:
    """Make card ``local_rank`` of this node the current one and return it; on a CPU all processes share "cpu"."""
    if platform.torch_device == "cpu":
        return torch.device("cpu")
    _take_card(platform, local_rank)
    return torch.device(platform.torch_device, local_rank)


def _take_card(platform: Platform, local_rank: int) -> None:
    module = getattr(torch, platform.torch_device)
    count = module.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of this node has no card: {count} visible; start as many processes as cards "
            "(deepspeed --num_gpus), or show more, by CUDA_VISIBLE_DEVICES, HIP_… or ASCEND_RT_VISIBLE_DEVICES."
        )
    module.set_device(local_rank)
    if platform.name == "npu":
        # Before the first operator: each new shape would be compiled for minutes, and embedding_dense_grad fails for some.
        module.set_compile_mode(jit_compile=False)


def torch_build() -> dict[str, str | None]:
    """Return the toolkit that this torch was built for: cuda, hip; None for those that it was not."""
    return {"cuda": torch.version.cuda, "hip": torch.version.hip}


def cards() -> list[dict[str, object]]:
    """Return the cards that this process sees: name, chip, total and free memory in bytes (None where nobody can tell)."""
    platform, module = _current(), _backend_module()
    listed = []
    for index in range(device_count()):
        free, total = module.mem_get_info(index) if hasattr(module, "mem_get_info") else (None, None)
        name = module.get_device_name(index)
        listed.append({"name": name, "chip": chip_name(platform, index), "total": total, "free": free})
    return listed


# --- dtypes -----------------------------------------------------------------------------------------------------------


def chip_name(platform: Platform, index: int = 0) -> str:
    """Return the chip as the tables name it: sm80, gfx906, Ascend910B1, cpu."""
    if platform.name == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        return f"sm{major}{minor}"
    if platform.name == "dcu":
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    if platform.name == "npu":
        return torch.npu.get_device_name(index)
    return "cpu"


def chip_dtypes(chip: str) -> tuple[str, ...]:
    """Return the dtypes a chip can train in, the best first.

    From a table, because torch.cuda.is_bf16_supported() says True on every HIP build and, by emulation, on old NVIDIA
    cards.
    """
    if chip == "cpu":
        return ("fp32", "bf16")
    if chip.startswith("sm"):
        capability = int(chip[2:])
        if capability >= 80:
            return ("bf16", "fp16", "fp32")
        return ("fp16", "fp32") if capability >= 70 else ("fp32",)
    if chip.startswith("gfx"):
        # gfx906 (Z100, Z100L) and gfx926 (K100) have no bf16 units; gfx928 (K100_AI), gfx936 (BW) and AMD's gfx90a,
        # gfx94x, gfx95x do.
        native = chip in ("gfx928", "gfx936", "gfx90a") or chip.startswith(("gfx94", "gfx95"))
        return ("bf16", "fp16", "fp32") if native else ("fp16", "fp32")
    if chip.startswith("Ascend910"):
        return ("fp16", "fp32") if is_first_ascend(chip) else ("bf16", "fp16", "fp32")
    return ("fp16", "fp32")


def is_first_ascend(chip: str) -> bool:
    """910A, ProA, PremiumA, ProB, and 910B without a number, are the first generation; 910B1… and 910_93… (A3) are not."""
    return chip.startswith("Ascend910") and not re.match(r"Ascend910(B\d|_93)", chip)


def resolve_dtype(name: str, platform: Platform) -> torch.dtype:
    """--dtype fp32 | fp16 | bf16 | auto -> torch.dtype. UserError if this device cannot train in it."""
    if name not in (*DTYPES, "auto"):
        raise UserError(f"--dtype {name} is unknown; choose fp32, fp16, bf16 or auto.")
    index = int(os.environ.get("LOCAL_RANK", "0"))  # one's own card: a probe on card 0 would cost it memory for every process
    if platform.name == "npu":
        _take_card(platform, index)  # and its compile mode, which the probe's operators must find
    chip = chip_name(platform, index)
    able = chip_dtypes(chip)
    if name == "auto":
        name = next(dtype for dtype in able if dtype == "fp32" or probe_dtype(DTYPES[dtype], platform, index))
    elif name not in able or (name != "fp32" and not probe_dtype(DTYPES[name], platform, index)):
        raise UserError(
            f"--dtype {name}: this device ({platform.name}, {chip}) cannot train in it; use {' or '.join(able)}."
        )
    return DTYPES[name]


def probe_dtype(dtype: torch.dtype, platform: Platform, index: int = 0) -> bool:
    """Multiply two small matrices in the dtype, forward and backward, and compare with float32: what the table says
    must also work.
    """
    device = torch.device(platform.torch_device, index) if platform.torch_device != "cpu" else torch.device("cpu")
    values = torch.linspace(-1, 1, 256, device=device).view(16, 16)
    try:
        exact, rounded = values.clone().requires_grad_(), values.to(dtype).requires_grad_()
        (exact @ exact.T).square().mean().backward()
        (rounded @ rounded.T).float().square().mean().backward()
    except (RuntimeError, NotImplementedError):
        return False
    return bool(torch.allclose(exact.grad, rounded.grad.float(), rtol=0.05, atol=0.05 * float(exact.grad.abs().max())))


def attention_implementation(choice: str, platform: Platform) -> str:
    """--attention auto | eager | sdpa | flash_attention_2 -> the name transformers uses. auto: eager on dcu and on the
    NPU, else sdpa. UserError for what the device or the installation does not have.
    """
    choices = ("auto", "eager", "sdpa", "flash_attention_2")
    if choice not in choices:
        raise UserError(f"attention {choice} is unknown; choose {', '.join(choices)}.")
    if choice == "auto":
        choice = "eager" if platform.name in SDPA_TROUBLE else "sdpa"
        if choice == "eager":
            logger.info("Attention: eager, because %s.", SDPA_TROUBLE[platform.name])
    elif choice == "flash_attention_2" or (choice == "sdpa" and platform.name == "dcu"):
        chip = chip_name(platform, int(os.environ.get("LOCAL_RANK", "0")))
        has_kernels = "bf16" in chip_dtypes(chip)
        if choice == "sdpa" and not has_kernels:
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            logger.info("Attention: sdpa in plain operators, because its flash kernels do not serve this chip.")
        elif choice == "flash_attention_2" and not has_kernels:
            raise UserError(f"attention {choice} has no kernels for this device ({platform.name}, {chip}); use auto.")
        elif choice == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise UserError(f"attention {choice} needs the package flash_attn, which is not installed; use sdpa.")
    return choice


# --- overflow on chips without infinities -------------------------------------------------------------------------------


def saturates() -> bool:
    """Return True on an NPU that knows no infinity: where others overflow it gives the largest number, and 0 for NaN.

    The first Ascend 910 generation (910A); INF_NAN_MODE_ENABLE has no effect there. DeepSpeed's search for infinities in
    the gradients finds none then, and the loss scale only rises. SANBU_OVERFLOW_FLAG=0 answers False.
    """
    if _current().name != "npu" or os.environ.get("SANBU_OVERFLOW_FLAG") == "0":
        return False
    asked = getattr(torch.npu.utils, "is_support_inf_nan", None)  # not in the oldest torch_npu
    return not asked() if asked else is_first_ascend(torch.npu.get_device_name(torch.npu.current_device()))


def clear_overflow_flag() -> None:
    """Reset the chip's note that an operator overflowed. Only where saturates()."""
    torch.npu.clear_npu_overflow_flag()


def overflow_flag() -> bool:
    """Return True if an operator has overflowed on this card since clear_overflow_flag(). Only where saturates()."""
    return bool(torch.npu.get_npu_overflow_flag())


# --- memory, streams, random numbers of the current device --------------------------------------------------------------


def peak_memory_gb() -> float:
    """Return the most memory so far, GB: of the card since reset_peak_memory(), on a CPU of the process since it started
    (resident set).
    """
    module = _backend_module()
    if module is not None:
        return module.max_memory_allocated() / 1e9
    import resource  # not on Windows, which DeepSpeed does not run on either

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak_memory() -> None:
    """Start peak_memory_gb() anew; no effect on a CPU, where the system keeps the figure."""
    if (module := _backend_module()) is not None:
        module.reset_peak_memory_stats()


def free_memory() -> int | None:
    """Return the bytes that this process can still take: of its card, torch's own reserve included; on a CPU its share of what the
    host has available, which the processes of a node divide. None where nobody can tell.
    """
    module = _backend_module()
    if module is None:
        names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")  # of torchrun, of deepspeed, and at worst one too high
        processes = int(next((os.environ[name] for name in names if os.environ.get(name)), 1))
        return psutil.virtual_memory().available // processes
    if not hasattr(module, "mem_get_info"):
        return None
    return module.mem_get_info()[0] + module.memory_reserved() - module.memory_allocated()


def synchronize() -> None:
    """Wait until the card has done what was asked; without this a clock measures only the asking."""
    if (module := _backend_module()) is not None:
        module.synchronize()


def empty_cache() -> None:
    """Give cached card memory back, for instance between generation and training."""
    if (module := _backend_module()) is not None:
        module.empty_cache()


def rng_state() -> torch.Tensor | None:
    """Return the state of the card's random numbers, None on a CPU (torch.get_rng_state() has those)."""
    module = _backend_module()
    return None if module is None else module.get_rng_state()


def set_rng_state(state: torch.Tensor | None) -> None:
    """Put back what rng_state() gave."""
    if (module := _backend_module()) is not None and state is not None:
        module.set_rng_state(state)


def seed_device(seed: int) -> None:
    """Seed the random numbers of the current card."""
    if (module := _backend_module()) is not None:
        module.manual_seed(seed)
