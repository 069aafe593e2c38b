"""DeepSpeed configurations, the optimizer that serves, and the copying of structure, without processes."""

import json
import re
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import deepspeed.ops.adam
import pytest
import torch
from torch import nn

from errors import UserError
from training.utils.engine import build
from training.utils.engine.build import build_optimizer, warmup_steps
from training.utils.engine.configs import EngineOptions, frozen_config
from training.utils.engine.weights import copy_structure, fill
from training.utils.flags.deepspeed_file import (
    check_keys,
    check_precision,
    check_words,
    read_deepspeed_config,
)
from training.utils.flags.parse import parse
from training.utils.flags.steps import SFTArguments

pytestmark = pytest.mark.fast


def options(**flags) -> EngineOptions:
    return EngineOptions.of(SFTArguments(model_name_or_path="unused", output_dir="unused", **flags))


def run(dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    return SimpleNamespace(dtype=dtype, world_size=1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_deepspeed_itself_accepts_every_training_config(stage, offload, dtype):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = options(offload=offload, zero_stage=stage, max_grad_norm=0.5).train_config(run(dtype))
    parsed = DeepSpeedConfig(json.loads(json.dumps(config)))
    assert parsed.zero_config.stage == stage
    assert parsed.gradient_clipping == 0.5
    assert (parsed.zero_config.offload_optimizer is not None) == (offload and stage >= 1)
    assert (parsed.zero_config.offload_param is not None) == (offload and stage == 3)


def test_frozen_models_can_live_on_the_host():
    for offload, device in ((True, "cpu"), (False, "none")):
        assert frozen_config(run(), offload)["zero_optimization"]["offload_param"] == {"device": device}


def test_a_file_overrides_key_by_key(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"overlap_comm": false}, "train_batch_size": "auto"}')
    config = options(zero_stage=2, deepspeed_config=str(file)).train_config(run())
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert config["train_batch_size"] == 1


def test_a_file_may_use_the_other_names_of_deepspeeds_keys(tmp_path):
    """Published files say max_live_parameters or gather_fp16 where ours say stage3_…; both together are an error in DeepSpeed."""
    from deepspeed.runtime.config import DeepSpeedConfig

    file = tmp_path / "ds.json"
    zero = {"max_live_parameters": 7, "stage3_gather_fp16_weights_on_model_save": True, "cpu_offload": True}
    file.write_text(json.dumps({"zero_optimization": zero}))
    given = options(zero_stage=3, offload_optimizer=True, deepspeed_config=str(file)).train_config(run())
    parsed = DeepSpeedConfig(given).zero_config
    assert (parsed.max_live_parameters, parsed.gather_16bit_weights_on_model_save) == (7, True)
    assert parsed.offload_optimizer.device == "cpu"


STAGE_3 = '{"zero_optimization": {"stage": 3}}'
FP16 = '{"fp16": {"enabled": true, "loss_scale": 256}, "bf16": {"enabled": false}}'


@pytest.mark.parametrize(
    ("content", "check", "sentence"),
    [
        ('{"optimizer": 3}', read_deepspeed_config, '"optimizer" must be an object'),
        ('{"gradient_clipping": NaN}', read_deepspeed_config, '"gradient_clipping" is NaN; give finite numbers'),
        ('{"a": {"b": [1, 1e999]}}', read_deepspeed_config, r'"a.b" is \[1, Infinity\]; give finite numbers'),
        ('{"fp16": {"enabled": true, "enabled": false}}', read_deepspeed_config, '"enabled" stands twice in one section'),
        ('{"fp16": {"enabled": "false"}}', lambda file: check_precision(file, "fp32"), '"fp16.enabled" is "false"; give true'),
        ('{"a": 1,\n "b" 2}', read_deepspeed_config, "line 2"),
        (None, read_deepspeed_config, "No such file"),
        ("[1, 2]", read_deepspeed_config, "expected a JSON object"),
        ('{"zero_optimization": 3}', read_deepspeed_config, '"zero_optimization" must be an object'),
        ('{"fp16": true}', read_deepspeed_config, '"fp16" must be an object'),
        (FP16, lambda file: check_precision(file, "bf16"), '"fp16" is switched on, and the run computes in bf16'),
        (FP16, lambda file: check_precision(file, "fp32"), '"fp16" is switched on, and the run computes in fp32'),
        ('{"bf16": {"enabled": false}}', lambda file: check_precision(file, "bf16"), '"bf16" is switched off'),
        (FP16, lambda file: check_precision(file, "fp16"), None),
    ],
)
def test_wrong_deepspeed_config_is_told_in_a_sentence(tmp_path, content, check, sentence):
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=sentence) if sentence else nullcontext():
        check(str(file))


ADAM = '{"optimizer": {"type": "%s", "params": {%s}}}'
WARMUP = '{"scheduler": {"type": "%s", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto", %s}}}'
HOST = '{"zero_optimization": {"offload_optimizer": {"device": "%s"}}}'


@pytest.mark.parametrize(
    ("content", "words", "sentence"),
    [
        (ADAM % ("AdamW", '"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"'), "", None),
        (ADAM % ("Adam", '"lr": 3e-4, "betas": [0.9, 0.95], "torch_adam": true'), "--learning_rate 3e-4 --adam_beta2 0.95", None),
        (ADAM % ("OnebitAdam", ""), "", '"optimizer.type" is "OnebitAdam", which --optimizer does not have; remove the section'),
        (ADAM % ("AdamW", '"lr": "3e-4"'), "--learning_rate 3e-4", '"optimizer.params.lr" is "3e-4", and the flags say'),
        (ADAM % ("AdamW", '"lr": 3e-4'), "--learning_rate 1e-4", '"optimizer.params.lr" is 0.0003, and the flags say'),
        (ADAM % ("AdamW", '"betas": [0.8, 0.9]'), "", "the flags say --adam_beta1 0.9 --adam_beta2"),
        (ADAM % ("Lamb", ""), "", '"optimizer.type" is "Lamb", which --optimizer does not have'),
        (ADAM % ("AdamW", '"freeze_step": 4'), "", '"optimizer.params.freeze_step" has no flag here; remove it'),
        (ADAM % ("AdamW", '"adam_w_mode": false'), "", "the steps have true alone"),
        (WARMUP % ("WarmupDecayLR", '"total_num_steps": "auto"'), "--lr_scheduler_type linear", None),
        (WARMUP % ("WarmupLR", '"last_batch_iteration": -1'), "--lr_scheduler_type constant_with_warmup", None),
        ('{"tensor_parallel": {"autotp_size": 2}}', "", '"tensor_parallel" changes the model'),
        (WARMUP % ("WarmupLR", '"warmup_max_lr": "auto"'), "--lr_scheduler_type cosine", "say --lr_scheduler_type cosine"),
        ('{"train_micro_batch_size_per_gpu": 4, "train_batch_size": "auto"}', "--per_device_train_batch_size 4", None),
        ('{"gradient_accumulation_steps": 4}', "", "the flags say --gradient_accumulation_steps 1"),
        ('{"gradient_clipping": 0.5}', "", "the flags say --max_grad_norm 1.0"),
        ('{"gradient_clipping": 0.5}', "--max_grad_norm 0.5", None),
        # With another stage no copy of the structure was kept, and export wrote weights of shape (0,).
        (STAGE_3, "--zero_stage 2", '"stage" is 3, and the flags say --zero_stage 2; remove the key, or give the flag'),
        (STAGE_3, "--zero_stage 3", None),
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5, "scheduler": {"type": "WarmupLR"}}', "",
         '"stage" is 2, and the flags say --zero_stage 0; "gradient_clipping" is 0.5, and the flags say --max_grad_norm 1.0; '
         '"scheduler.type" is "WarmupLR", and the flags say --lr_scheduler_type cosine; remove the keys, or give the flags'),
        (HOST % "cpu", "--zero_stage 2 --offload_optimizer", None),
        (HOST % "cpu", "--zero_stage 2", "add --offload_optimizer, or remove the key"),
        (HOST % "none", "--zero_stage 2 --offload", "the flags move it to the host; remove the key"),
    ],
)
def test_a_deepspeed_config_is_compared_with_the_flags(tmp_path, content, words, sentence):
    (tmp_path / "ds.json").write_text(content)
    given = ["--model_name_or_path", "m", "--output_dir", "o", "--deepspeed_config", str(tmp_path / "ds.json"), *words.split()]
    with pytest.raises(UserError, match=re.escape(sentence)) if sentence else nullcontext():
        args = parse(SFTArguments, given)
        passed_on = read_deepspeed_config(args.deepspeed_config)
        assert not {"optimizer", "scheduler", "train_micro_batch_size_per_gpu"} & passed_on.keys()


ZERO = '{"zero_optimization": {%s}}'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"gradient_cliping": 1}', '"gradient_cliping" is no key of the installed DeepSpeed; did you mean "gradient_clipping"?'),
        ('{"cuda_visible_devices": "0"}', '"cuda_visible_devices" is no key of the installed DeepSpeed; remove it'),
        (ZERO % '"overlap_com": true', '"zero_optimization.overlap_com" is no key of the installed DeepSpeed; did you'),
        (ZERO % '"offload_param": {"devise": "cpu"}', '"zero_optimization.offload_param.devise" is no key of the installed'),
        ('{"fp16": {"opt_level": "O2"}}', '"fp16.opt_level" is no key of the installed DeepSpeed; remove it'),
        ('{"fp16": {"overlap_comm": true}}', '"fp16.overlap_comm" is no key of the installed DeepSpeed; remove it'),
        ('{"flops_profiler": {"profil_step": 2}}', 'is no key of the installed DeepSpeed; did you mean "profile_step"?'),
        ('{"tensorboard": {"output": "o"}}', '"tensorboard.output" is no key'),
        ('{"steps_per_print": "x"}', '"steps_per_print" is "x"; give a number above 0'),
        ('{"steps_per_print": 0}', '"steps_per_print" is 0; give a number above 0'),
        ('{"gradient_predivide_factor": -1}', '"gradient_predivide_factor" is -1; give a number above 0'),
        ('{"wall_clock_breakdown": "false"}', '"wall_clock_breakdown" is "false"; give true or false'),
        ('{"flops_profiler": {"top_modules": -3}}', '"flops_profiler.top_modules" is -3; give a number from 0 up'),
        ('{"flops_profiler": {"profile_step": true}}', '"flops_profiler.profile_step" is true; give a number from 0 up'),
        (ZERO % '"reduce_bucket_size": -5', '"zero_optimization.reduce_bucket_size" is -5; input should be greater than 0.'),
        (ZERO % '"reduce_bucket_size": "5e8 or so"', '"zero_optimization.reduce_bucket_size" is "5e8 or so"; input should be a'),
        ('{"fp16": {"min_loss_scale": 0.5}}', '"fp16.min_loss_scale" is 0.5; input should be a valid integer'),
        ('{"flops_profiler": true}', '"flops_profiler" must be an object of DeepSpeed keys, found true'),
        ('{"communication_data_type": "int3"}', '"communication_data_type" does not suit the installed DeepSpeed: Invalid'),
        ('{"bf16": {"bf16_master_weights_and_grads": true}}', "is only supported with ZeRO Stage 1, 2, or 3."),
        # What published files have, comments and last commas included.
        ('{"_comment": "for 8 cards", "steps_per_print": 1e9, "wall_clock_breakdown": false,} // end', None),
        ('{"zero_allow_untested_optimizer": true, "zero_force_ds_cpu_optimizer": false, "communication_data_type": "fp32"}', None),
        (ZERO % '"reduce_bucket_size": 5e8, "stage3_gather_fp16_weights_on_model_save": true', None),
        (ZERO % '"sub_group_size": 1e9, "stage3_max_live_parameters": "auto", "round_robin_gradients": true', None),
        ('{"fp16": {"enabled": "auto", "auto_cast": false, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2}}', None),
        ('{"flops_profiler": {"enabled": true, "module_depth": -1, "output_file": null}, "aio": {"queue_depth": 8}}', None),
        ('{"comms_logger": {"enabled": true, "prof_all": true}, "tensorboard": {"enabled": false, "output_path": "o"}}', None),
        ('{"activation_checkpointing": {"partition_activations": true, "number_checkpoints": 4}, "vocabulary_size": 7}', None),
    ],
)
def test_the_installed_deepspeed_says_which_keys_and_values_there_are(tmp_path, content, sentence):
    if sentence and not find_spec("deepspeed.runtime.precision_config"):
        pytest.skip("an older DeepSpeed says it in other words")
    (tmp_path / "ds.json").write_text(content)
    args = SFTArguments(model_name_or_path="m", output_dir="o", deepspeed_config=str(tmp_path / "ds.json"))
    with pytest.raises(UserError, match=re.escape(sentence)) if sentence else nullcontext():
        check_keys(args)
    if not sentence:
        check_words(args.deepspeed_config)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"gradient_cliping": 1}', '"gradient_cliping" is no key of the installed DeepSpeed; did you mean "gradient_clip'),
        (ZERO % '"overlap_com": true', 'overlap_com" is no key of the installed DeepSpeed; did you mean "overlap_comm"?'),
        (ZERO % '"offload_param": {"devise": "cpu"}', '"zero_optimization.offload_param.devise" is no key of the installed'),
        ('{"tensor_board": {"enabled": true}}', '"tensor_board" is no key of the installed DeepSpeed; did you mean "tensorboard'),
    ],
)
def test_a_key_that_deepspeed_has_nowhere_is_told_without_importing_it(tmp_path, content, sentence):
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_words(str(tmp_path / "ds.json"))


def test_every_default_of_deepspeeds_own_sections_passes(tmp_path):
    """No key of these sections is taken for a slip, whichever version is installed."""
    module = pytest.importorskip("deepspeed.runtime.precision_config", reason="an older DeepSpeed has no models for these")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(stage=3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"})
    sections = {"zero_optimization": zero, "fp16": module.DeepSpeedFP16Config(), "bf16": module.DeepSpeedBF16Config()}
    content = {name: section.model_dump(mode="json", exclude_none=True) for name, section in sections.items()}
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        if (field.json_schema_extra or {}).get("deprecated"):
            content["zero_optimization"].pop(name, None)
    (tmp_path / "ds.json").write_text(json.dumps(content))
    check_keys(SFTArguments(model_name_or_path="m", output_dir="o", zero_stage=3, deepspeed_config=str(tmp_path / "ds.json")))


def test_auto_is_dropped_at_every_depth(tmp_path):
    """Published files for transformers' trainer are full of it, and DeepSpeed reads the word as a number."""
    file = tmp_path / "ds.json"
    zero = {"stage": "auto", "reduce_bucket_size": "auto", "offload_optimizer": {"device": "auto"}}
    content = {"gradient_clipping": "auto", "fp16": {"enabled": "auto"}, "optimizer": {"type": "auto"}}
    kept = {"steps_per_print": 5, "comms_logger": {"enabled": False}}
    file.write_text(json.dumps(content | {"zero_optimization": zero} | kept))
    assert read_deepspeed_config(str(file)) == kept


def test_warm_up_takes_at_most_half_of_the_run():
    assert [warmup_steps(10, total) for total in (1, 2, 7, 20, 100)] == [0, 1, 3, 10, 10]
    assert warmup_steps(0, 100) == 0


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


@pytest.fixture
def groups():
    return [{"params": [nn.Parameter(torch.ones(3))], "lr": 0.5, "weight_decay": 0.0}]


@pytest.mark.parametrize(("wanted", "name"), [("fused_adam", "FusedAdam"), ("cpu_adam", "DeepSpeedCPUAdam")])
def test_deepspeeds_optimizers_get_the_flags(monkeypatch, groups, wanted, name):
    monkeypatch.setattr(deepspeed.ops.adam, name, Recorder)
    flags = {"adam_beta1": 0.8, "adam_beta2": 0.7, "adam_epsilon": 1e-5}
    optimizer = build_optimizer(groups, options(optimizer=wanted, zero_stage=2, **flags))
    assert isinstance(optimizer, Recorder)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-5)


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
    def broken(*_, **__):
        raise RuntimeError("nvcc fatal: Unsupported gpu architecture\nninja: build stopped")

    for name in ("DeepSpeedCPUAdam", "FusedAdam"):
        monkeypatch.setattr(deepspeed.ops.adam, name, broken)
    monkeypatch.setattr(build, "has_accelerator", lambda: accelerator)
    with caplog.at_level("WARNING", logger="sanbu"):
        optimizer = build_optimizer(groups, options(optimizer=wanted, offload_optimizer=offload, zero_stage=1))
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert len(caplog.messages) == (tried is not None)
    assert all(f"{tried} cannot be built here (nvcc fatal: Unsupported gpu architecture)" in one for one in caplog.messages)


def test_where_the_fused_kernel_is_missing_the_plain_one_serves(monkeypatch, caplog, groups):
    whole = torch.optim.AdamW

    def adamw(groups, fused=None, **settings):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return whole(groups, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    with caplog.at_level("WARNING", logger="sanbu"):
        optimizer = build_optimizer(groups, options())
    assert not optimizer.defaults["fused"] and len(caplog.messages) == 1 and "supported devices" in caplog.text
