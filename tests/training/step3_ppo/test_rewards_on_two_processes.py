"""Rewards of several sources on two real processes: equal to one process, and nobody waits for one that failed."""

import pytest

from tests.launching import logged, start
from tests.several import run_several
from tests.training.step3_ppo.reward_runs import by_function, flags, write_all


@pytest.mark.distributed
def test_two_processes_equal_one_and_stop_together(tmp_path):
    folders = write_all(tmp_path / "start")
    more = [*by_function(folders, "length", "question", model=True), "--reward_weights", "1,2,0.5"]
    sharded = [*more, "--actor_zero_stage", "3", "--critic_zero_stage", "2"]
    run_several([("training.step3_ppo.main", flags(folders, tmp_path / "one", *more))], tmp_path, processes=1)
    run_several([("training.step3_ppo.main", flags(folders, tmp_path / "two", *sharded, processes=2))], tmp_path)
    names = ("train/score", "train/score_length", "train/actor_loss", "eval/score", "eval/win_rate", "eval/reference_score")
    for name in names:
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), abs=1e-4), name

    done = start("training.step3_ppo.main", flags(folders, tmp_path / "cut", *by_function(folders, "second"), processes=2), 2)
    errors = [line for line in done.stderr.splitlines() if "error: --reward_function" in line]
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert len(errors) == 1 and "ValueError: only here" in errors[0] and "f.py:second" in errors[0]
