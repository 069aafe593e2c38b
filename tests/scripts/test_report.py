"""The page about a run: what is on it, and that it needs nothing else."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from errors import UserError
from scripts.report import draw_curve, main, write_report

pytestmark = pytest.mark.fast

SUMMARY = {
    "sft": {"perplexity_before": 1200.34, "perplexity_after": 3.125},
    "reward": {"accuracy": 0.9512},
    "ppo": {
        **{"gold_score_before": 0.5, "gold_score_after": 0.9001, "length_before": 15.0, "length_after": 12.5},
        **{"eos_rate": 0.9917, "kl": 7.25},
    },
    "seconds": {"sft": 100.0, "reward": 50.0, "ppo": 125.0, "total": 290.0},
    "peak_memory_gb": 1.234,
    "seed": 77,
}


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished demo with few metrics."""
    folder = tmp_path / "run"
    sft = [{"step": 0, "eval/perplexity": 900.0}, {"step": 10, "train/loss": 2.0, "train/lr": 0.1}]
    write_lines(folder / "sft/metrics.jsonl", [*sft, {"step": 20, "train/loss": 1.0}, {"step": 20, "eval/perplexity": 3.0}])
    write_lines(folder / "reward/metrics.jsonl", [{"step": 5, "train/loss": 0.6}, {"step": 5, "eval/accuracy": 0.9}])
    values = {"score": 0.5, "kl": 1.5, "length": 12.0, "eos_rate": 0.5, "actor_loss": 0.0}
    steps = [{"step": step, **{f"train/{name}": value + step for name, value in values.items()}} for step in (1, 2)]
    write_lines(folder / "ppo/metrics.jsonl", steps)
    answer = {"prompt": "user: 1 < 2 & 大海?", "before": "<b>no</b>", "after": "蓝色。"}
    write_lines(folder / "answers.jsonl", [answer | {"gold_before": 0.25, "gold_after": 1.0}])
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def test_page_shows_metrics_and_answers_of_all_steps_and_needs_nothing_else(run):
    write_report(run, run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    figures = dict(re.findall(r'<figure id="([^"]+)">(<svg.*?</svg>).*?</figure>', page, flags=re.DOTALL))
    assert figures.keys() == {
        *("sft-loss", "sft-perplexity", "reward-loss", "reward-accuracy"),
        *("ppo-score", "ppo-kl", "ppo-length", "ppo-eos_rate"),
    }
    assert all(ElementTree.fromstring(text).tag == "svg" for text in figures.values())
    for shown in ("1200.3", "0.951", "0.500", "0.900", "15.0", "12.5", "0.992", "7.25", "1:40", "4:50", "1.23", "seed 77"):
        assert shown in page
    assert "1 &lt; 2 &amp; 大海?" in page and "&lt;b&gt;no&lt;/b&gt;" in page and "<b>no</b>" not in page
    assert not re.search(r"<script|<link|<img|<iframe|\ssrc=|\shref=|@import|url\(", page)


def test_a_curve_has_every_point_and_a_logarithmic_scale_where_it_falls_far():
    (line,) = ElementTree.fromstring(draw_curve({"train": [(1, 4.0), (2, 3.0), (3, 2.0)]})).iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.2)
    assert points[0][1] < points[2][1]  # a falling loss; in SVG y grows downwards
    (line,) = ElementTree.fromstring(draw_curve({"eval": [(0, 1000.0), (1, 10.0), (2, 0.1)]})).iter("polyline")
    heights = [float(pair.split(",")[1]) for pair in line.get("points").split()]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_a_step_alone_shows_its_own_samples(tmp_path):
    write_lines(tmp_path / "x" / "metrics.jsonl", [{"step": 1, "train/actor_loss": 0.1}])
    sample = {"part": "eval", "prompt": "Human: hi", "score": 0.5}
    write_lines(
        tmp_path / "x" / "samples.jsonl", [sample | {"step": 1, "answer": "old"}, sample | {"step": 2, "answer": "new\u2028er"}]
    )
    write_report(tmp_path / "x", tmp_path / "sub" / "page.html")
    page = (tmp_path / "sub" / "page.html").read_text()
    assert "new" in page and "old" not in page


@pytest.mark.parametrize("text", ['{"seed": 1', '{"seed": 1}', "[]", '{"sft": 1, "reward": 1, "ppo": 1, "seconds": 1}'])
def test_a_damaged_summary_is_one_sentence(run, capsys, text):
    (run / "summary.json").write_text(text)
    assert main(["--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "summary.json is no whole summary" in error and error.count("\n") == 1


def test_the_picture_has_a_curve_of_the_gold_score_and_one_of_kl(run, capsys):
    """Of a run that logged both; else one sentence names what is missing."""
    picture = run / "picture.svg"
    assert main(["--run", str(run), "--picture", str(picture)]) == 2
    assert "no train/score_reward" in capsys.readouterr().err and not picture.exists()
    rows = [{"step": step, "train/score_reward": 0.5 + step / 10, "train/kl": step} for step in (1, 2, 3)]
    write_lines(run / "ppo" / "metrics.jsonl", rows)
    assert main(["--run", str(run), "--picture", str(picture)]) == 0
    root = ElementTree.fromstring(picture.read_text())
    lines = [one for one in root.iter() if one.tag.endswith("polyline")]
    assert [len(line.get("points").split()) for line in lines] == [3, 3]


def test_nothing_to_show_is_one_sentence(tmp_path, capsys):
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path, tmp_path / "page.html")
    assert main(["--run", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("error: --run")
