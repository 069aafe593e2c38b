"""A checkpoint is whole or not there, and belongs to one run."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from errors import UserError
from training.utils.checkpoint import MANIFEST, Checkpoint, generator_states, newest_whole, set_generator_states
from training.utils.nodes import Nodes


class FakeEngine:
    """Stands in for DeepSpeed: one number as state."""

    def __init__(self, value: int) -> None:
        self.value = value

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "value").write_text(str(self.value))

    def load_checkpoint(self, folder: str, tag: str):
        self.value = int((Path(folder) / tag / "value").read_text())
        return folder, {}


def fake_run(folder: Path, resume: str = "", limit: int = 0) -> SimpleNamespace:
    """A process alone."""
    args = SimpleNamespace(output_dir=str(folder), resume=resume, save_total_limit=limit)
    metrics = SimpleNamespace(rewind=lambda step: None)
    return SimpleNamespace(args=args, rank=0, local_rank=0, world_size=1, barrier=lambda: None, metrics=metrics, nodes=Nodes())


def test_resume_brings_back_weights_step_extra_and_random_numbers(tmp_path):
    torch.manual_seed(3)
    Checkpoint(fake_run(tmp_path), {"model": FakeEngine(41)}, {"seed": 1}).save(5, {"best": 0.5})
    expected = (torch.rand(3), random.random(), np.random.rand())
    torch.rand(10), random.random(), np.random.rand(4)
    engine = FakeEngine(0)
    step, extra = Checkpoint(fake_run(tmp_path, "auto"), {"model": engine}, {"seed": 1}).resume()
    assert (step, extra, engine.value) == (5, {"best": 0.5}, 41)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


@pytest.mark.parametrize("damage", ["no manifest", "cut file", "missing file", "cut manifest"])
def test_a_half_written_checkpoint_is_refused_and_passed_over(tmp_path, damage):
    run = fake_run(tmp_path)
    checkpoint = Checkpoint(run, {"model": FakeEngine(1)}, {})
    checkpoint.save(1)
    checkpoint.save(2)
    newest = tmp_path / "checkpoints" / "step-00000002"
    if damage == "no manifest":
        (newest / MANIFEST).unlink()
    elif damage == "cut manifest":
        (newest / MANIFEST).write_text((newest / MANIFEST).read_text()[:20])
    elif damage == "cut file":
        (newest / "generators-0.pt").write_bytes(b"")
    else:
        (newest / "model" / "state" / "value").unlink()
    with pytest.raises(UserError, match="step-00000002"):
        Checkpoint(fake_run(tmp_path, str(newest)), {"model": FakeEngine(0)}, {}).resume()
    assert newest_whole(tmp_path / "checkpoints").name == "step-00000001"


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"zero_stage": 3, "world_size": 2, "data": "a"}, "--zero_stage 2, this run says 3"),
        ({"zero_stage": 2, "world_size": 4, "data": "a"}, "by 2 processes, this run has 4"),
        ({"zero_stage": 2, "world_size": 2, "data": "b"}, "other training data"),
    ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path, marks, expected):
    made_with = {"zero_stage": 2, "world_size": 2, "data": "a"}
    Checkpoint(fake_run(tmp_path), {"model": FakeEngine(1)}, made_with).save(1)
    with pytest.raises(UserError, match=expected):
        Checkpoint(fake_run(tmp_path, "auto"), {"model": FakeEngine(0)}, marks).resume()


def test_nothing_to_resume_starts_afresh_but_a_named_folder_must_exist(tmp_path):
    assert Checkpoint(fake_run(tmp_path, "auto"), {}, {}).resume() == (0, {})
    with pytest.raises(UserError, match="no such folder"):
        Checkpoint(fake_run(tmp_path, str(tmp_path / "absent")), {}, {}).resume()


def test_only_the_newest_are_kept(tmp_path):
    checkpoint = Checkpoint(fake_run(tmp_path, limit=2), {"model": FakeEngine(1)}, {})
    for step in (1, 2, 3, 10):
        checkpoint.save(step)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000010"]
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000010" / MANIFEST).read_text())
    assert manifest["step"] == 10 and "model/state/value" in manifest["files"]


def test_generator_states_load_without_pickle(tmp_path):
    torch.save(generator_states(), tmp_path / "states.pt")
    first = (torch.rand(1), np.random.rand())
    set_generator_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert (torch.rand(1), np.random.rand()) == first
