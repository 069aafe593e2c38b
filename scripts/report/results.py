"""The results of a run as rows of text: what each step changed, and what the demo measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from json_text import parse_json
from scripts.report.runs import StepRun
from scripts.report.words import ON, RESULTS, choose, word
from training.utils.run.metrics import format_seconds, rounded

Row = tuple[str, str, str, str]  # metric, before, after, target; "" where there is none

DECIMALS = {"length": 1, "perplexity": 2, "kl": 2}  # 3 elsewhere
NO_BEFORE = (("reward", "accuracy"), ("dpo", "accuracy"), ("dpo", "margin"), ("ppo", "win_rate"), ("ppo", "kl"))

# preset of the demo -> name of its gold score, targets by metric, and a note.
PRESETS = {
    "demo": (
        ("gold score of answers (0 to 1)", "回答的金标准得分（0 到 1）"),
        {
            "accuracy": ("0.90 or more", "不低于 0.90"),
            "gold": ("0.85 or more, 0.25 above before", "不低于 0.85，并比之前高 0.25"),
            "eos_rate": ("0.95 or more", "不低于 0.95"),
        },
        ("The gold score is a rule that training never saw.", "金标准得分是一条训练从未见过的规则。"),
    ),
    "smollm2": (
        ("VADER score of answers (-1 to 1)", "回答的 VADER 得分（-1 到 1）"),
        {"gold": ("twice that before", "之前的两倍"), "kl": ("20 or less", "不高于 20")},
        (
            "The score is a part of the reward in step 3; the prompts are new.",
            "这个得分是第三步奖励的一部分；提示是新的。",
        ),
    ),
}


def result_rows(runs: Sequence[StepRun], language: str = "en", summary: dict[str, Any] | None = None) -> list[Row]:
    """Return what each step changed. summary: of the demo, whose own measure stands in for PPO's then.

    Measured on held-out data, or, where a step has none, on training data, as the row then says. Before is the value at
    step 0. Raises KeyError, TypeError or ValueError for a summary that is not whole.
    """
    gold, targets, _ = PRESETS[(summary or {}).get("preset", "demo")]
    measured = measured_figures(summary["ppo"]) if summary else {}
    rows = []
    for (section, metric), titles in RESULTS.items():
        if summary and section == "ppo":
            found = [("held-out", measured[metric])] if metric in measured else []
        else:
            of_step = [run for run in runs if run.section == section]
            found = [
                ("held-out" if run.held_out else "training", pair) for run in of_step if (pair := before_and_after(run, metric))
            ]
        target = choose(targets[metric], language) if summary and metric in targets else ""
        for on, pair in found:
            title = choose(titles, language).format(gold=choose(gold, language), on=choose(ON[on], language))
            if on == "training" and "{on}" not in titles[0]:
                title = word("on_training", language, title=title)
            rows.append((title, *(shown(metric, value) for value in pair), target))
    return rows


def before_and_after(run: StepRun, metric: str) -> tuple[float | None, float] | None:
    """Return a metric of evaluation before the first step, where that says something, and after the last one.

    PPO without held-out prompts does not evaluate: the last rollout's then.
    """
    curve = run.curve(metric)
    points = curve.get("eval") or (curve.get("train") if run.section == "ppo" and not run.held_out else None)
    if not points:
        return None
    known = points[0][0] == 0 and len(points) > 1 and (run.section, metric) not in NO_BEFORE
    return points[0][1] if known else None, points[-1][1]


def measured_figures(ppo: dict[str, float]) -> dict[str, tuple[float | None, float]]:
    """Return the pairs of values that the demo measured itself."""
    figures = {
        "gold": (ppo["gold_score_before"], ppo["gold_score_after"]),
        "length": (ppo["length_before"], ppo["length_after"]),
        "eos_rate": (None, ppo["eos_rate"]),
        "kl": (None, ppo["kl"]),
    }
    return figures | (
        {"gold_pretrained": (ppo["gold_score_pretrained"], None)} if "gold_score_pretrained" in ppo else {}
    )


def shown(metric: str, value: float | None) -> str:
    """Return a value with the decimals that its metric deserves; a zero has no sign."""
    if value is None:
        return ""
    return rounded(value, 1 if value >= 1000 else DECIMALS.get(metric, 3))


def cost_rows(summary: dict[str, Any], language: str) -> list[Row]:
    """Return the demo's time by stage, and the memory that its largest process took."""
    rows = [
        (word("stage_time", language, name=name), "", format_seconds(value), "")
        for name, value in summary["seconds"].items()
    ]
    if "cpu_seconds" in summary:
        rows.append((word("cpu_time", language), "", format_seconds(summary["cpu_seconds"]["total"]), ""))
    return [*rows, (word("largest_memory", language), "", f"{summary['peak_memory_gb']:.2f}", "")]


def check_whole(summary: Any) -> None:
    """Raise an error that says what a summary lacks."""
    result_rows([], "en", summary)
    cost_rows(summary, "en")
    summary["seed"]


def read_summary(file: Path) -> dict[str, Any] | None:
    """Return the demo's summary.json; None if there is none. Raise UserError if it is not whole."""
    if not file.is_file():
        return None
    try:
        summary = parse_json(file.read_bytes())
        check_whole(summary)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} is no whole summary ({reason}); run the demo again, or remove the file.") from error
    return summary
