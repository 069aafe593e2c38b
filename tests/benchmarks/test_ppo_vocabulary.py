"""The benchmark of vocabularies: one short run of ours, at a size that the tokenizer does not have."""

import json

import pytest

from benchmarks.ppo_vocabulary import main, seconds_a_rollout


def test_the_first_rollout_is_not_counted(tmp_path):
    lines = [{"rollout": rollout, "cpu_seconds": seconds} for rollout, seconds in ((1, 10.0), (2, 12.0), (3, 16.0))]
    (tmp_path / "clock.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert seconds_a_rollout(tmp_path) == 3.0


@pytest.mark.scripts
def test_a_short_run(tmp_path, capsys):
    assert main(["--vocabularies", "3000", "--rounds", "1", "--rollouts", "2", "--output", str(tmp_path)]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| 3000")]
    assert [row[2].strip() for row in rows] == ["gae", "rloo"]
    assert all(float(row[3].split()[0]) > 0 for row in rows)
    config = json.loads((tmp_path / "3000/demo/sft/config.json").read_text())
    assert config["vocab_size"] == 3000
