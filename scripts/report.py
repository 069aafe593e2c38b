"""Write a page about a run: its metrics, answers before and after, small curves. One HTML file that needs nothing else.

    python -m scripts.report --run output/demo --output report.html
    python -m scripts.report --run output/demo --picture docs/images/demo_ppo.svg

The run is the output folder of a step (it holds metrics.jsonl) or a folder of such folders; what is there already is shown.
--picture draws the gold score and KL over PPO's rollouts; the README's comes from

    python -m scripts.demo --ppo_flags "--reward_function scripts/demo/score.py:reward --reward_weights 1,0"
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from math import log10
from pathlib import Path
from typing import Any

from errors import UserError, told
from steps import SECTIONS, step_of
from training.utils.run.metrics import format_figure, format_seconds, read_metrics

# name in metrics.jsonl (after train/ or eval/) -> title, in the order of the page; TensorBoard shows the others.
CURVES = {
    "loss": "Loss, nats",
    "perplexity": "Held-out perplexity",
    "accuracy": "Held-out accuracy, share of pairs",
    "margin": "Implicit reward: chosen - rejected, beta x nats",
    "score": "Score by the reward model",
    "score_reward": "Gold score, 0 to 1",  # by scripts/demo/score.py:reward
    "score_vader": "Gold score by VADER",
    "kl": "KL to the reference, nats an answer",
    "length": "Length of answers, tokens",
    "eos_rate": "Share of answers that ended by themselves",
}
COLOURS = {"train": "#2a6fb0", "eval": "#d1661b"}
PICTURE = ("score_reward", "kl")
MARGIN, GUTTER = 6, 36  # pixels around a curve, and left of it for its range

# preset -> name of its gold score, targets (accuracy of the reward model, gold score, ended answers, KL), and a note.
PRESETS = {
    "demo": (
        "gold score of answers (0 to 1)",
        ("0.90 or more", "0.85 or more, 0.25 above before", "0.95 or more", ""),
        "The gold score is a rule that training never saw.",
    ),
    "smollm2": (
        "VADER score of answers (-1 to 1)",
        ("", "twice that before", "", "20 or less"),
        "The score is a part of the reward in step 3 (reward_weights in the settings); the prompts are new.",
    ),
}

STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; color: #222; margin: 2rem auto; max-width: 72rem }
h2 { font-size: 1.25rem; border-bottom: 1px solid #ddd } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid #e5e5e5 }
.summary :is(td, th):is(:nth-child(2), :nth-child(3)) { text-align: right; white-space: nowrap }
.answers td { white-space: pre-wrap; overflow-wrap: anywhere } .good { color: #1a7f37 } .bad { color: #b3261e }
.curves { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; font-size: .8rem } svg { background: #f8f8f8 }
"""


def headline(section: str) -> str:
    """Return the title of a step's results: "Step 2: reward model", "DPO"; any other folder keeps its name."""
    if section not in SECTIONS:
        return section
    step = step_of(section)
    return f"Step {step.number}: {step.title}" if step.choice.isdigit() else step.title


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return a summary as rows of text: metric, before, after, target ("" where there is none)."""
    sft, reward, ppo = (summary[name] for name in ("sft", "reward", "ppo"))
    gold, targets, _ = PRESETS[summary.get("preset", "demo")]
    perplexities = f"{sft['perplexity_before']:.1f}", f"{sft['perplexity_after']:.2f}"
    rows = [
        ("SFT: perplexity of held-out answers", *perplexities, ""),
        ("Reward model: accuracy on held-out pairs", "", f"{reward['accuracy']:.3f}", targets[0]),
        (f"PPO: {gold}", f"{ppo['gold_score_before']:.3f}", f"{ppo['gold_score_after']:.3f}", targets[1]),
        ("PPO: length of answers, tokens", f"{ppo['length_before']:.1f}", f"{ppo['length_after']:.1f}", ""),
        ("PPO: answers that ended by themselves", "", f"{ppo['eos_rate']:.3f}", targets[2]),
        ("PPO: KL to the SFT model, nats an answer", "", f"{ppo['kl']:.2f}", targets[3]),
    ]
    if "gold_score_pretrained" in ppo:
        rows.insert(0, (f"Pretrained model: {gold}", f"{ppo['gold_score_pretrained']:.3f}", "", ""))
    rows += [(f"Time: {name}", "", format_seconds(value), "") for name, value in summary["seconds"].items()]
    if "cpu_seconds" in summary:
        rows.append(("Processor time: total", "", format_seconds(summary["cpu_seconds"]["total"]), ""))
    return [*rows, ("Memory: largest process, GB", "", f"{summary['peak_memory_gb']:.2f}", "")]


def run_folders(folder: Path) -> list[Path]:
    """Return the folder itself and the folders in it, where they hold metrics; the steps first. Raise UserError if none does."""
    order = {section: number for number, section in enumerate(SECTIONS)}
    children = sorted(folder.iterdir(), key=lambda child: (order.get(child.name, 9), child.name)) if folder.is_dir() else []
    runs = [run for run in (folder, *children) if (run / "metrics.jsonl").is_file()]
    if not runs:
        raise UserError(f"--run {folder}: no metrics.jsonl in it, nor in the folders in it; name the --output_dir of a step.")
    return runs


def read_curves(metrics: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) pairs of one metric under "train" and "eval", as far as the run logged them."""
    return {part: points for part in COLOURS if (points := read_metrics(metrics, f"{part}/{name}"))}


def draw_curve(curves: dict[str, list[tuple[int, float]]], width: int = 250, height: int = 90) -> str:
    """Return one SVG of "train" and "eval" curves, (step, value) pairs, with their range at its left edge."""
    steps, values = zip(*(point for points in curves.values() for point in points), strict=True)
    low, high = min(values), max(values)
    scale = log10 if 0 < 50 * low < high else float  # logarithmic for a perplexity from a random start

    def share(value: float, least: float, most: float) -> float:
        return (value - least) / (most - least) if most > least else 0.5

    drawn = [f'<text x="2" y="{y}" font-size="9">{format_figure(value)}</text>' for y, value in ((10, high), (height - 2, low))]
    for part, points in curves.items():
        places = [
            (
                GUTTER + (width - GUTTER - MARGIN) * share(step, min(steps), max(steps)),
                height - MARGIN - (height - 2 * MARGIN) * share(scale(value), scale(low), scale(high)),
            )
            for step, value in points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[part]}" stroke-width="1.5"/>')
        drawn.append('<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="{}"/>'.format(*places[-1], COLOURS[part]))
    return f'<svg width="{width}" height="{height}">{"".join(drawn)}</svg>'


def draw_picture(metrics: Path) -> str:
    """Return an SVG file of the curves in PICTURE side by side. Raise UserError where the run did not log one of them."""
    width, height = 390, 190
    shown = ['<rect width="100%" height="100%" fill="#f8f8f8"/>']
    for number, name in enumerate(PICTURE):
        curves = read_curves(metrics, name) if metrics.is_file() else {}
        if "train" not in curves:
            raise UserError(f"--picture: no train/{name} in {metrics}; see --help for the run that logs it.")
        title = f'<text x="{GUTTER}" y="-8">{escape(CURVES[name])}, over {curves["train"][-1][0]} rollouts</text>'
        shown.append(f'<g transform="translate({number * width},24)">{title}{draw_curve(curves, width, height)}</g>')
    for part, title, x in (("train", "answers of each rollout", GUTTER), ("eval", "held-out prompts", 200)):
        shown.append(f'<text x="{x}" y="{height + 36}" font-size="10" fill="{COLOURS[part]}">{title}</text>')
    size = f'width="{2 * width}" height="{height + 44}" font-family="sans-serif" font-size="13"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *shown, "</svg>\n"])


def curve_section(run: Path) -> str:
    """Return small curves of all metrics in CURVES that a run has values for."""
    figures = []
    for name, title in CURVES.items():
        if curves := read_curves(run / "metrics.jsonl", name):
            last = ", ".join(f"{part} {format_figure(points[-1][1])}" for part, points in curves.items())
            caption = f"<figcaption>{escape(title)}<br>{last}</figcaption>"
            figures.append(f'<figure id="{escape(run.name)}-{name}">{draw_curve(curves)}{caption}</figure>')
    return f'<h2>{escape(headline(run.name))}</h2>\n<div class="curves">{"".join(figures)}</div>'


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of texts that are already HTML."""
    lines = [("th", head), *(("td", row) for row in rows)]
    body = ("".join(f"<{tag}>{cell}</{tag}>" for cell in cells) for tag, cells in lines)
    return f'<table class="{name}">{"".join(f"<tr>{line}</tr>" for line in body)}</table>'


def summary_section(file: Path) -> str:
    """Return the table of summary.json. Raise UserError if the file is damaged."""
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        rows = [tuple(map(escape, row)) for row in summary_rows(summary)]
        note = f"Measured on held-out prompts, seed {summary['seed']}. {PRESETS[summary.get('preset', 'demo')][2]}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} is no whole summary ({reason}); run the demo again, or remove the file.") from error
    return f"<h2>Summary</h2><p>{note}</p>" + table("summary", ("", "before", "after", "target"), rows)


def read_records(file: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def answer_section(file: Path, count: int = 24) -> str:
    """Return answers before and after PPO side by side, the prompts evenly taken from all."""
    answers = read_records(file)
    rows = []
    for row in answers[:: max(1, len(answers) // count)][:count]:
        before, after = ((escape(row[when]), mark(row[f"gold_{when}"])) for when in ("before", "after"))
        rows.append((escape(row["prompt"].strip()), *before, *after))
    note = f"{len(rows)} of {len(answers)} held-out prompts; the answers are sampled at temperature 1."
    head = ("prompt", "SFT model", "gold", "after PPO", "gold")
    return f"<h2>Answers before and after PPO</h2><p>{note}</p>" + table("answers", head, rows)


def mark(gold: float) -> str:
    """Return a gold score, green where the answer is wholly right and red where it is mostly not."""
    return f'<span class="{"good" if gold == 1 else "bad" if gold < 0.5 else ""}">{gold:.2f}</span>'


def sample_section(file: Path, count: int = 8) -> str:
    """Return the last answers that PPO wrote down itself, with the reward model's score."""
    samples = read_records(file)
    last = max((sample["step"] for sample in samples), default=0)
    shown = [row for row in samples if row["step"] == last][:count]
    rows = [(escape(row["prompt"].strip()), escape(row["answer"]), format_figure(row["score"])) for row in shown]
    return f"<h2>Answers after rollout {last}</h2>" + table("answers", ("prompt", "answer", "score"), rows)


def write_report(folder: Path, output: Path) -> None:
    """Write the page about a run folder. Raise UserError if there is no run in it."""
    runs = run_folders(folder)
    sections = [summary_section(folder / "summary.json")] if (folder / "summary.json").is_file() else []
    if (folder / "answers.jsonl").is_file():
        sections.append(answer_section(folder / "answers.jsonl"))
    else:
        sections += [sample_section(run / "samples.jsonl") for run in runs if (run / "samples.jsonl").is_file()]
    sections += map(curve_section, runs)
    title = f"Sanbu: {escape(folder.name)}"
    head = f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([head, f"<h1>{title}</h1>", *sections, ""]), encoding="utf-8")


@told
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 with one line if there is nothing to show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of a step, or a folder of such folders")
    parser.add_argument("--output", type=Path, help="the page; report.html in the run folder if not given")
    parser.add_argument("--picture", type=Path, help="also draw the gold score and KL over PPO's rollouts into this SVG file")
    args = parser.parse_args(argv)
    output = args.output or args.run / "report.html"
    write_report(args.run, output)
    if args.picture:
        args.picture.write_text(draw_picture(args.run / "ppo" / "metrics.jsonl"), encoding="utf-8")
    print(f"Wrote {output}" + (f" and {args.picture}" if args.picture else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
