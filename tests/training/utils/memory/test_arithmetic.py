"""The arithmetic of the memory plan against the published one."""

import dataclasses

import pytest

from training.utils.memory.arithmetic import (
    ALWAYS,
    CARD,
    GIB,
    HOST,
    Machine,
    Plan,
    Setting,
    Weights,
    engine_rows,
    pinned,
)

pytestmark = pytest.mark.fast
SIX_BILLION = 6_173_286_400
COUNTS = Weights(SIX_BILLION, 0, 1_100_000, 0, 130_528 * 4096, 0)  # ChatGLM-6B


def states(stage, processes, place=CARD, **offload):
    """Return bytes of weights, gradients and optimizer states while gradients are made."""
    machine = Machine(processes, 8, 80.0 * GIB, 512.0 * GIB)
    rows = [row for row in engine_rows(COUNTS, 2, stage, machine, **offload) if row.place == place]
    kept = [row for row in rows if row.column in ("weights", "optimizer", "gradients")]
    return sum(row.size for row in kept if row.moment in (ALWAYS, "training"))


def test_training_state_is_that_of_the_deepspeed_papers():
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), table 1: 16 bytes a parameter, K = 12 of them optimizer states."""
    n = 64
    for stage, expected in enumerate((16, 4 + 12 / n, 2 + 14 / n, 16 / n)):
        assert states(stage, n) == pytest.approx(expected * SIX_BILLION, rel=0.01)
        if stage:
            away = {"offload_optimizer": True, "offload_param": stage == 3}
            assert states(stage, n, HOST, **away) >= 12 * SIX_BILLION / n
            assert states(stage, n, **away) <= expected * SIX_BILLION - 12 * SIX_BILLION / n


def test_more_processes_and_higher_stages_never_take_more():
    for n in (2, 8, 64):
        sizes = [states(stage, n) for stage in (0, 1, 2, 3)]
        assert sizes == sorted(sizes, reverse=True)
    assert states(3, 64) < states(3, 8) < states(3, 2)


def test_pinned_memory_is_a_power_of_two():
    assert [pinned(size) for size in (0, 1, 1000, 1024, 3 * GIB)] == [0, 1, 1024, 1024, 4 * GIB]


def test_a_verdict_says_how_full_it_is():
    setting = Setting({"model": 0}, {"model": False})
    for card, verdict in ((5, "fits"), (9.5, "tight"), (10.5, "no")):
        found = Plan(setting, Machine(1, 1, 10.0, 100.0), {"weights": card}, {"reserve": 1.0}, "training")
        assert found.verdict == verdict
    assert dataclasses.replace(found, card={"weights": 1}, host={"optimizer": 120.0}).verdict == "no"
