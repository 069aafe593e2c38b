"""The learning benchmark: its table by hand, its sentences, and one whole run with random models."""

import json

import pytest

from benchmarks import ppo_learning
from benchmarks.ppo_learning import flags_of_ours, groups, main, parse, prompts_of_ours, table
from tests.launching import succeed


@pytest.mark.fast
def test_cpu_time_is_compared_with_trl_of_the_same_seed():
    point = {"gold": 0.8, "gold_se": 0.01, "kl": 1.5, "ended": 1.0, "length": 9.0}
    rows = [("trl", 1, 40.0), ("gae", 1, 10.0), ("gae", 2, 5.0)]
    lines = table([point | {"method": method, "seed": seed, "cpu_seconds": cpu} for method, seed, cpu in rows])
    assert [line[-1] for line in lines] == ["0.25", "", ""]
    assert lines[0][:4] == [1, "gae", "0.800 ± 0.010", "1.50"]


@pytest.mark.fast
def test_gae_runs_beside_trl():
    assert groups(parse([])) == [["gae"], ["grpo", "rloo"], ["reinforce++"]]
    assert groups(parse(["--trl-python", "python"]))[0] == ["gae", "trl"]


@pytest.mark.fast
def test_an_interpreter_without_trl_is_refused(tmp_path, capsys):
    assert main(["--smoke", "--output", str(tmp_path / "out"), "--trl-python", str(tmp_path / "python")]) == 2
    error = capsys.readouterr().err
    assert "--trl-python" in error and "trl 1.12.0 is expected" in error
    assert not (tmp_path / "out").exists()


def forked(commands, args) -> None:
    """Stands for run_side_by_side: the runs import nothing anew."""
    for (_, _, module, *flags), _ in commands:
        succeed(module, list(map(str, flags)))


def test_smoke(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(ppo_learning, "run_side_by_side", forked)
    assert main(["--smoke", "--output", str(tmp_path)]) == 0
    shown = capfd.readouterr().out
    assert "TRL is left out" in shown and "| 1 | gae |" in shown
    (point,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert point["kl"] > 0.01, "the policy never moved"
    assert point["seconds"] > 0 and point["cpu_seconds"] > 0
    rollouts = prompts_of_ours(flags_of_ours("gae", 1, tmp_path, parse(["--smoke", "--output", str(tmp_path)])))
    assert [len(rows) for rows in rollouts] == [8, 8], "what TRL would be given are not the prompts of each rollout"
    assert main(["--smoke", "--output", str(tmp_path)]) == 2
    assert "results of an earlier run" in capfd.readouterr().err
