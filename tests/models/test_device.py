"""Platforms and dtypes: the tables of chips, what is refused, and detection with devices that are only played."""

import logging
import os
import re
import types
from functools import lru_cache

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


OLD, NEW = ("fp16", "fp32"), ("bf16", "fp16", "fp32")
# What hardware vendors say that a chip computes in natively, the best first. Ascend910B without a number is a variant of
# the first generation, before what is sold as 910B.
CHIPS = {"cpu": ("fp32", "bf16"), "sm61": ("fp32",)}
CHIPS |= dict.fromkeys(("sm70", "sm75", "gfx906", "gfx926"), OLD)
CHIPS |= dict.fromkeys(("Ascend910A", "Ascend910ProB", "Ascend910PremiumA", "Ascend910B"), OLD)
CHIPS |= dict.fromkeys(("sm80", "sm90", "sm120", "gfx928", "gfx936", "gfx90a", "Ascend910B1", "Ascend910_9391"), NEW)


def test_dtypes_of_chips():
    assert {chip: chip_dtypes(chip) for chip in CHIPS} == CHIPS


def test_cpu_takes_float32_and_bfloat16_but_not_float16():
    cpu = PLATFORMS["cpu"]
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("fp32", cpu) == torch.float32
    assert resolve_dtype("bf16", cpu) == torch.bfloat16  # the probe passes where torch computes
    with pytest.raises(UserError, match=r"--dtype fp16.*cpu.*fp32 or bf16"):
        resolve_dtype("fp16", cpu)
    with pytest.raises(UserError, match="fp8"):
        resolve_dtype("fp8", cpu)


def fake_npu(chip: str = "Ascend910A", infinities: bool | None = False) -> types.SimpleNamespace:
    """torch.npu of a machine with two cards; ``calls`` keeps what was called."""
    npu = types.SimpleNamespace(calls=[], flag=False, device_count=lambda: 2, current_device=lambda: 0)
    npu.get_device_name = lambda index: chip
    npu.set_device = lambda index: npu.calls.append(f"set_device({index})")
    npu.set_compile_mode = lambda jit_compile: npu.calls.append(f"set_compile_mode({jit_compile})")
    npu.get_npu_overflow_flag = lambda: npu.flag
    npu.clear_npu_overflow_flag = lambda: setattr(npu, "flag", False)
    # the oldest torch_npu does not say
    npu.utils = types.SimpleNamespace(**({} if infinities is None else {"is_support_inf_nan": lambda: infinities}))
    return npu


@pytest.fixture
def npu(monkeypatch):
    """Make this machine one with Ascend cards: npu(chip, …) -> the fake module."""

    def install(**traits) -> types.SimpleNamespace:
        module = fake_npu(**traits)
        monkeypatch.setattr(torch, "npu", module, raising=False)
        monkeypatch.setattr(device, "_current", lru_cache(lambda: PLATFORMS["npu"]))
        return module

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    device._current.cache_clear()
    return install


@pytest.mark.parametrize(
    ("platform", "chip", "auto"),
    [("dcu", "gfx906", torch.float16), ("dcu", "gfx928", torch.bfloat16), ("npu", "Ascend910A", torch.float16)],
)
def test_auto_follows_the_chip(monkeypatch, npu, platform, chip, auto):
    npu(chip=chip)
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
        ("cuda", False, None, True, "finds no such device"),
        ("npu", True, None, False, "finds no such device"),
        ("dcu", False, None, False, "finds no such device"),
        ("tpu", False, None, False, "cuda, dcu, npu, cpu"),
    ],
)
def test_detection(monkeypatch, wanted, cuda, hip, npu, found):
    monkeypatch.setenv("DS_ACCELERATOR", wanted)
    monkeypatch.setattr(device, "_cuda_answers", lambda: cuda)
    monkeypatch.setattr(device, "_npu_answers", lambda: npu)
    monkeypatch.setattr(torch.version, "hip", hip)
    if found not in PLATFORMS:
        with pytest.raises(UserError, match=f"DS_ACCELERATOR={wanted}.*{found}"):
            detect_platform()
        return
    assert detect_platform().name == found
    assert os.environ["DS_ACCELERATOR"] == {"dcu": "cuda"}.get(found, found)


def test_cards(npu):
    module = npu(chip="Ascend910B2")
    card = {"name": "Ascend910B2", "chip": "Ascend910B2", "total": None, "free": None}
    assert device.cards() == [card, card]  # the oldest torch_npu does not tell the memory
    module.mem_get_info = lambda index: (10 + index, 64)
    assert [(one["free"], one["total"]) for one in device.cards()] == [(10, 64), (11, 64)]


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
    assert not device.has_accelerator() and not device.saturates()
    assert device.device_count() == 0 and device.cards() == []
    assert device.set_device(PLATFORMS["cpu"], 5) == torch.device("cpu")


# --- Ascend -----------------------------------------------------------------------------------------------------------


def test_operators_are_not_compiled_shape_by_shape_and_the_probe_knows_it_already(npu, monkeypatch):
    module = npu()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(device, "probe_dtype", lambda *_: module.calls.append("probe") or True)
    assert resolve_dtype("auto", PLATFORMS["npu"]) == torch.float16
    assert module.calls == ["set_device(1)", "set_compile_mode(False)", "probe"], "on its own card, before the first operator"
    with pytest.raises(UserError, match=r"process 2 of this node has no card: 2 visible.*ASCEND_RT_VISIBLE_DEVICES"):
        device.set_device(PLATFORMS["npu"], 2)


@pytest.mark.parametrize(
    ("chip", "infinities", "expected"),
    [("Ascend910A", False, True), ("Ascend910B2", True, False), ("Ascend910ProB", None, True), ("Ascend910B2", None, False)],
)
def test_who_saturates(npu, monkeypatch, chip, infinities, expected):
    module = npu(chip=chip, infinities=infinities)
    assert device.saturates() is expected
    monkeypatch.setenv("SANBU_OVERFLOW_FLAG", "0")
    assert device.saturates() is False
    module.flag = True
    assert device.overflow_flag()
    device.clear_overflow_flag()
    assert not device.overflow_flag()


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "auto"), {"cuda": "sdpa", "cpu": "sdpa", "dcu": "eager", "npu": "eager"}.items())
def test_a_fallback_of_attention_is_logged_with_its_reason(caplog, name, auto):
    with caplog.at_level(logging.INFO, logger="sanbu"):
        assert attention_implementation("auto", PLATFORMS[name]) == auto
    assert len(caplog.messages) == (auto != "sdpa")
    assert all(re.search("eager, because .+", message) for message in caplog.messages)
    assert attention_implementation("eager", PLATFORMS[name]) == "eager"
    with pytest.raises(UserError, match="fast"):
        attention_implementation("fast", PLATFORMS[name])


def test_sdpa_on_a_chip_without_flash_kernels_is_left_to_plain_operators(monkeypatch, caplog):
    flash, efficient = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    try:
        monkeypatch.setattr(device, "chip_name", lambda *_: "gfx906")
        with caplog.at_level(logging.INFO, logger="sanbu"):
            assert attention_implementation("sdpa", PLATFORMS["dcu"]) == "sdpa"
        assert "flash kernels" in caplog.text
        assert not torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.mem_efficient_sdp_enabled()
        with pytest.raises(UserError, match=r"flash_attention_2 has no kernels .*gfx906.*use auto"):
            attention_implementation("flash_attention_2", PLATFORMS["dcu"])
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_mem_efficient_sdp(efficient)
