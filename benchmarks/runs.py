"""Command lines and results of the steps that the benchmarks run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def as_flags(values: dict[str, Any]) -> list[str]:
    """Return --name value pairs; a name with True stands alone."""
    return [str(text) for name, value in values.items() for text in ([f"--{name}"] if value is True else [f"--{name}", value])]


def read_records(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def speed_and_memory(output: Path, warm_up: int) -> dict[str, float]:
    """Return the median tokens/s of a finished run after some warm-up steps, and its peak memory in GB."""
    speeds = [record["train/tokens_per_second"] for record in read_records(output) if "train/tokens_per_second" in record]
    done = json.loads((output / "sanbu_done.json").read_text(encoding="utf-8"))
    return {"tokens_per_second": statistics.median(speeds[warm_up:] or speeds), "peak_memory_gb": done["peak_memory_gb"]}
