"""Draw curves of metrics as SVG."""

from html import escape
from math import ceil, log10

from errors import UserError
from scripts.report.runs import StepRun
from scripts.report.words import CURVES, choose, word
from training.utils.run.metrics import format_figure

COLOURS = {"train": "#2a6fb0", "eval": "#d1661b"}
PICTURE = ("score_reward", "kl")  # of draw_picture
TOP, RIGHT, BOTTOM, LEFT = 8, 8, 18, 44  # pixels around a curve, for what is written there
MOST = 400  # points drawn of a curve: more are closer together than pixels


def draw_curve(curves: dict[str, list[tuple[int, float]]], width: int = 300, height: int = 140) -> str:
    """Return one SVG of "train" and "eval" curves, (step, value) pairs, with their range at the left and below."""
    steps, values = zip(*(point for points in curves.values() for point in points), strict=True)
    low, high = min(values), max(values)
    logarithmic = 0 < 50 * low < high  # a perplexity from a random start
    scale = log10 if logarithmic else float

    def share(value: float, least: float, most: float) -> float:
        return (value - least) / (most - least) if most > least else 0.5

    def y(value: float) -> float:
        return height - BOTTOM - (height - TOP - BOTTOM) * share(scale(value), scale(low), scale(high))

    def x(step: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * share(step, min(steps), max(steps))

    middle = (low * high) ** 0.5 if logarithmic else low / 2 + high / 2
    drawn = []
    for value in dict.fromkeys((low, middle, high)):
        drawn.append(f'<path d="M{LEFT} {y(value):.1f}H{width - RIGHT}" stroke="#ddd"/>')
        drawn.append(f'<text x="{LEFT - 4}" y="{y(value) + 3:.1f}" text-anchor="end">{axis(value)}</text>')
    for anchor, step in {"start": min(steps), "end": max(steps)}.items():
        drawn.append(f'<text x="{x(step):.1f}" y="{height - 5}" text-anchor="{anchor}">{step}</text>')
    for part, points in curves.items():
        shown = [*points[: -1 : ceil(len(points) / MOST)], points[-1]]
        places = [(x(step), y(value)) for step, value in shown]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[part]}" stroke-width="1.5"/>')
        drawn.append('<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="{}"/>'.format(*places[-1], COLOURS[part]))
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg {size} font-size="10" fill="#555">{"".join(drawn)}</svg>'


def axis(value: float) -> str:
    """Return a value in the few characters that have space beside a curve."""
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def curve_figures(run: StepRun, language: str) -> str:
    """Return figures of all metrics in CURVES that a step has values for."""
    figures, names = [], {"train": "train", "eval": "eval" if run.held_out else "eval_on_training"}
    for name, titles in CURVES.items():
        if curves := run.curve(name):
            last = " &nbsp; ".join(
                f'<span style="color:{COLOURS[part]}">{word(names[part], language)} {format_figure(points[-1][1])}</span>'
                for part, points in curves.items()
            )
            caption = f"<figcaption><b>{escape(choose(titles, language))}</b><br>{last}</figcaption>"
            figures.append(
                f'<figure id="{escape(run.section or run.folder.name)}-{name}">{caption}{draw_curve(curves)}</figure>'
            )
    return f'<div class="curves">{"".join(figures)}</div>' if figures else ""


def draw_picture(run: StepRun) -> str:
    """Return an SVG file of the curves in PICTURE side by side. Raise UserError where the run did not log one of them."""
    width, height = 390, 190
    shown = ['<rect width="100%" height="100%" fill="#f8f8f8"/>']
    for number, name in enumerate(PICTURE):
        curves = run.curve(name)
        if "train" not in curves:
            raise UserError(
                f"--picture: no train/{name} in {run.folder}/metrics.jsonl; see --help for the run that logs it."
            )
        title = f'<text x="{LEFT}" y="-8">{escape(CURVES[name][0])}, over {curves["train"][-1][0]} rollouts</text>'
        shown.append(f'<g transform="translate({number * width},24)">{title}{draw_curve(curves, width, height)}</g>')
    for part, title, x in (("train", "answers of each rollout", LEFT), ("eval", "held-out prompts", 200)):
        shown.append(f'<text x="{x}" y="{height + 36}" font-size="10" fill="{COLOURS[part]}">{title}</text>')
    size = f'width="{2 * width}" height="{height + 44}" font-family="sans-serif" font-size="13"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *shown, "</svg>\n"])
