"""Which AdamW serves: the one that was asked for, torch's fused one, torch's plain one - each fallback with one reason."""

import dataclasses
import logging

import deepspeed.ops.adam
import pytest
import torch

from training.utils.engine import build
from training.utils.engine.build import build_optimizer
from training.utils.engine.configs import EngineOptions

OPTIONS = EngineOptions(
    zero_stage=1, offload_optimizer=False, offload_param=False, learning_rate=0.1, lora_learning_rate=0.1, weight_decay=0.0,
    num_warmup_steps=0, lr_scheduler_type="constant", optimizer="auto", betas=(0.9, 0.95), epsilon=1e-8, max_grad_norm=1.0,
    zero_plus_plus={}, deepspeed_config=None,
)  # fmt: skip


class Broken:
    """An operator that cannot be built."""

    def __init__(self, *_, **__) -> None:
        raise RuntimeError("nvcc fatal: Unsupported gpu architecture\nninja: build stopped")


@pytest.fixture
def groups():
    return [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.1, "weight_decay": 0.0}]


@pytest.mark.parametrize(
    ("wanted", "accelerator", "offload", "tried"),
    [
        ("auto", False, False, None),
        ("auto", True, True, "cpu_adam"),
        ("fused_adam", True, False, "fused_adam"),
        ("cpu_adam", False, False, "cpu_adam"),
    ],
)
def test_an_operator_that_cannot_be_built_gives_way_to_torch(monkeypatch, caplog, groups, wanted, accelerator, offload, tried):
    for name in ("DeepSpeedCPUAdam", "FusedAdam"):
        monkeypatch.setattr(deepspeed.ops.adam, name, Broken)
    monkeypatch.setattr(build, "has_accelerator", lambda: accelerator)
    with caplog.at_level(logging.WARNING, logger="sanbu"):
        optimizer = build_optimizer(groups, dataclasses.replace(OPTIONS, optimizer=wanted, offload_optimizer=offload))
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert len(caplog.messages) == (tried is not None)
    assert all(tried in message and "Unsupported gpu architecture" in message for message in caplog.messages)


def test_where_the_fused_kernel_is_missing_the_plain_one_serves(monkeypatch, caplog, groups):
    whole = torch.optim.AdamW

    def adamw(groups, fused=None, **settings):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return whole(groups, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    with caplog.at_level(logging.WARNING, logger="sanbu"):
        optimizer = build_optimizer(groups, OPTIONS)
    assert not optimizer.defaults["fused"] and len(caplog.messages) == 1 and "supported devices" in caplog.text
    groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert torch.all(groups[0]["params"][0] < 1)
