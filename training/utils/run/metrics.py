"""Write metrics to metrics.jsonl, to TensorBoard and into one progress line."""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from json_text import parse_json


class Metrics:
    """Writes one JSON object a line to ``metrics.jsonl`` of the output folder and, if asked, the same to TensorBoard.

    Only the process with ``enabled`` writes; the others may call every method without effect.
    """

    def __init__(self, output_dir: Path, *, enabled: bool, tensorboard: str | None = None) -> None:
        self.path = output_dir / "metrics.jsonl"
        self.samples = output_dir / "samples.jsonl"   # step 3's, see evaluation.write_samples
        self.enabled = enabled
        self.started = time.monotonic()
        self.writer = None
        if enabled and tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(tensorboard)

    def files(self) -> list[Path]:
        """Return the files that this process, or a run before it, has written."""
        return [path for path in (self.path, self.samples) if self.enabled and path.exists()]

    def rewind(self, step: int) -> None:
        """Drop what was logged after the given optimizer step: a resumed run writes those lines again."""
        for path in self.files():
            kept = []
            for line in path.read_bytes().split(b"\n"):  # answers hold characters that splitlines takes for ends
                try:
                    if parse_json(line).get("step", 0) <= step:
                        kept.append(line + b"\n")
                except (ValueError, AttributeError, TypeError):  # the line, or the letter, that a kill cut in two
                    continue
            draft = path.with_name(f".{path.name}.tmp")  # a kill meanwhile must not cost the curve so far
            draft.write_bytes(b"".join(kept))
            draft.replace(path)

    def log(self, step: int, values: dict[str, float | int | str], prefix: str = "train") -> None:
        """Write the values under keys ``prefix/name``; step counts optimizer steps from 1 (rollouts in step 3)."""
        if not self.enabled:
            return
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        record = {"step": step, "seconds": round(time.monotonic() - self.started, 3), **named}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.writer is not None:
            for name, value in named.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Show a text (a table of samples) in TensorBoard."""
        if self.writer is not None:
            self.writer.add_text(name, markdown, step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self.writer is not None:
            self.writer.close()


def rounded(value: float, decimals: int) -> str:
    """Return a number with so many decimals; a zero has no sign."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a JSONL file, and how many of its lines are no JSON object: a kill cuts the last one."""
    records, left_out = [], 0
    for line in path.read_bytes().split(b"\n"):  # answers hold characters that splitlines takes for ends
        try:
            record = parse_json(line) if line.strip() else {}
        except ValueError:
            record = None
        if isinstance(record, dict):
            records += [record] if record else []
        else:
            left_out += 1
    return records, left_out


def points_of(records: Iterable[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return all (step, value) pairs of one key, such as ``train/loss``, without those that are no finite numbers."""
    pairs = ((record.get("step"), record[name]) for record in records if name in record)
    return [pair for pair in pairs if all(map(is_finite, pair))]


def is_finite(value: Any) -> bool:
    """Tell whether a value is a number that can be drawn; a JSON file may hold integers that no float can."""
    return type(value) in (int, float) and abs(value) < 1e30  # false for NaN too


def read_metrics(path: Path, name: str) -> list[tuple[int, float]]:
    """Return points_of a metrics.jsonl."""
    return points_of(read_lines(path)[0], name)


def progress_line(step: int, total: int, values: dict[str, float], seconds: float, done: int) -> str:
    """Return ``step 12/300  loss 2.310  tokens/s 1234  left 1:23`` - seconds and done count since the start or the resume."""
    left = seconds / max(done, 1) * (total - step)
    metrics = "  ".join(f"{name} {format_figure(value)}" for name, value in values.items())
    return f"step {step}/{total}  {metrics}  left {format_seconds(left)}"


def format_figure(value: float) -> str:
    """Write a metric in few characters."""
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """Write seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
