"""Stages for --zero_stage auto, the largest batch, the refusal, and the memory that a run sees."""

import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from errors import UserError
from models.checkpoint_folder import open_checkpoint
from scripts.plan.known import config_of
from training.step1_sft import main as step1
from training.utils.flags.steps import PPOArguments, SFTArguments
from training.utils.memory import fit
from training.utils.memory.arithmetic import GIB, Machine, Setting
from training.utils.run import memory as run_memory

ONE = Machine(1, 1, 0.0, 0.05 * GIB, accelerator=False)


@pytest.fixture
def sft(llama):
    """Return the arguments of step 1 with some flags."""
    return lambda **flags: SFTArguments(model_name_or_path=str(llama), output_dir="unused", **flags)


def memory_of(args):
    configs = {"model": config_of(args.model_name_or_path)}
    return fit.StepMemory(args, configs, dtype="fp32", attention="sdpa")


def check(args, machine):
    models = {role: open_checkpoint(path) for role, path in args.models.items()}
    return fit.check_fits(args, machine, models, dtype="fp32", attention="sdpa")


@pytest.mark.parametrize(
    ("flags", "stage"),
    [
        ({}, 0),
        ({"offload_optimizer": True}, 1),
        ({"offload_param": True}, 3),
    ],
)
def test_auto_takes_a_stage_at_which_all_flags_have_an_effect(sft, flags, stage):
    args = sft(zero_stage="auto", max_seq_len=8, per_device_train_batch_size=1, per_device_eval_batch_size=1, **flags)
    assert check(args, Machine(8, 8, 64.0 * GIB, 512.0 * GIB)) == {"zero_stage": stage}
    assert args.zero_stage == "auto"  # the caller's own


def test_auto_takes_the_lowest_stage_that_fits(sft):
    """OPT-1.3B on eight cards that hold less and less."""
    args = sft(zero_stage="auto", per_device_train_batch_size=1, max_seq_len=128)
    memory = fit.StepMemory(args, {"model": config_of("opt-1.3b")}, dtype="fp16", attention="eager")
    needs = [memory.plan(Setting({"model": stage}, {"model": False}), Machine(8, 8, 1.0, 1.0)).on_card for stage in range(4)]
    assert needs == sorted(needs, reverse=True)
    for stage, needed in enumerate(needs):
        assert fit.planned(memory, Machine(8, 8, needed * 1.001, 512.0 * GIB)).stages == {"model": stage}
    assert fit.planned(memory, Machine(8, 8, 1.0, 512.0 * GIB)).stages == {"model": 3}


def test_the_largest_batch_fits_and_the_next_does_not(sft):
    memory = memory_of(sft(max_seq_len=256))
    setting = memory.setting
    largest = memory.largest_batch(setting, ONE)
    assert largest > 1
    assert memory.plan(setting, ONE, largest).fits and not memory.plan(setting, ONE, largest + 1).fits


def test_recomputing_saves_activations_and_length_costs_them(sft):
    def activations(length, checkpointing):
        return memory_of(sft(max_seq_len=length)).plan(Setting({"model": 0}, {"model": checkpointing}), ONE).on_host

    assert activations(256, True) < activations(256, False)
    assert activations(128, False) < activations(256, False)


def test_a_run_that_cannot_fit_is_refused_with_what_would_and_force_starts_it(sft):
    wide = {"max_seq_len": 256, "per_device_train_batch_size": 64}
    with pytest.raises(UserError, match=r"^step 1 \(SFT\) of this llama model does not fit: it needs") as refused:
        check(sft(**wide), ONE)
    sentence = str(refused.value)
    assert "--force" in sentence and "0.05" in sentence
    assert "--per_device_train_batch_size 1" in sentence or "--gradient_checkpointing" in sentence
    assert check(sft(**wide, force=True), ONE) == {}
    assert check(sft(max_seq_len=256, per_device_train_batch_size=1), ONE) == {}


def test_a_step_refuses_before_it_reads_weights(sft, tmp_path, monkeypatch):
    run = SimpleNamespace(world_size=1, dtype=torch.float32, attention="sdpa")
    monkeypatch.setattr(step1.Run, "start", lambda args: run)
    monkeypatch.setattr(run_memory, "this_machine", lambda run: Machine(1, 1, 0.0, 1e6, accelerator=False))
    with pytest.raises(UserError, match="does not fit"):
        step1.main(sft(data_path=["none"]))


def test_the_check_is_quick_and_leaves_random_numbers_alone(llama):
    args = PPOArguments(actor_model_name_or_path=str(llama), critic_model_name_or_path=str(llama), output_dir="unused")
    machine = Machine(2, 2, 0.0, 8.0 * GIB, accelerator=False)
    check(args, machine)
    state, began = torch.get_rng_state(), time.process_time()
    check(args, machine)
    assert time.process_time() - began < 2  # 0.2 on an idle machine
    assert torch.equal(state, torch.get_rng_state())


def test_a_run_in_a_container_has_the_containers_memory(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64e9))
    monkeypatch.setattr(run_memory, "container_free", lambda: 5e9)
    monkeypatch.setattr(run_memory, "has_accelerator", lambda: False)
    assert run_memory.this_machine(SimpleNamespace(world_size=1, maximum=lambda value: value)).host_memory == 5e9
