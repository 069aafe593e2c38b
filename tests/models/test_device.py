"""Platforms and dtypes: the tables of chips, what is refused, and detection with devices that are only played."""

import os

import pytest
import torch

from errors import UserError
from models import device
from models.device import PLATFORMS, attention_implementation, chip_dtypes, detect_platform, resolve_dtype


@pytest.fixture(autouse=True)
def no_memory_of_other_tests(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    device._current.cache_clear()
    yield
    device._current.cache_clear()


# chip -> what hardware vendors say it computes in natively, the best first
CHIPS = {
    "cpu": ("fp32", "bf16"),
    "sm61": ("fp32",),
    "sm70": ("fp16", "fp32"),
    "sm75": ("fp16", "fp32"),
    "sm80": ("bf16", "fp16", "fp32"),
    "sm90": ("bf16", "fp16", "fp32"),
    "sm120": ("bf16", "fp16", "fp32"),
    "gfx906": ("fp16", "fp32"),
    "gfx926": ("fp16", "fp32"),
    "gfx928": ("bf16", "fp16", "fp32"),
    "gfx936": ("bf16", "fp16", "fp32"),
    "gfx90a": ("bf16", "fp16", "fp32"),
    "Ascend910A": ("fp16", "fp32"),
    "Ascend910ProB": ("fp16", "fp32"),
    "Ascend910PremiumA": ("fp16", "fp32"),
    "Ascend910B1": ("bf16", "fp16", "fp32"),
    "Ascend910_9391": ("bf16", "fp16", "fp32"),
}


@pytest.mark.parametrize(("chip", "able"), CHIPS.items())
def test_dtypes_of_chips(chip, able):
    assert chip_dtypes(chip) == able


def test_cpu_takes_float32_and_bfloat16_but_not_float16():
    cpu = PLATFORMS["cpu"]
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("fp32", cpu) == torch.float32
    assert resolve_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(UserError, match=r"--dtype fp16.*cpu.*fp32 or bf16"):
        resolve_dtype("fp16", cpu)
    with pytest.raises(UserError, match="fp8"):
        resolve_dtype("fp8", cpu)


@pytest.mark.parametrize(
    ("platform", "chip", "auto"),
    [("dcu", "gfx906", torch.float16), ("dcu", "gfx928", torch.bfloat16), ("npu", "Ascend910A", torch.float16)],
)
def test_auto_follows_the_chip(monkeypatch, platform, chip, auto):
    monkeypatch.setattr(device, "chip_name", lambda *_: chip)
    monkeypatch.setattr(device, "probe_dtype", lambda *_: True)
    assert resolve_dtype("auto", PLATFORMS[platform]) == auto
    if auto == torch.float16:
        with pytest.raises(UserError, match=f"bf16.*{chip}"):
            resolve_dtype("bf16", PLATFORMS[platform])


def test_a_failed_probe_beats_the_table(monkeypatch):
    monkeypatch.setattr(device, "chip_name", lambda *_: "gfx928")
    monkeypatch.setattr(device, "probe_dtype", lambda dtype, *_: dtype != torch.bfloat16)
    assert resolve_dtype("auto", PLATFORMS["dcu"]) == torch.float16
    with pytest.raises(UserError, match="bf16"):
        resolve_dtype("bf16", PLATFORMS["dcu"])


def test_probe_passes_where_torch_computes():
    assert device.probe_dtype(torch.bfloat16, PLATFORMS["cpu"])


@pytest.mark.parametrize(
    ("wanted", "cuda", "hip", "npu", "found"),
    [
        ("", False, None, False, "cpu"),
        ("", True, None, False, "cuda"),
        ("", True, "5.7", False, "dcu"),
        ("", False, None, True, "npu"),
        ("cpu", True, None, True, "cpu"),
        ("cuda", True, "5.7", False, "dcu"),
        ("dcu", True, "5.7", False, "dcu"),
        ("npu", False, None, True, "npu"),
    ],
)
def test_detection(monkeypatch, wanted, cuda, hip, npu, found):
    monkeypatch.setenv("DS_ACCELERATOR", wanted)
    monkeypatch.setattr(device, "_cuda_answers", lambda: cuda)
    monkeypatch.setattr(device, "_npu_answers", lambda: npu)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert detect_platform().name == found
    assert os.environ["DS_ACCELERATOR"] == {"dcu": "cuda"}.get(found, found)


@pytest.mark.parametrize("wanted", ["cuda", "npu", "dcu"])
def test_a_named_device_that_is_absent_is_an_error(monkeypatch, wanted):
    monkeypatch.setenv("DS_ACCELERATOR", wanted)
    monkeypatch.setattr(device, "_cuda_answers", lambda: False)
    monkeypatch.setattr(device, "_npu_answers", lambda: False)
    with pytest.raises(UserError, match=f"DS_ACCELERATOR={wanted}"):
        detect_platform()


def test_unknown_accelerator(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "tpu")
    with pytest.raises(UserError, match=r"tpu.*cuda, dcu, npu, cpu"):
        detect_platform()


def test_attention():
    assert attention_implementation("auto", PLATFORMS["cuda"]) == "sdpa"
    assert attention_implementation("auto", PLATFORMS["dcu"]) == "eager"
    assert attention_implementation("auto", PLATFORMS["npu"]) == "eager"
    assert attention_implementation("eager", PLATFORMS["cuda"]) == "eager"
    with pytest.raises(UserError, match="fast"):
        attention_implementation("fast", PLATFORMS["cpu"])


def test_on_a_cpu_the_device_calls_do_nothing_and_memory_is_the_process():
    block = torch.ones(100_000_000)  # 0.4 GB, resident once written
    assert block[-1] == 1
    assert 0.4 < device.peak_memory_gb() < 64
    device.synchronize()
    device.empty_cache()
    device.reset_peak_memory()
    device.seed_device(3)
    assert device.rng_state() is None
    device.set_rng_state(None)
    assert not device.has_accelerator()
    assert device.set_device(PLATFORMS["cpu"], 5) == torch.device("cpu")
