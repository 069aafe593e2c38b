"""benchmarks/loading_memory.py: of processes that wait for each other none is left behind."""

import os
import time
from pathlib import Path

import pytest

from benchmarks import loading_memory


def test_the_others_end_when_one_fails(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    waits = f"echo $$ >{tmp_path}/pid; exec sleep 60"
    fails = f"while [ ! -s {tmp_path}/pid ]; do sleep 0.05; done; echo broken >&2; exit 3"
    fake.write_text(f'#!/bin/sh\nif [ "$RANK" = 0 ]; then {waits}; fi\n{fails}\n')
    fake.chmod(0o755)
    monkeypatch.setattr(loading_memory.sys, "executable", str(fake))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="a case: broken"):
        loading_memory.in_processes([], 2, "a case")
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path(tmp_path, "pid").read_text()), 0)


def test_what_each_prints_last_comes_back_in_the_order_of_ranks(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$RANK" = 0 ] && sleep 0.3\necho words\necho "{\\"rank\\": $RANK}"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(loading_memory.sys, "executable", str(fake))
    assert loading_memory.in_processes([], 2, "a case") == [{"rank": 0}, {"rank": 1}]
