"""The arithmetic of the memory plan against the published one."""

import dataclasses

import pytest

from training.utils.memory.arithmetic import GIB, Machine, Plan, Setting, Weights, engine_memory, pinned

pytestmark = pytest.mark.fast
SIX_BILLION = 6_173_286_400
COUNTS = Weights(SIX_BILLION, 0, 1_100_000, 0, 130_528 * 4096, 0)  # ChatGLM-6B


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_state_is_that_of_the_deepspeed_papers(stage):
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), table 1: 16 bytes a parameter, K = 12 of them optimizer states."""
    n = 64
    engine = engine_memory(COUNTS, 2, stage, n, offload_optimizer=False, offload_param=False)
    found = sum(engine.always.get(name, 0.0) for name in ("weights", "optimizer", "gradients"))
    found += engine.backward.get("gradients", 0.0)
    expected = {0: 16, 1: 4 + 12 / n, 2: 2 + 14 / n, 3: 16 / n}[stage] * SIX_BILLION
    assert found == pytest.approx(expected, rel=0.01)
    if stage:
        everything = engine_memory(COUNTS, 2, stage, n, offload_optimizer=True, offload_param=stage == 3)
        assert "optimizer" not in everything.always
        assert everything.host["optimizer"] >= 12 * SIX_BILLION / n


def test_more_processes_and_higher_stages_never_take_more():
    def size(stage, n):
        engine = engine_memory(COUNTS, 2, stage, n, offload_optimizer=False, offload_param=False)
        names = ("weights", "optimizer", "gradients")
        return sum(sizes.get(name, 0.0) for sizes in (engine.always, engine.backward) for name in names)

    for n in (2, 8, 64):
        sizes = [size(stage, n) for stage in (0, 1, 2, 3)]
        assert sizes == sorted(sizes, reverse=True)
    assert size(3, 64) < size(3, 8) < size(3, 2)


def test_pinned_memory_is_a_power_of_two():
    assert [pinned(size) for size in (0, 1, 1000, 1024, 3 * GIB)] == [0, 1, 1024, 1024, 4 * GIB]


def test_a_verdict_says_how_full_it_is():
    setting = Setting({"model": 0}, {"model": False})
    for card, verdict in ((5, "fits"), (9.5, "tight"), (10.5, "no")):
        found = Plan(setting, Machine(1, 1, 10.0, 100.0), {"weights": card}, {"reserve": 1.0}, "training")
        assert found.verdict == verdict
    assert dataclasses.replace(found, card={"weights": 1}, host={"optimizer": 120.0}).verdict == "no"
