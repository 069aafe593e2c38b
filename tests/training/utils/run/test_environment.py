"""The memory of a container, and one run a folder."""

import math
import multiprocessing
import os
import signal
import time

import pytest

from errors import UserError
from training.utils.memory.container import container_free
from training.utils.run.environment import hold_folder

pytestmark = pytest.mark.fast

def test_a_container_has_what_its_limit_leaves(tmp_path):
    """The host's free memory says nothing about it; a run that took it as its own was killed."""
    assert container_free(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_free(tmp_path) == 1000
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 50\ninactive_file 150\n")
    assert container_free(tmp_path) == 500

    old = tmp_path / "version1"
    (old / "memory").mkdir(parents=True)
    (old / "memory" / "memory.limit_in_bytes").write_text("1000")
    (old / "memory" / "memory.usage_in_bytes").write_text("900")
    (old / "memory" / "memory.stat").write_text("cache 10\ntotal_inactive_file 10\n")
    assert container_free(old) == 110


def hold(folder, connection) -> None:
    """Hold the folder, send the number of a child that was forked meanwhile, and wait."""
    lock = hold_folder(folder)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    connection.send(child.pid)
    time.sleep(600)
    assert lock


def test_one_run_a_folder_until_its_process_is_killed(tmp_path):
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    first = fork.Process(target=hold, args=(tmp_path, theirs))
    first.start()
    assert ours.poll(60)
    child = ours.recv()
    with pytest.raises(UserError, match=rf"--output_dir {tmp_path} is in use by another run \(host .*, process {first.pid}\)"):
        hold_folder(tmp_path)
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    hold_folder(tmp_path).close()  # though the child of the killed one lives
    os.kill(child, signal.SIGKILL)
