"""Weight files of a checkpoint: every kind that is read, and what is wrong with one, told before anything is loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from models import load as factory
from models.checkpoint_folder import open_checkpoint
from models.load import load_causal_lm
from models.weight_files import tensor_names
from tests.tiny import tiny_checkpoint

KINDS = ("bin", "old", "safetensors")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


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


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(llama, tmp_path, kind):
    files, _ = shards_of(llama, tmp_path / kind, kind)
    tensors = load_file(llama / "model.safetensors")
    assert set.union(*map(tensor_names, files)) == tensors.keys()
    loaded = load_causal_lm(tmp_path / kind, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.fixture
def nothing_loads(monkeypatch):
    """What is wrong is told before a network is built."""
    monkeypatch.setattr(factory.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loading began"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_shard_is_named(llama, tmp_path, kind, number, nothing_loads):
    files, _ = shards_of(llama, tmp_path / kind, kind)
    files[number].unlink()
    with pytest.raises(UserError, match=rf"{files[number].name} is missing, though the index"):
        load_causal_lm(tmp_path / kind, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_shard_is_named(llama, tmp_path, kind, kept, nothing_loads):
    files, _ = shards_of(llama, tmp_path / kind, kind)
    content = files[1].read_bytes()
    files[1].write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=rf"{files[1].name} (is truncated|holds no weights).*copy the checkpoint again"):
        load_causal_lm(tmp_path / kind, dtype=torch.float32)


@pytest.mark.parametrize("kept", [0.01, 0.9])
def test_a_cut_pickle_of_the_old_kind(llama, tmp_path, kept):
    files, _ = shards_of(llama, tmp_path / "old", "old")
    content = files[1].read_bytes()
    files[1].write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=r"(damaged|truncated).*copy the checkpoint again"):
        load_causal_lm(tmp_path / "old", dtype=torch.float32)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("content", [POINTER, b"<html>404</html>" * 100, b"\x80\x02" + b"x" * 2000])
def test_a_file_of_something_else(llama, tmp_path, content, nothing_loads):
    files, _ = shards_of(llama, tmp_path / "bin", "bin")
    files[0].write_bytes(content)
    with pytest.raises(UserError, match=rf"{files[0].name} (holds no weights|is damaged)"):
        _ = open_checkpoint(tmp_path / "bin").weights


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_names_what_no_shard_has(llama, tmp_path, kind, nothing_loads):
    files, index = shards_of(llama, tmp_path / kind, kind)
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"model.layers.9.extra.weight": files[0].name}}))
    with pytest.raises(UserError, match=rf"model\.layers\.9\.extra\.weight is in {files[0].name}, but it is not \(1 "):
        load_causal_lm(tmp_path / kind, dtype=torch.float32)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}', "{"]
)
def test_a_broken_index(llama, tmp_path, content, nothing_loads):
    _, index = shards_of(llama, tmp_path / "bin", "bin")
    index.write_text(content)
    with pytest.raises(UserError, match=rf"{index.name} .*copy the checkpoint again"):
        _ = open_checkpoint(tmp_path / "bin").weights
