"""Weight files of a checkpoint: every kind that is read, and what is wrong with one, told before anything is loaded."""

import json
import tarfile
from pickle import UnpicklingError

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from models.checkpoint_folder import open_checkpoint
from models.weight_files import load_pickled, tensor_names
from tests.models.common import load

KINDS = ("bin", "old", "safetensors")


def shards_of(llama, folder, kind):
    """The checkpoint in two shards of a kind; returns their files and the index."""
    folder.mkdir()
    for file in llama.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(llama / "model.safetensors")
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    files, places = [], {}
    for number in (0, 1):
        mine = sorted(tensors)[number::2]
        files.append(folder / f"{stem}-0000{number + 1}-of-00002.{ending}")
        places |= dict.fromkeys(mine, files[-1].name)
        if kind == "safetensors":
            save_file({name: tensors[name] for name in mine}, files[-1], metadata={"format": "pt"})
        else:
            torch.save({name: tensors[name] for name in mine}, files[-1], _use_new_zipfile_serialization=kind == "bin")
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files, index


@pytest.mark.parametrize("version", ["2.4.1", str(torch.__version__)])
def test_what_torch_before_2_6_would_run_is_not_read(tmp_path, monkeypatch, version):
    """torch.load's weights_only did not hold for TorchScript archives and tar files (CVE-2025-32434)."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.bin")
    with tarfile.open(tmp_path / "tar.bin", "w") as archive:
        archive.add(tmp_path / "script.bin")
    for name in ("script.bin", "tar.bin"):
        with pytest.raises((UnpicklingError, RuntimeError)):
            load_pickled(tmp_path / name)
    for zipped in (True, False):
        torch.save({"one": torch.ones(2)}, tmp_path / "data.bin", _use_new_zipfile_serialization=zipped)
        assert torch.equal(load_pickled(tmp_path / "data.bin")["one"], torch.ones(2))


@pytest.mark.parametrize("version", ["2.4.1", str(torch.__version__)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(llama, tmp_path, monkeypatch, kind, version):
    """Also by a torch with which transformers itself reads no .bin file."""
    monkeypatch.setattr("models.load.torch.__version__", torch.torch_version.TorchVersion(version))
    files, _ = shards_of(llama, tmp_path / kind, kind)
    tensors = load_file(llama / "model.safetensors")
    assert set.union(*map(tensor_names, files)) == tensors.keys()
    loaded = load(tmp_path / kind).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def kept(share):
    return lambda files, _: files[1].write_bytes(files[1].read_bytes()[: int(share * files[1].stat().st_size)])


def replaced(content):
    return lambda files, _: files[1].write_bytes(content)


def index_of(content):
    return lambda files, index: index.write_text(content.replace("FILE", files[0].name))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DAMAGED = r"00002-of-00002\.\w+ .* is truncated, damaged or no file of weights .*copy the checkpoint again"
EXTRA = '{"weight_map": {"extra.weight": "FILE"}}'
BROKEN_INDEX = r"index\.json .*copy the checkpoint again"


@pytest.mark.parametrize(
    ("kind", "break_it", "words"),
    [
        *((kind, lambda files, _: files[1].unlink(), "00002-of-00002.* is missing, though the index") for kind in KINDS),
        *((kind, kept(share), DAMAGED) for kind in ("bin", "safetensors") for share in (0.0, 0.01, 0.5, 0.999)),
        *(("old", kept(share), DAMAGED) for share in (0.01, 0.9)),
        ("safetensors", replaced(POINTER), DAMAGED),
        *(("bin", replaced(text), DAMAGED) for text in (POINTER, b"<html>404</html>" * 100, b"\x80\x02" + b"x" * 2000)),
        *((kind, index_of(EXTRA), r"extra\.weight is in .*, but it is not \(1 ") for kind in KINDS),
        *(("bin", index_of(text), BROKEN_INDEX) for text in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}')),
        *(("bin", index_of(text), BROKEN_INDEX) for text in ('{"weight_map": ["a"]}', "{")),
    ],
)
def test_what_is_wrong_is_told_before_a_network_is_built(llama, tmp_path, kind, break_it, words):
    break_it(*shards_of(llama, tmp_path / kind, kind))
    with pytest.raises(UserError, match=words):
        _ = open_checkpoint(tmp_path / kind).weights
