"""--zero_stage auto beside flags that do something at stage 3 only, and the memory that a run sees."""

from types import SimpleNamespace

import psutil
import pytest

from training.utils.memory import fit as planning


class AlwaysFits:
    """Stands in for a run's memory: every setting fits."""

    def __init__(self, **flags) -> None:
        idle = {"offload_param": False, "zero_hpz_partition_size": 1, "zero_quantized_weights": False,
                "zero_quantized_gradients": False, "zero_quantized_nontrainable_weights": False}  # fmt: skip
        self.args = SimpleNamespace(zero_stage="auto", **idle | flags)
        self.setting = SimpleNamespace(offload_optimizer=False)

    def plan_as_run(self, setting, machine):
        return SimpleNamespace(fits=True)


@pytest.mark.parametrize(
    ("flags", "stage"),
    [({}, 0), ({"zero_hpz_partition_size": 8}, 3), ({"zero_quantized_gradients": True}, 3), ({"offload_param": True}, 3)],
)
def test_auto_takes_a_stage_at_which_all_flags_have_an_effect(flags, stage):
    memory = AlwaysFits(**flags)
    planning.choose_stage(memory, None, ["zero_stage"])
    assert memory.args.zero_stage == stage


def test_a_run_in_a_container_has_the_containers_memory(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64e9))
    monkeypatch.setattr(planning, "container_free", lambda: 5e9)
    monkeypatch.setattr(planning, "has_accelerator", lambda: False)
    run = SimpleNamespace(world_size=1, maximum=lambda value: value)
    assert planning.this_machine(run).host_memory == 5e9
