#!/usr/bin/env bash
# torch 2.13.0 on a CPU: each thread that calls a parallel operation gets a pool of num_threads - 1 workers of its own, which stays
# while that thread lives. Two threads that take turns, never computing at once, hold two pools; where they are more threads than
# cores, OpenMP's workers spin for a shorter time, and short operations of the first thread take several times as long as before
# (the times are printed, not judged: they depend on the machine).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import os
import threading
import time

import torch

WORKERS = max(1, os.cpu_count() - 1)
torch.set_num_threads(WORKERS + 1)
numbers = torch.randn(500_000)


def computed() -> float:
    begin = time.perf_counter()
    for _ in range(1000):
        numbers.add_(1)
    return time.perf_counter() - begin


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def second() -> None:
    computed()
    ready.set()
    end.wait()


ready, end, before = threading.Event(), threading.Event(), threads()
computed()
alone, seconds = threads(), computed()
other = threading.Thread(target=second)
other.start()
ready.wait()
both, later = threads(), computed()
end.set()
other.join()
time.sleep(1)
print("torch", torch.__version__, "with", torch.get_num_threads(), "threads on", os.cpu_count(), "cores")
print(f"one caller:   {alone - before} workers, 1,000 short operations {seconds:.3f} s")
print(f"a second one: {both - before - 1} workers, the first one's operations {later:.3f} s")
print(f"after its end: {threads() - before} workers")
same = (alone - before, both - before - 1, threads() - before) == (WORKERS, 2 * WORKERS, WORKERS)
print("as found: a pool a caller" if same else "CHANGED")
raise SystemExit(not same)
PY
