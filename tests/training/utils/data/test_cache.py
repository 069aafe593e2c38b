"""The cache is built once, never stale, never half; what is damaged is built again."""

import multiprocessing
import os
import signal
import threading
import time

import pyarrow
import pytest
import torch.distributed as dist

from errors import UserError
from training.utils.data import cache as caching
from training.utils.data.arrow_rows import arrow_writer
from training.utils.data.cache import cached, code_files, new_rebuild_id

SCHEMA = pyarrow.schema({"number": pyarrow.int64()})
NAMES = ("train", "eval")
FORK = multiprocessing.get_context("fork")  # a started Python would import torch first


def build(folder):
    """Write two small data sets."""
    for name in NAMES:
        with arrow_writer(folder / f"{name}.arrow", SCHEMA) as write:
            write([{"number": number} for number in range(1000 if name == "train" else 0)])
    return {"train": 1000}


def opened(content="data", build=build, **options):
    return cached("tokens", [content], NAMES, build, **options)


def folders(cache):
    return sorted(folder for folder in (cache / "tokens").iterdir() if folder.is_dir())


def together(worker, number=2):
    """Return what the worker returned in processes that start at the same time."""
    queue, barrier = FORK.Queue(), FORK.Barrier(number)
    jobs = [FORK.Process(target=lambda rank: queue.put(worker(barrier, rank)), args=(rank,)) for rank in range(number)]
    for job in jobs:
        job.start()
    results = [queue.get(timeout=120) for _ in jobs]
    for job in jobs:
        job.join()
    return results


def test_a_folder_is_built_once_and_opened_again(cache):
    first = opened()
    again = opened(build=lambda folder: pytest.fail("built again"))
    assert first.train["number"][:] == list(range(1000)) and len(first.eval) == 0
    assert (again.report, again.fingerprint) == (first.report, first.fingerprint) == ({"train": 1000}, first.fingerprint)
    assert again.train.to_list() == first.train.to_list()


def test_the_folder_follows_content_and_code(cache, monkeypatch, tmp_path):
    names = {file.name for file in code_files()}
    assert {"formats.py", "cache.py", "templates.py", "prompts.py", "tokenization_chatglm.py", "tokenizer_base.py"} <= names
    for content in ("data", "other data"):
        opened(content)
    (tmp_path / "changed.py").write_text("")
    monkeypatch.setattr(caching, "code_files", lambda: [tmp_path / "changed.py"])
    opened()
    assert len(folders(cache)) == 3


@pytest.mark.parametrize("damage", ["cut", "bit", "manifest", "missing file", "no manifest"])
def test_what_is_damaged_is_built_again(cache, damage, caplog):
    good = opened().train.to_list()
    (folder,) = folders(cache)
    arrow, manifest = folder / "train.arrow", folder / "manifest.json"
    content = bytearray(arrow.read_bytes())
    if damage == "cut":
        arrow.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        arrow.write_bytes(content)
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        (arrow if damage == "missing file" else manifest).unlink()
    assert opened().train.to_list() == good
    assert "building it again" in caplog.text
    assert folders(cache) == [folder]


def test_what_a_killed_build_left_is_neither_opened_nor_kept(cache):
    opened()
    (folder,) = folders(cache)
    half = folder.with_name(f".{folder.name}.building")
    folder.rename(half)  # killed before it was moved into place
    (half / "train.arrow").write_bytes(b"half")
    assert len(opened().train) == 1000
    assert folders(cache) == [folder]


def test_a_build_that_fails_leaves_nothing(cache):
    with pytest.raises(ZeroDivisionError):
        opened(build=lambda folder: build(folder) and 1 / 0)
    assert folders(cache) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.* cannot be used .*--cache_dir or SANBU_CACHE"):
        opened(cache_dir=str(tmp_path / "file"))


def test_two_processes_build_once_and_read_the_same(tmp_path):
    log = tmp_path / "log"

    def slow(folder):
        with log.open("a") as file:
            file.write("build\n")
        time.sleep(0.5)
        return build(folder)

    def worker(barrier, rank):
        barrier.wait()
        return opened(build=slow).fingerprint

    assert len(set(together(worker))) == 1
    assert log.read_text() == "build\n"


def test_one_rebuild_serves_all_processes_of_a_job(tmp_path, cache):
    opened()
    before, log = folders(cache)[0].stat().st_mtime_ns, tmp_path / "log"

    def again(folder):
        with log.open("a") as file:
            file.write("build\n")
        return build(folder)

    def worker(barrier, rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        found = opened(build=again, rebuild_id=new_rebuild_id())
        dist.barrier()
        return found.fingerprint

    assert len(set(together(worker))) == 1
    assert log.read_text() == "build\n"
    assert folders(cache)[0].stat().st_mtime_ns > before


def test_a_killed_builder_does_not_block_the_next_one(cache):
    started = FORK.Event()

    def endless(folder):
        started.set()
        time.sleep(600)

    job = FORK.Process(target=opened, kwargs={"build": endless})
    job.start()
    assert started.wait(60)
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    assert len(opened().train) == 1000
    assert len(folders(cache)) == 1


def test_reading_while_another_process_rebuilds():
    data = opened().train
    good = data.to_list()
    rebuilding = threading.Thread(target=lambda: [opened(rebuild_id=str(n)) for n in range(3)])
    rebuilding.start()
    while rebuilding.is_alive():
        assert data.to_list() == good
    rebuilding.join()
