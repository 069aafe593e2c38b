"""A checkpoint is whole or not there, and belongs to one run."""

import json
import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import DiskError, UserError
from training.utils.engine import state
from training.utils.engine.checkpoint import MANIFEST, Checkpoint, whole_checkpoints
from training.utils.engine.extras import extras
from training.utils.engine.state import SavedTensors
from training.utils.flags.steps import SFTArguments
from training.utils.run.metrics import Metrics
from training.utils.run.nodes import Nodes

pytestmark = pytest.mark.fast
SIZES = {"global_batch": 8}
WEIGHTS = "model/rank-0-0.safetensors"


class FakeEngine:
    """Stands in for DeepSpeed's engine without ZeRO: one weight, its optimizer and schedule."""

    global_steps = global_samples = skipped_steps = 0

    def __init__(self, value: int) -> None:
        self.module = torch.nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.checkpoint_engine = SimpleNamespace()
        self.value = value

    @property
    def value(self) -> int:
        return int(self.module.weight)

    @value.setter
    def value(self, value: int) -> None:
        torch.nn.init.constant_(self.module.weight, value)


def fake_run(folder: Path, resume: str = "", limit: int = 0, **flags) -> SimpleNamespace:
    """A process alone."""
    args = SFTArguments(output_dir=str(folder), model_name_or_path="m", resume=resume, save_total_limit=limit, **flags)
    metrics = Metrics(folder, enabled=True)
    return SimpleNamespace(args=args, rank=0, local_rank=0, world_size=1, barrier=lambda: None, metrics=metrics, nodes=Nodes())


def checkpoint_of(folder: Path, value: int = 0, resume: str | Path = "", marks: dict | None = None, **flags) -> Checkpoint:
    """A checkpoint of one engine with this value."""
    return Checkpoint(fake_run(folder, str(resume), **flags), {"model": FakeEngine(value)}, marks or {"seed": 1}, SIZES)


def test_resume_brings_back_weights_step_and_random_numbers(tmp_path):
    torch.manual_seed(3)
    checkpoint_of(tmp_path, 41).save(5)
    expected = (torch.rand(3), random.random(), np.random.rand())
    torch.rand(10), random.random(), np.random.rand(4)
    checkpoint = checkpoint_of(tmp_path, resume="auto")
    assert (checkpoint.resume(), checkpoint.engines["model"].value) == (5, 41)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


@pytest.mark.parametrize("damage", ["no manifest", "cut file", "missing file", "cut manifest"])
def test_a_half_written_checkpoint_is_refused_and_passed_over(tmp_path, damage):
    checkpoint = checkpoint_of(tmp_path)
    checkpoint.save(1)
    checkpoint.save(2)
    newest = tmp_path / "checkpoints" / "step-00000002"
    manifest = newest / MANIFEST
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "cut manifest":
        manifest.write_text(manifest.read_text()[:20])
    elif damage == "cut file":
        (newest / "generators-0.pt").write_bytes(b"")
    else:
        (newest / WEIGHTS).unlink()
    with pytest.raises(UserError, match="step-00000002"):
        checkpoint_of(tmp_path, resume=newest).resume()
    assert [one.name for one in whole_checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]


NAMES = ["generators-0.pt", WEIGHTS, "model/engine.json", MANIFEST]


@pytest.mark.parametrize("name", NAMES)
def test_one_damaged_byte_anywhere_is_noticed_and_the_checkpoint_before_resumes(tmp_path, caplog, name):
    for step in (1, 2):
        checkpoint_of(tmp_path, 10 * step).save(step)
    newest = tmp_path / "checkpoints" / "step-00000002"
    content = (newest / name).read_bytes()
    assert len(content) > 0
    for place in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
        (newest / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        checkpoint, chosen = checkpoint_of(tmp_path, resume="auto"), []
        chosen = checkpoint._newest_of_all()
        assert chosen.name == "step-00000001", place
        with pytest.raises(UserError, match="step-00000002 is"):
            checkpoint_of(tmp_path, resume=newest).resume()
    assert (checkpoint.resume(), checkpoint.engines["model"].value) == (1, 10)
    assert "Passed over: " in caplog.text and names(tmp_path / "checkpoints") == ["earlier-1", "step-00000001"]


ODD = ["[]", "{}", "3", "[" * 99999, '{"step": 2, "files": {}}', '{"step": 2, "marks": [], "files": {}}']


@pytest.mark.parametrize("manifest", ODD)
def test_an_odd_manifest_is_passed_over(tmp_path, manifest):
    for step in (1, 2):
        checkpoint_of(tmp_path).save(step)
    (tmp_path / "checkpoints" / "step-00000002" / MANIFEST).write_text(manifest)
    assert checkpoint_of(tmp_path, resume="auto").resume() == 1


def test_a_checkpoint_without_checksums_resumes_and_a_copy_is_none(tmp_path):
    """Builds before the checksums wrote sizes alone."""
    checkpoint_of(tmp_path, limit=1).save(2)
    newest = tmp_path / "checkpoints" / "step-00000002"
    manifest = json.loads((newest / MANIFEST).read_text())
    (newest / MANIFEST).write_text(json.dumps({name: manifest[name] for name in ("step", "marks", "length", "sizes", "files")}))
    copy = shutil.copytree(newest, newest.with_suffix(".bak"))
    checkpoint = checkpoint_of(tmp_path, 5, resume="auto", limit=1)
    assert checkpoint.resume() == 2
    checkpoint.save(3)
    assert names(tmp_path / "checkpoints") == [copy.name, "step-00000003"]


class Marker:
    """Makes a file when it is loaded by pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_resume_runs_no_code_that_a_checkpoint_names(tmp_path, caplog):
    marker = tmp_path / "marker"
    checkpoint_of(tmp_path, 1).save(1)
    checkpoint = checkpoint_of(tmp_path, 2)
    checkpoint.states = {"foreign": SimpleNamespace(state_dict=lambda: Marker(marker))}
    checkpoint.save(2)
    file = tmp_path / "checkpoints" / "step-00000002" / "foreign-0.pt"
    assert checkpoint_of(tmp_path, resume="auto").resume() == 1 and "does not load (foreign-0.pt" in caplog.text
    assert not marker.exists()
    torch.load(next((tmp_path / "checkpoints" / "earlier-1").rglob(file.name)), weights_only=False)
    assert marker.exists()


def test_older_checkpoints_stay_until_the_newest_loads(tmp_path, caplog):
    checkpoint_of(tmp_path, limit=1).save(1)
    checkpoint = checkpoint_of(tmp_path, limit=1)
    checkpoint.states = {"foreign": SimpleNamespace(state_dict=lambda: Marker(tmp_path / "marker"))}
    checkpoint.save(2)
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000002"]
    assert "No older checkpoint is removed" in caplog.text


MARKS = {"data": "a", "weights": {"model": "w"}, "seed": 1, "max_seq_len": 64, "learning_rate": 1e-3, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"seed": 2, "data": "b"}, "--seed 1, this run says 2, which cannot change within a run"),
        ({"max_seq_len": 32, "data": "b"}, "--max_seq_len 64, this run says 32"),
        ({"data": "b"}, "other training data"),
        ({"weights": {"model": "v"}}, r"other weights \(model\)"),
        (
            {"learning_rate": 1e-4, "weight_decay": 0.1},
            "--learning_rate 0.001, --weight_decay 0.0; this run says .* by --allow learning_rate,weight_decay",
        ),
    ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path, marks, expected):
    checkpoint_of(tmp_path, marks=MARKS).save(1)
    for allow in (None, "learning_rate"):
        with pytest.raises(UserError, match=expected):
            checkpoint_of(tmp_path, resume="auto", marks=MARKS | marks, allow=allow).resume()


def test_an_allowed_flag_changes_with_a_line_and_the_schedule_goes_on_with_it(tmp_path, caplog):
    caplog.set_level("INFO")
    first = checkpoint_of(tmp_path, marks=MARKS)
    for _ in range(3):
        first.engines["model"].optimizer.step()
        first.engines["model"].lr_scheduler.step()
    first.save(3)
    second = checkpoint_of(tmp_path, resume="auto", marks=MARKS | {"learning_rate": 0.8}, allow="learning_rate")
    engine = second.engines["model"]
    engine.lr_scheduler.base_lrs = [0.8]
    assert second.resume() == 3
    assert engine.optimizer.param_groups[0]["lr"] == engine.lr_scheduler.get_last_lr()[0] == 0.8 / (1 + 3)
    assert "--learning_rate 0.8 from here on (it was 0.001)." in caplog.text
    second.save(4)
    with pytest.raises(UserError, match=r"--learning_rate 0\.8; this run says --learning_rate 0\.001"):
        checkpoint_of(tmp_path, resume="auto", marks=MARKS).resume()


def test_another_batch_size_is_said_and_the_schedule_goes_on_at_its_share(tmp_path, caplog):
    caplog.set_level("INFO")
    first = checkpoint_of(tmp_path)
    extras(first.engines["model"]).schedule_steps, first.engines["model"].lr_scheduler.last_epoch = 60, 15
    first.save(15)
    second = checkpoint_of(tmp_path, resume="auto")
    engine = second.engines["model"]
    extras(engine).schedule_steps = 30
    second.sizes = {"global_batch": 16, "since": 15, "seen": 120, "order": 8}
    # 7.5 of 30. With 20 of 29 examples still to train in an epoch of 4 a step, 22.5 are left, which are 23 whole steps.
    assert second.resume() == 15 and engine.lr_scheduler.last_epoch == 7
    said = "From here on 16 examples a step (it was 8): epoch 0 goes on behind its first 120 examples; the learning rate"
    assert sum(said in record.getMessage() for record in caplog.records) == 1
    second.sizes = {"global_batch": 16, "since": 20, "seen": 160, "order": 8}  # of a newer checkpoint, which was damaged
    with pytest.raises(UserError, match="another size of batches than the newer one"):
        second.resume()
    for length, steps, place in (({"num_train_epochs": 2}, 60, 7), ({"max_steps": 40}, 40, 15)):  # another length, too
        longer = checkpoint_of(tmp_path, resume="auto", **length)
        extras(longer.engines["model"]).schedule_steps, longer.sizes = steps, {"global_batch": 16, "since": 15, "seen": 120}
        assert longer.resume() == 15 and longer.engines["model"].lr_scheduler.last_epoch == place
    older = {name: value for name, value in state.engine_facts(engine).items() if name != "schedule_steps"}
    with pytest.raises(UserError, match="an older version"):
        state.set_engine_facts(engine, older, resized=True)


RESIZED = [({"global_batch": 16}, 2), ({"rollout": 8, "minibatch": 8}, 1), ({"rollout": 8, "minibatch": 64}, 2)]


@pytest.mark.parametrize("sizes, larger", RESIZED)
def test_behind_max_steps_the_schedule_of_epochs_begins_where_the_examples_were(tmp_path, sizes, larger):
    """With another batch size too. By its share the schedule of --max_steps, at its end, would leave a rate of 0."""
    first = checkpoint_of(tmp_path, max_steps=10, num_train_epochs=1)
    before = {"global_batch": 8} if "global_batch" in sizes else {"rollout": 4, "minibatch": 8}
    extras(first.engines["model"]).schedule_steps, first.engines["model"].lr_scheduler.last_epoch, first.sizes = 10, 10, before
    first.run.args.num_return_sequences = 2
    first.save(10)
    second = checkpoint_of(tmp_path, resume="auto", max_steps=0, num_train_epochs=2)
    extras(second.engines["model"]).schedule_steps, second.sizes = 26, sizes | {"since": 10, "seen": 80}
    second.run.args.num_return_sequences = 2
    assert second.resume() == 10 and second.engines["model"].lr_scheduler.last_epoch == 10 // larger


def test_another_number_of_processes_is_said_in_one_line(tmp_path, caplog):
    caplog.set_level("INFO")
    before = {"world_size": 4, "zero_stage": 1, "per_device_train_batch_size": 2, "offload": True}
    checkpoint_of(tmp_path, 5, marks=MARKS | before).save(1)
    now = {"world_size": 1, "zero_stage": 0, "per_device_train_batch_size": 8, "offload": False}
    checkpoint = checkpoint_of(tmp_path, resume="auto", marks=MARKS | now)
    assert (checkpoint.resume(), checkpoint.engines["model"].value) == (1, 5)
    said = "processes 1 (it was 4), --zero_stage 0 (it was 1): the global batch and the order of the data stay"
    assert sum(said in record.getMessage() for record in caplog.records) == 1


def test_pieces_of_other_processes_are_put_together(tmp_path):
    """Eleven elements, cut by three processes, read in every other cut; a hole is named."""
    whole = torch.arange(11.0)
    for rank, (start, end) in enumerate([(0, 4), (4, 9), (9, 11)]):
        save_file({f"exp_avg:{start}:a:b": whole[start:end].clone()}, tmp_path / f"rank-{rank}-0.safetensors")
    saved = SavedTensors(tmp_path)
    for start in range(11):
        for end in range(start + 1, 12):
            found = torch.zeros(end - start)
            saved.fill(found, "exp_avg", "a:b", start)
            assert torch.equal(found, whole[start:end])
    (tmp_path / "rank-1-0.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 5 elements \(exp_avg\) of a:b"):
        SavedTensors(tmp_path).fill(torch.zeros(11), "exp_avg", "a:b", 0)


def test_a_large_state_is_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "FILE_BYTES", 100)
    tensors = {f"weight:0:{number}": torch.full((10,), float(number)) for number in range(7)}
    files = list(state.write_tensors(tmp_path / "model", 0, tensors))
    assert len(files) == 4 and {key for file in files for key in load_file(file)} == set(tensors)


def test_a_checkpoint_in_deepspeed_s_own_files_resumes_with_the_processes_of_before(tmp_path):
    """Older checkpoints have those."""
    checkpoint = checkpoint_of(tmp_path, 3, marks=MARKS | {"world_size": 1})
    checkpoint.save(2)
    newest = tmp_path / "checkpoints" / "step-00000002"
    shutil.rmtree(newest / "model")
    (newest / "model" / "state").mkdir(parents=True)
    manifest = json.loads((newest / MANIFEST).read_text())
    files = {"generators-0.pt": manifest["files"]["generators-0.pt"]}
    (newest / MANIFEST).write_text(json.dumps({"step": 2, "marks": manifest["marks"], "files": files}))
    resumed = checkpoint_of(tmp_path, resume="auto", marks=MARKS | {"world_size": 1})
    read = []
    resumed.engines["model"].load_checkpoint = lambda folder, tag: read.append((folder, tag)) or (folder, {})
    assert resumed.resume() == 2 and read == [(str(newest / "model"), "state")]
    with pytest.raises(UserError, match=r"written by an earlier version.*world_size 1"):
        checkpoint_of(tmp_path, resume="auto", marks=MARKS | {"world_size": 2}).resume()


def test_nothing_to_resume_starts_afresh_but_a_named_folder_must_exist(tmp_path):
    assert checkpoint_of(tmp_path, resume="auto").resume() == 0
    with pytest.raises(UserError, match="no such folder"):
        checkpoint_of(tmp_path, resume=tmp_path / "absent").resume()


def test_only_the_newest_are_kept(tmp_path):
    checkpoint = checkpoint_of(tmp_path, limit=2)
    for step in (1, 2, 3, 10):
        checkpoint.save(step)
    assert names(tmp_path / "checkpoints") == ["step-00000003", "step-00000010"]
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000010" / MANIFEST).read_text())
    assert manifest["step"] == 10 and WEIGHTS in manifest["files"] and manifest["sizes"] == SIZES


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def earlier_run(folder: Path) -> None:
    """Checkpoints of steps 100 and 150, a metric, and what a kill left."""
    checkpoint = checkpoint_of(folder, 7, limit=2)
    checkpoint.save(100)
    checkpoint.save(150)
    checkpoint.run.metrics.log(150, {"loss": 1.0})
    (folder / "checkpoints" / ".writing-step-00000200").mkdir()


@pytest.mark.parametrize("resume", ["", "auto"])
def test_a_run_that_starts_afresh_keeps_its_own_checkpoints_and_spares_those_of_another(tmp_path, caplog, resume):
    caplog.set_level("INFO")
    earlier_run(tmp_path)
    if resume:   # nothing to resume from: no checkpoint is whole
        for found in (tmp_path / "checkpoints").glob("step-*"):
            (found / MANIFEST).unlink()
    checkpoint = checkpoint_of(tmp_path, 1, resume, limit=2)
    assert checkpoint.resume() == 0
    for step in (50, 100):
        checkpoint.save(step)
    assert names(tmp_path / "checkpoints") == ["earlier-1", "step-00000050", "step-00000100"]
    assert load_file(tmp_path / "checkpoints/step-00000100" / WEIGHTS)["weight:0:weight"].item() == 1
    aside = tmp_path / "checkpoints" / "earlier-1"
    assert names(aside) == ["metrics.jsonl", "step-00000100", "step-00000150"]
    assert not (tmp_path / "metrics.jsonl").exists()
    assert sum(f"moved to {aside}" in record.getMessage() for record in caplog.records) == 1

    checkpoint_of(tmp_path).resume()
    assert names(tmp_path / "checkpoints") == ["earlier-1", "earlier-2"]


def test_a_run_set_aside_can_be_gone_on_with(tmp_path):
    earlier_run(tmp_path)
    fresh = checkpoint_of(tmp_path, 1)
    fresh.resume()
    fresh.save(50)
    fresh.run.metrics.log(50, {"loss": 9.0})
    back = checkpoint_of(tmp_path, resume=tmp_path / "checkpoints/earlier-1/step-00000100")
    assert back.resume() == 100 and back.engines["model"].value == 7
    assert names(tmp_path / "checkpoints" / "earlier-2") == ["metrics.jsonl", "step-00000050"]


def test_what_lies_behind_the_step_named_is_out_of_the_way(tmp_path):
    earlier_run(tmp_path)
    checkpoint = checkpoint_of(tmp_path, resume=tmp_path / "checkpoints" / "step-00000100", limit=1)
    assert checkpoint.resume() == 100
    checkpoint.save(120)
    assert names(tmp_path / "checkpoints") == ["earlier-1", "step-00000120"]
    assert names(tmp_path / "checkpoints" / "earlier-1") == ["step-00000150"]


def test_a_run_is_set_aside_where_its_checkpoints_are_on_another_disk(tmp_path):
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "checkpoints").symlink_to(elsewhere)
        earlier_run(tmp_path)
        assert checkpoint_of(tmp_path).resume() == 0
        assert names(Path(elsewhere) / "earlier-1") == ["metrics.jsonl", "step-00000100", "step-00000150"]
        assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_that_cannot_be_moved_is_not_mixed_with(tmp_path, monkeypatch):
    earlier_run(tmp_path)

    def refuse(file, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "move", refuse)
    with pytest.raises(UserError, match=r"holds another run, which cannot be moved .*Permission denied"):
        checkpoint_of(tmp_path).resume()


def test_all_have_sealed_before_any_removes_an_older_one(tmp_path, monkeypatch):
    """Nodes with a disk each: while one has not sealed, the older checkpoint may be the last that all of them have."""
    checkpoint, order = checkpoint_of(tmp_path, limit=1), []
    checkpoint.run.barrier = lambda: order.append("barrier")
    for name in ("_seal", "_prune"):
        monkeypatch.setattr(checkpoint, name, lambda *_, name=name: order.append(name))
    checkpoint.save(1)
    assert order[order.index("_seal") :] == ["_seal", "barrier", "_prune", "barrier"]


@pytest.mark.parametrize(("schedule", "said"), [("cosine", True), ("constant_with_warmup", False)])
def test_another_length_of_the_run_is_allowed_and_said(tmp_path, caplog, schedule, said):
    length = {"num_train_epochs": 1, "lr_scheduler_type": schedule}
    checkpoint_of(tmp_path, max_steps=10, **length).save(5)
    for steps in (10, 20):
        checkpoint_of(tmp_path, resume="auto", max_steps=steps, **length).resume()
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == (said and steps == 20)
    assert not said or warned[0].startswith("--max_steps 20 (it was 10): --lr_scheduler_type cosine")


def full_disk(checkpoint: Checkpoint, name: str) -> None:
    """Let one file of the next save lie on a full disk."""
    plain = checkpoint._files

    def files(partial: Path):
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).symlink_to("/dev/full")
        yield from plain(partial)

    checkpoint._files = files


@pytest.mark.parametrize("name", ["generators-0.pt", "model/engine.json", MANIFEST])
def test_a_full_disk_in_a_save_is_one_sentence_and_spares_older_checkpoints(tmp_path, name):
    checkpoint = checkpoint_of(tmp_path, 7, limit=1)
    checkpoint.save(1)
    full_disk(checkpoint, name)
    sentence = r"writing-step-00000002 was not written .*about [\d,]+ bytes, [\d,]+ bytes are free"
    with pytest.raises(DiskError, match=sentence) as told:
        checkpoint.save(2)
    assert told.value.code == 74 and names(tmp_path / "checkpoints") == ["step-00000001"]
    resumed = checkpoint_of(tmp_path, resume="auto")
    assert resumed.resume() == 1 and resumed.engines["model"].value == 7


def test_free_space_is_looked_at_before_a_save(tmp_path, monkeypatch):
    checkpoint = checkpoint_of(tmp_path)
    checkpoint.save(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    checkpoint._files = None   # is not come to
    with pytest.raises(DiskError, match=r"too little room.* 9 bytes are free"):
        checkpoint.save(2)
    assert [one.name for one in whole_checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]
