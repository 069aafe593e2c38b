"""metrics.jsonl, its rewinding, and the progress line."""

import json

import pytest

from training.utils.run.metrics import Metrics, format_seconds, progress_line, read_metrics

pytestmark = pytest.mark.fast


def test_values_are_written_and_read_back_by_key(tmp_path):
    metrics = Metrics(tmp_path, enabled=True, tensorboard=str(tmp_path / "tb"))
    metrics.log(1, {"loss": 2.5})
    metrics.log(1, {"perplexity": 9.0}, prefix="eval")
    metrics.log(2, {"loss": 2.0})
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl", "train/loss") == [(1, 2.5), (2, 2.0)]
    assert read_metrics(tmp_path / "metrics.jsonl", "eval/perplexity") == [(1, 9.0)]
    assert list((tmp_path / "tb").glob("events.*"))


def test_rewind_drops_later_steps_and_a_line_that_a_kill_cut(tmp_path):
    metrics = Metrics(tmp_path, enabled=True)
    for step in (1, 2, 3):
        metrics.log(step, {"loss": float(step)})
    with metrics.path.open("a") as file:
        file.write('{"step": 2, "train/lo')
    metrics.rewind(2)
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2]


def test_rewind_takes_the_samples_too_and_loses_nothing_when_it_is_killed(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, enabled=True)
    rows = [json.dumps({"step": step, "answer": "a\u2028b\u0085 你"}, ensure_ascii=False) + "\n" for step in (1, 2, 3)]
    metrics.samples.write_bytes("".join(rows).encode()[:-6])   # cut within a letter
    metrics.rewind(2)
    assert metrics.samples.read_text(encoding="utf-8") == "".join(rows[:2])

    def killed(self, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.rewind(1)
    assert metrics.samples.read_text(encoding="utf-8") == "".join(rows[:2])


def test_other_processes_write_nothing(tmp_path):
    metrics = Metrics(tmp_path, enabled=False)
    metrics.log(1, {"loss": 1.0})
    metrics.rewind(0)
    assert not list(tmp_path.iterdir())


def test_progress_line_extrapolates_the_time_left():
    # 30 of 50 steps since the resume at 20 took 60 s: 2 s a step, 50 steps are left.
    assert progress_line(50, 100, {"loss": 0.12345, "tokens/s": 1234.4}, 60.0, 30) == (
        "step 50/100  loss 0.1235  tokens/s 1234  left 1:40"
    )
    assert format_seconds(3725) == "1:02:05"
