"""A page about a run: its figures, curves, answers before and after, settings. One HTML file that needs nothing else.

    python -m scripts.report --run output/demo --output report.html

The run is the output folder of a step (it holds metrics.jsonl) or a folder of such folders; what is
there already is shown.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from errors import UserError, told
from training.utils.run.metrics import format_figure, format_seconds, read_metrics

TITLES = {
    "sft": "Step 1: supervised fine-tuning", "reward": "Step 2: reward model", "ppo": "Step 3: PPO", "dpo": "DPO",
}  # fmt: skip

# name in metrics.jsonl (after train/ or eval/), title, unit; in the order of the page.
CURVES = (
    ("loss", "Loss", "nats"),
    ("perplexity", "Held-out perplexity", ""),
    ("accuracy", "Held-out accuracy", "share of pairs"),
    ("margin", "Implicit reward: chosen - rejected", "beta x nats"),
    ("score", "Score by the reward model", "its own unit"),
    ("score_vader", "Gold score by VADER", "-1 to 1"),
    ("kl", "KL to the reference", "nats an answer"),
    ("length", "Length of answers", "tokens"),
    ("eos_rate", "Answers that ended by themselves", "share"),
    ("actor_loss", "Loss of the actor", ""),
    ("critic_loss", "Loss of the critic", ""),
    ("clip_share", "Clipped ratios", "share of tokens"),
    ("explained_variance", "Variance that the critic explains", "share"),
)
PARTS = {"train": ("training", "#2a6fb0"), "eval": ("held-out", "#d1661b")}

STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; color: #222; background: #fff;
       margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; vertical-align: top; padding: .35rem .7rem;
       border-bottom: 1px solid #e5e5e5 } th { font-weight: 600; background: #f6f6f6 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem }
figure { margin: 0 } figure svg { width: 100%; height: auto }
.answers td { white-space: pre-wrap; overflow-wrap: anywhere; width: 28% } .answers td.number { width: 4% }
.good { color: #1a7f37 } .bad { color: #b3261e } .note { color: #666 }
summary { cursor: pointer } pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .85rem }
"""


# What a preset calls its gold score, and what is hoped for: accuracy of the reward model, gold score, ended answers, KL.
GOALS = {
    "demo": ("gold score of answers (0 to 1)", "0.90 or more", "0.85 or more, 0.25 above before", "0.95 or more", ""),
    "smollm2": ("VADER score of answers (-1 to 1)", "", "twice that before", "", "20 or less"),
}

SEEN = {
    "demo": "The gold score is a rule that training never saw.",
    "smollm2": "The score is a part of the reward in step 3 (reward_weights in the settings); the prompts are new.",
}


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """A summary as rows of text: figure, before, after, what is hoped for ("" where nothing is)."""
    sft, reward, ppo, seconds = (summary[name] for name in ("sft", "reward", "ppo", "seconds"))
    gold, *hopes = GOALS[summary.get("preset", "demo")]
    pretrained, cpu = ppo.get("gold_score_pretrained"), summary.get("cpu_seconds")
    return [
        *([] if pretrained is None else [(f"Pretrained model: {gold}", f"{pretrained:.3f}", "", "")]),
        ("SFT: perplexity of held-out answers", f"{sft['perplexity_before']:.1f}", f"{sft['perplexity_after']:.2f}",
         ""),
        ("Reward model: accuracy on held-out pairs", "", f"{reward['accuracy']:.3f}", hopes[0]),
        (f"PPO: {gold}", f"{ppo['gold_score_before']:.3f}", f"{ppo['gold_score_after']:.3f}", hopes[1]),
        ("PPO: length of answers, tokens", f"{ppo['length_before']:.1f}", f"{ppo['length_after']:.1f}", ""),
        ("PPO: answers that ended by themselves", "", f"{ppo['eos_rate']:.3f}", hopes[2]),
        ("PPO: KL to the SFT model, nats an answer", "", f"{ppo['kl']:.2f}", hopes[3]),
        *((f"Time: {name}", "", format_seconds(value), "") for name, value in seconds.items()),
        *([] if cpu is None else [("Processor time: total", "", format_seconds(cpu["total"]), "")]),
        ("Memory: largest process, GB", "", f"{summary['peak_memory_gb']:.2f}", ""),
    ]  # fmt: skip


def run_folders(folder: Path) -> list[Path]:
    """The folder itself and the folders in it, where they hold metrics; the steps first, in their order.

    Raises UserError if none does.
    """
    order = list(TITLES)
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    children.sort(key=lambda child: order.index(child.name) if child.name in order else len(order))
    found = [place for place in (folder, *children) if (place / "metrics.jsonl").is_file()]
    if not found:
        raise UserError(
            f"--run {folder}: no metrics.jsonl in it, nor in the folders in it; name the --output_dir of a step."
        )
    return found


def draw_curve(curves: dict[str, list[tuple[int, float]]], title: str, unit: str, x_label: str, salt: str) -> str:
    """One figure as SVG text. curves: part ("train", "eval") -> (step, value) pairs. salt: different for each figure of
    a page, or their ids are the same.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "axes.grid": True, "grid.color": "#e5e5e5"}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(4.4, 2.9), layout="constrained")
        for part, points in curves.items():
            label, colour = PARTS[part]
            marker = "o" if len(points) < 25 else ""
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=3, linewidth=1.5)
        lowest, highest = (pick(value for points in curves.values() for _, value in points) for pick in (min, max))
        if 0 < 50 * lowest < highest:  # a perplexity from a random start
            axes.set_yscale("log")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(x_label)
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=9)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # the XML declaration has no place inside HTML


def curve_section(run: Path) -> str:
    """All curves that a run's metrics.jsonl has values for."""
    metrics = run / "metrics.jsonl"
    x_label = "rollout" if read_metrics(metrics, "train/actor_loss") else "optimizer step"
    figures = []
    for name, title, unit in CURVES:
        curves = {part: read_metrics(metrics, f"{part}/{name}") for part in PARTS}
        curves = {part: points for part, points in curves.items() if points}
        if curves:
            anchor = escape(f"{run.name}-{name}")
            figures.append(f'<figure id="{anchor}">{draw_curve(curves, title, unit, x_label, salt=anchor)}</figure>')
    return f'<h2>{escape(TITLES.get(run.name, run.name))}</h2>\n<div class="curves">{"".join(figures)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int], name: str) -> str:
    """An HTML table of texts that are already HTML; numbers: the columns that are set to the right."""
    kinds = [' class="number"' if column in numbers else "" for column in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        cells = [f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)]
        return f"<tr>{''.join(cells)}</tr>"

    return f'<table class="{name}">{line("th", head)}{"".join(line("td", row) for row in rows)}</table>'


def summary_section(file: Path) -> str:
    """The table of summary.json. UserError if the file is damaged."""
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        rows = [tuple(map(escape, row)) for row in summary_rows(summary)]
        seen = SEEN[summary.get("preset", "demo")]
        note = f"Measured on held-out prompts, seed {summary['seed']}. {seen}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is no whole summary ({type(error).__name__}: {error}); run the demo again, or remove the file for a page "
            "without it."
        ) from error
    head = ("", "before", "after", "hoped for")
    return f'<h2>Summary</h2><p class="note">{note}</p>' + table(head, rows, (1, 2), "summary")


def answer_section(file: Path, rows: int = 24) -> str:
    """Answers before and after PPO side by side, the prompts evenly taken from all."""
    answers = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    shown = answers[:: max(1, len(answers) // rows)][:rows]
    cells = [
        (escape(row["prompt"].strip()), escape(row["before"]), score(row["gold_before"]), escape(row["after"]),
         score(row["gold_after"]))
        for row in shown
    ]  # fmt: skip
    note = f"{len(shown)} of {len(answers)} held-out prompts; the answers are sampled at temperature 1."
    head = ("prompt", "SFT model", "gold", "after PPO", "gold")
    return f"<h2>Answers before and after PPO</h2><p class='note'>{note}</p>" + table(head, cells, (2, 4), "answers")


def score(value: float) -> str:
    """A gold score, green where the answer is wholly right and red where it is mostly not."""
    kind = "good" if value == 1 else "bad" if value < 0.5 else ""
    return f'<span class="{kind}">{value:.2f}</span>'


def sample_section(file: Path, rows: int = 8) -> str:
    """The last held-out answers that PPO wrote down itself, with the reward model's score."""
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    last = max((sample["step"] for sample in samples), default=0)
    cells = [
        (escape(row["prompt"].strip()), escape(row["answer"]), format_figure(row["score"]))
        for row in samples if row["step"] == last
    ][:rows]  # fmt: skip
    return f"<h2>Answers after rollout {last}</h2>" + table(("prompt", "answer", "score"), cells, (2,), "answers")


def settings_section(runs: Sequence[Path]) -> str:
    """Every flag of each finished step."""
    parts = []
    for run in runs:
        done = run / "sanbu_done.json"
        if done.is_file():
            flags = json.loads(done.read_text(encoding="utf-8"))["flags"]
            lines = "\n".join(f"{name}: {value}" for name, value in sorted(flags.items()))
            name = escape(TITLES.get(run.name, run.name))
            parts.append(f"<details><summary>{name}</summary><pre>{escape(lines)}</pre></details>")
    return "<h2>Settings</h2>" + "".join(parts) if parts else ""


def write_report(folder: Path, output: Path) -> None:
    """Write the page about a run folder. Raises UserError if there is no run in it."""
    runs = run_folders(folder)
    sections = []
    if (folder / "summary.json").is_file():
        sections.append(summary_section(folder / "summary.json"))
    sections += map(curve_section, runs)
    if (folder / "answers.jsonl").is_file():
        sections.append(answer_section(folder / "answers.jsonl"))
    else:
        sections += [sample_section(run / "samples.jsonl") for run in runs if (run / "samples.jsonl").is_file()]
    sections.append(settings_section(runs))
    title = f"Sanbu: {escape(folder.name)}"
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    body = "\n".join([f"<h1>{title}</h1>", *sections])
    page = f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>{body}</body>\n</html>\n'
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


@told
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 with one line if there is nothing to show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of a step, or a folder of such folders")
    parser.add_argument("--output", type=Path, help="the page; report.html in the run folder if not given")
    args = parser.parse_args(argv)
    output = args.output or args.run / "report.html"
    write_report(args.run, output)
    print(f"Wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
