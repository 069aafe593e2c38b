"""The clock of benchmarks/ppo_learning.py: training time without the copies of the policy that are taken on the way.

Used by the trainings of both sides, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class Clock:
    """Counts seconds and seconds of CPU (all threads of this process) from start() on.

    rollout_done() stops it, keeps a copy of the policy after the rollouts named in ``snapshots``, and starts it again. What
    it counted is in clock.jsonl of the output folder, a line a rollout.
    """

    def __init__(self, output: Path, snapshots: Sequence[int]) -> None:
        self.output, self.snapshots = output, frozenset(snapshots)
        self.seconds = self.cpu_seconds = 0.0
        self._since: tuple[float, float] | None = None
        output.mkdir(parents=True, exist_ok=True)
        (output / "clock.jsonl").write_text("")

    def start(self) -> None:
        """Start; no effect on a clock that runs."""
        if self._since is None:
            self._since = time.perf_counter(), time.process_time()

    def rollout_done(self, rollout: int, save: Callable[[Path], None], figures: Mapping[str, float]) -> None:
        """Count the rollout (from 1). save(folder) writes the policy; figures go into the line."""
        now = time.perf_counter(), time.process_time()
        if self._since is None:
            raise RuntimeError("rollout_done() on a clock that was never started")
        self.seconds += now[0] - self._since[0]
        self.cpu_seconds += now[1] - self._since[1]
        if rollout in self.snapshots:
            save(snapshot_folder(self.output, rollout))
        line = {"rollout": rollout, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds, **figures}
        with (self.output / "clock.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._since = time.perf_counter(), time.process_time()


def snapshot_folder(output: Path, rollout: int) -> Path:
    """Where the policy after so many rollouts is kept."""
    return output / f"rollout-{rollout}"


def read_clock(output: Path) -> dict[int, dict[str, float]]:
    """The lines of clock.jsonl by rollout."""
    lines = (output / "clock.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["rollout"]: line for line in map(json.loads, lines)}
