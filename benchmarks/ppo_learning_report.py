"""Tables and drawings of benchmarks/ppo_learning.py from its results.jsonl; pure functions of the points, but for draw()."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Point = dict[str, Any]  # task, method, seed, rollout, seconds, cpu_seconds, gold, gold_se, kl, kl_se, length, ended
Curve = list[Point]

TRL = "trl"
BESIDE = "gae"  # runs side by side with TRL: their wall times can be compared, those of the others cannot
CLOCKS = ("seconds", "cpu_seconds")
COLOURS = {"gae": "#1b6ca8", "grpo": "#2f9e44", "rloo": "#e8890c", "reinforce++": "#7048a8", TRL: "#c92a2a"}
NAMES = {TRL: "TRL 1.12.0 PPO"}


def curves(points: Iterable[Point]) -> dict[tuple[str, int, str], Curve]:
    """Points by (task, seed, method), in the order of rollouts. Each begins with the SFT model's point, rollout 0."""
    points = list(points)
    starts = {point["task"]: point for point in points if point["method"] == "sft"}
    found: dict[tuple[str, int, str], Curve] = {}
    for point in sorted(points, key=lambda point: point["rollout"]):
        if point["method"] != "sft":
            start = starts[point["task"]]
            found.setdefault((point["task"], point["seed"], point["method"]), [start]).append(point)
    return found


def crossings(curve: Sequence[Point], name: str, value: float) -> list[Point]:
    """All places, in order, where the curve, straight between its points, has a value of a quantity: all quantities there."""
    found = []
    for before, after in pairwise(curve):
        low, high = before[name], after[name]
        if min(low, high) <= value <= max(low, high):
            share = (value - low) / (high - low) if high != low else 0.0
            numbers = ("rollout", "seconds", "cpu_seconds", "gold", "gold_se", "kl", "kl_se")
            found.append({key: before[key] + share * (after[key] - before[key]) for key in numbers})
    return found


def best_within(curve: Sequence[Point], kl: float) -> Point:
    """Where the curve has its highest gold score at a KL of at most that. A curve may turn back: KL falls as rates do."""
    near = [point for point in curve if point["kl"] <= kl] + crossings(curve, "kl", kl)
    return max(near, key=lambda point: point["gold"])


def at_equal_kl(ours: Curve, theirs: Curve) -> dict[str, float]:
    """The best gold score of both within the largest KL (nats) that both reached, and the standard error of the difference, of
    judging alone: how far apart two runs of one method are is not in it.
    """
    kl = max(0.0, min(max(point["kl"] for point in curve) for curve in (ours, theirs)))
    here, there = best_within(ours, kl), best_within(theirs, kl)
    error = (here["gold_se"] ** 2 + there["gold_se"] ** 2) ** 0.5
    return {"kl": kl, "ours": here["gold"], "theirs": there["gold"], "se": error}


def time_to_their_gold(ours: Curve, theirs: Curve, clock: str) -> tuple[float | None, float]:
    """Time (clock: seconds or cpu_seconds) in which ours came to the gold score that theirs ended with - None: never - and
    the time in which theirs came there first.
    """
    goal = theirs[-1]["gold"]
    here, there = (next(iter(crossings(curve, "gold", goal)), None) for curve in (ours, theirs))
    return (here[clock] if here else None), there[clock]


def final_table(found: dict[tuple[str, int, str], Curve]) -> list[str]:
    """The last point of every run, as Markdown."""
    lines = [
        "| task | seed | method | gold before | gold after | KL, nats | ended | tokens | seconds | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, seed, method), curve in sorted(found.items()):
        last = curve[-1]
        lines.append(
            f"| {task} | {seed} | {NAMES.get(method, method)} | {curve[0]['gold']:.3f} | {last['gold']:.3f} ± "
            f"{last['gold_se']:.3f} | {last['kl']:.2f} | {last['ended']:.3f} | {last['length']:.1f} | {last['seconds']:.1f} | "
            f"{last['cpu_seconds']:.1f} |"
        )
    return lines


def trl_table(found: dict[tuple[str, int, str], Curve]) -> list[str]:
    """Every run beside TRL's of the same task and seed, as Markdown; [] without TRL."""
    lines = [
        "| task | seed | method | within KL | best gold | TRL's | difference ± SE | time to TRL's last gold / TRL's: seconds "
        "| CPU | whole run / TRL's: seconds | CPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = comparisons(found)
    for row in rows:
        reached = [shown(row, f"to_gold_{clock}") for clock in CLOCKS]
        whole = [shown(row, f"whole_{clock}") for clock in CLOCKS]
        lines.append(
            f"| {row['task']} | {row['seed']} | {row['method']} | {row['kl']:.2f} | {row['ours']:.3f} | {row['theirs']:.3f} | "
            f"{row['ours'] - row['theirs']:+.3f} ± {row['se']:.3f} | {' | '.join(reached + whole)} |"
        )
    return lines if rows else []


def shown(row: dict[str, Any], name: str) -> str:
    """A ratio of times; - where it was not measured, never where there is none."""
    return "-" if name not in row else "never" if row[name] is None else f"{row[name]:.2f}"


def comparisons(found: dict[tuple[str, int, str], Curve]) -> list[dict[str, Any]]:
    """What trl_table shows, as numbers: ratios are ours over TRL's; to_gold_… is None where ours never came there, and those of
    wall time are there for gae only.
    """
    rows = []
    for (task, seed, method), curve in sorted(found.items()):
        theirs = found.get((task, seed, TRL))
        if method == TRL or theirs is None:
            continue
        row = {"task": task, "seed": seed, "method": method} | at_equal_kl(curve, theirs)
        for clock in CLOCKS if method == BESIDE else CLOCKS[1:]:
            reached, needed = time_to_their_gold(curve, theirs, clock)
            row[f"to_gold_{clock}"] = None if reached is None or not needed else reached / needed
            row[f"whole_{clock}"] = curve[-1][clock] / theirs[-1][clock]
        rows.append(row)
    return rows


def summary(found: dict[tuple[str, int, str], Curve]) -> list[str]:
    """For each task and method: medians (lowest to highest) over the seeds of what trl_table shows."""
    lines = []
    rows = comparisons(found)
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        gains = [row["ours"] - row["theirs"] for row in own]
        parts = [f"best gold within the KL that both reached, ours - TRL's: {spread(gains, '+.3f')}"]
        for clock, name in zip(CLOCKS, ("time", "CPU time"), strict=True):
            if f"whole_{clock}" not in own[0]:
                continue
            ratios = [row[f"to_gold_{clock}"] for row in own]
            reached = [ratio for ratio in ratios if ratio is not None]
            never = f", never on {len(ratios) - len(reached)} of {len(ratios)} seeds" if len(reached) < len(ratios) else ""
            parts.append(f"{name} to TRL's last gold: {spread(reached, '.2f') if reached else '-'} of TRL's{never}")
            parts.append(f"{name} of the run: {spread([row[f'whole_{clock}'] for row in own], '.2f')} of TRL's")
        lines.append(f"{task}, {method}: " + "; ".join(parts))
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def draw(found: dict[tuple[str, int, str], Curve], folder: Path) -> list[Path]:
    """One PNG a task: gold score against KL and against CPU time, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task in dict.fromkeys(key[0] for key in found):
        figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
        named = set()
        for (name, _, method), curve in sorted(found.items()):
            if name != task:
                continue
            label = None if method in named else NAMES.get(method, method)
            named.add(method)
            style = {"color": COLOURS[method], "marker": "o", "markersize": 3, "linewidth": 1.2, "alpha": 0.85}
            for panel, quantity in zip(panels, ("kl", "cpu_seconds"), strict=True):
                panel.plot([point[quantity] for point in curve], [point["gold"] for point in curve], label=label, **style)
        panels[0].set(xlabel="KL to the SFT model, nats an answer", ylabel=f"gold score, {task}, held-out prompts")
        panels[1].set(xlabel="CPU seconds of training")
        panels[0].legend(fontsize=8)
        for panel in panels:
            panel.grid(alpha=0.3)
        files.append(folder / f"ppo_learning_{task}.png")
        figure.savefig(files[-1], dpi=80)
        plt.close(figure)
    return files
