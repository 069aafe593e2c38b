"""DeepSpeed configurations and the copying of structure, without processes."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from errors import UserError
from training.utils.zero import (
    build_optimizer,
    copy_structure,
    fill,
    get_eval_ds_config,
    get_train_ds_config,
    merge,
    read_deepspeed_config,
)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_deepspeed_itself_accepts_every_training_config(stage, offload, dtype):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = get_train_ds_config(offload, dtype, stage, offload_param=offload, max_grad_norm=0.5)
    parsed = DeepSpeedConfig(json.loads(json.dumps(config)))
    assert parsed.zero_config.stage == stage
    assert parsed.gradient_clipping == 0.5
    assert (parsed.zero_config.offload_optimizer is not None) == (offload and stage >= 1)
    assert (parsed.zero_config.offload_param is not None) == (offload and stage == 3)


def test_zero_plus_plus_goes_into_stage_3_only():
    flags = {"zero_hpz_partition_size": 8, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    stage3 = get_train_ds_config(False, torch.float16, 3, **flags)["zero_optimization"]
    assert {name: stage3[name] for name in flags} == flags
    stage2 = get_train_ds_config(False, torch.float16, 2, **flags)["zero_optimization"]
    assert not set(flags) & set(stage2)


def test_frozen_models_are_sharded_under_stage_3_and_can_live_on_the_host():
    assert get_eval_ds_config(True, torch.float16, 3)["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert "offload_param" not in get_eval_ds_config(True, torch.float16, 0)["zero_optimization"]


def test_a_file_overrides_key_by_key(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"overlap_comm": false}, "train_batch_size": "auto"}')
    config = merge(get_train_ds_config(False, torch.bfloat16, 2), read_deepspeed_config(str(file)))
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert config["train_batch_size"] == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [('{"optimizer": {"type": "Adam"}}', "--optimizer"), ('{"a": 1,\n "b" 2}', "line 2"), (None, "No such file")],
)
def test_wrong_deepspeed_config_is_told_in_a_sentence(tmp_path, content, expected):
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=expected):
        read_deepspeed_config(str(file))


def test_structure_is_copied_without_weights_and_keeps_ties():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    plain = copy_structure(model)
    assert all(parameter.device.type == "meta" for parameter in plain.parameters())
    assert plain["head"].weight is plain["embedding"].weight
    assert model["head"].weight.device.type == "cpu"

    new = nn.Parameter(model["embedding"].weight.detach().clone())
    fill(plain, {id(plain["embedding"].weight): new}, {})
    tokens = torch.tensor([0, 4])
    assert torch.equal(plain["head"](plain["embedding"](tokens)), model["head"](model["embedding"](tokens)))


class Recorder(torch.optim.AdamW):
    """Stands where DeepSpeed's compiled optimizers do, with the arguments that both of them know."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


@pytest.mark.parametrize(("wanted", "name"), [("fused_adam", "FusedAdam"), ("cpu_adam", "DeepSpeedCPUAdam")])
def test_deepspeeds_optimizers_get_the_flags(monkeypatch, wanted, name):
    import deepspeed.ops.adam

    monkeypatch.setattr(deepspeed.ops.adam, name, Recorder)
    options = SimpleNamespace(optimizer=wanted, offload_optimizer=False, zero_stage=2, betas=(0.8, 0.7), epsilon=1e-5)
    found = build_optimizer([{"params": [nn.Parameter(torch.ones(2, 2))], "lr": 0.5}], options)
    assert isinstance(found, Recorder)
    group = found.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-5)


def test_an_optimizer_that_cannot_be_built_gives_way_with_its_reason(monkeypatch, caplog):
    import deepspeed.ops.adam

    def broken(*_, **__):
        raise RuntimeError("no compiler here\nand a long tail")

    monkeypatch.setattr(deepspeed.ops.adam, "FusedAdam", broken)
    options = SimpleNamespace(optimizer="fused_adam", offload_optimizer=False, zero_stage=0, betas=(0.8, 0.7), epsilon=1e-5)
    with caplog.at_level("WARNING", logger="sanbu"):
        found = build_optimizer([{"params": [nn.Parameter(torch.ones(2))], "lr": 0.5}], options)
    assert type(found) is torch.optim.AdamW and found.param_groups[0]["eps"] == 1e-5
    assert "fused_adam cannot be built here (no compiler here)" in caplog.text and "long tail" not in caplog.text
