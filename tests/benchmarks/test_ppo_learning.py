"""The learning benchmark: its arithmetic by hand, its gold score of words, and one whole run with random models."""

import json

import pytest

from benchmarks import ppo_learning
from benchmarks.ppo_learning import Budget, groups, main, parse
from benchmarks.ppo_learning_clock import Clock
from benchmarks.ppo_learning_report import (
    at_equal_kl,
    best_within,
    comparisons,
    crossings,
    curves,
    time_to_their_gold,
    trl_table,
)
from benchmarks.ppo_learning_tasks import BLAME, PRAISE, sentiment

START = {"task": "demo", "method": "sft", "seed": 0, "rollout": 0, "seconds": 0.0, "cpu_seconds": 0.0}


def point(method: str, rollout: int, seconds: float, gold: float, kl: float) -> dict:
    here = {"method": method, "seed": 1, "rollout": rollout, "seconds": seconds, "cpu_seconds": seconds / 2}
    return START | here | {"gold": gold, "gold_se": 0.03, "kl": kl, "kl_se": 0.1, "length": 9.0, "ended": 1.0}


@pytest.fixture
def found():
    """Ours rises in KL 0, 2, 4 to gold 0.5, 0.7, 0.8; TRL in KL 0, 1, 3 to 0.5, 0.55, 0.6 and takes four times as long."""
    points = [point("gae", 20, 20.0, 0.8, 4.0), point("gae", 10, 10.0, 0.7, 2.0)]   # in any order
    points += [point("trl", 10, 40.0, 0.55, 1.0), point("trl", 20, 80.0, 0.6, 3.0)]
    return curves([START | {"gold": 0.5, "gold_se": 0.04, "kl": 0.0, "kl_se": 0.0, "length": 9.0, "ended": 1.0}, *points])


def test_curves_begin_with_the_sft_model_and_follow_the_rollouts(found):
    assert {key[2] for key in found} == {"gae", "trl"}
    assert [p["rollout"] for p in found["demo", 1, "gae"]] == [0, 10, 20]
    assert [p["gold"] for p in found["demo", 1, "gae"]] == [0.5, 0.7, 0.8]


def test_gold_at_equal_kl_by_hand(found):
    # TRL comes to KL 3, ours to 4; at 3 ours is half way between 2 and 4: (0.7 + 0.8) / 2
    there = at_equal_kl(found["demo", 1, "gae"], found["demo", 1, "trl"])
    assert there == pytest.approx({"kl": 3.0, "ours": 0.75, "theirs": 0.6, "se": (0.03**2 + 0.03**2) ** 0.5})


def test_a_run_is_not_compared_beyond_the_kl_that_it_reached(found):
    short = found["demo", 1, "gae"][:2]   # to KL 2, where TRL is half way between 1 and 3
    assert at_equal_kl(short, found["demo", 1, "trl"]) | {"se": 0} == pytest.approx(
        {"kl": 2.0, "ours": 0.7, "theirs": 0.575, "se": 0}
    )


def test_time_to_a_gold_score_by_hand(found):
    ours, theirs = found["demo", 1, "gae"], found["demo", 1, "trl"]
    # 0.6 is half way from 0.5 to 0.7, which took 10 s
    assert time_to_their_gold(ours, theirs, "seconds") == pytest.approx((5.0, 80.0))
    assert time_to_their_gold(theirs, ours, "seconds") == (None, 20.0)   # never comes to 0.8
    [row] = comparisons(found)
    assert row["to_gold_cpu_seconds"] == pytest.approx(2.5 / 40)
    assert row["whole_seconds"] == pytest.approx(20 / 80)


def test_wall_times_are_compared_only_of_runs_side_by_side(found):
    start, *ours = found["demo", 1, "gae"]
    more = curves([start, *(dict(p, method="rloo") for p in ours), *found["demo", 1, "trl"][1:]])
    [row] = comparisons(more)
    assert {name for name in row if "seconds" in name} == {"to_gold_cpu_seconds", "whole_cpu_seconds"}
    assert trl_table(more)[-1].endswith("| - | 0.06 | - | 0.25 |")


def test_a_curve_that_turns_back(found):
    curve = [*found["demo", 1, "gae"], point("gae", 30, 30.0, 0.9, 3.0)]   # KL 0, 2, 4, 3; gold 0.5, 0.7, 0.8, 0.9
    assert [there["gold"] for there in crossings(curve, "kl", 3.5)] == pytest.approx([0.775, 0.85])
    assert best_within(curve, 3.5)["gold"] == 0.9     # its end lies within
    assert best_within(curve, 2.5)["gold"] == pytest.approx(0.725)
    assert best_within(curve, 99.0)["gold"] == 0.9
    assert crossings(curve, "kl", 4.5) == []


def test_words_of_praise_and_blame():
    praise, blame = set(PRAISE.split()), set(BLAME.split())
    assert not praise & blame
    assert sentiment((), "it is a film .") == 0.5
    assert sentiment((), "A charming, funny film") == 1.0
    assert sentiment((), "charming charming charming") == 0.75   # said three times is said once
    assert sentiment((), "funny, but dull and flat") == 0.25
    assert sentiment((), "awful dull flat stupid mess") == 0.0
    assert sentiment((), "badly refunds") == 0.5   # parts of words are no words


def test_copies_and_pairs():
    assert Budget(rollouts=30, copies=4).snapshots == [8, 15, 22, 30]
    assert groups(parse([])) == [["gae"], ["grpo", "rloo"], ["reinforce++"]]
    assert groups(parse(["--trl-python", "python"]))[0] == ["gae", "trl"]


def test_copies_are_not_on_the_clock(tmp_path, monkeypatch):
    now = iter([10.0, 13.0, 23.0, 24.0, 24.0])   # start, rollout 1 done, its copy taken, rollout 2 done, running again
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(tmp_path, [1])
    clock.start()
    clock.rollout_done(1, lambda folder: folder.mkdir(), {})
    clock.rollout_done(2, lambda folder: folder.mkdir(), {})
    assert clock.seconds == 4.0
    assert [folder.name for folder in tmp_path.glob("rollout-*")] == ["rollout-1"]


def test_an_interpreter_without_trl_is_refused(tmp_path, capsys):
    assert main(["--smoke", "--output", str(tmp_path / "out"), "--trl-python", str(tmp_path / "python")]) == 2
    said = capsys.readouterr().err
    assert "--trl-python" in said and "trl 1.12.0 is expected" in said
    assert not (tmp_path / "out").exists()


def test_smoke(tmp_path, capfd):
    assert main(["--smoke", "--output", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert "TRL is left out" in said
    points = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(p["method"], p["rollout"]) for p in points] == [("sft", 0), ("gae", 1), ("gae", 2)]
    start, first, last = points
    assert abs(start["kl"]) < 1e-4, "the SFT model is not itself"
    assert first["kl"] > 0.01 and last["kl"] > 0.01, "the copies are of a policy that never moved"
    assert 0 < first["seconds"] < last["seconds"] and 0 < first["cpu_seconds"] < last["cpu_seconds"]
    assert (tmp_path / "ppo_learning_demo.png").stat().st_size > 5000
    assert "| demo | 1 | gae |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    rollouts = json.loads((tmp_path / "demo/prompts-2x8-1.json").read_text(encoding="utf-8"))
    assert [len(rows) for rows in rollouts] == [8, 8], "what TRL would be given are not the prompts of each rollout"
    # What is done is not done again.
    before = len(points)
    assert main(["--smoke", "--output", str(tmp_path)]) == 0
    assert "nothing to do" in capfd.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()) == before


def test_a_folder_holds_one_experiment(tmp_path, capsys, monkeypatch):
    """Other settings would be answered from old results, or mixed with them."""
    monkeypatch.setattr(ppo_learning, "prepare_smoke", lambda *_: None)
    monkeypatch.setattr(ppo_learning, "train_and_judge", lambda *_: None)
    monkeypatch.setattr(ppo_learning, "report", lambda *_, **__: None)
    words = ["--smoke", "--output", str(tmp_path)]
    assert main(words) == 0 and main([*words, "--seeds", "2"]) == 0
    capsys.readouterr()
    for more, said in (
        (["--kl_coef", "9"], "was begun with kl_coef 0.1, now it is 9.0; name another --output"),
        (["--rollouts", "3", "--answers", "1"], "was begun with rollouts 2, now it is 3;"),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    (tmp_path / "settings.json").unlink()
    assert main(words) == 0, "nothing was measured yet"
    (tmp_path / "settings.json").unlink()
    (tmp_path / "results.jsonl").write_text("")
    assert main(words) == 2 and "results without settings.json" in capsys.readouterr().err
