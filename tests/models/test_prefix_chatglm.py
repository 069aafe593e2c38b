"""P-Tuning of ChatGLM's own networks: files exchanged with the original trainer, what is trained, saved alone, opened again."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from errors import UserError
from models import save
from models.adapters.lora import save_prefix
from models.checkpoint_folder import check_context_length
from models.heads import TokenLogProbs
from tests.closeness import assert_close
from tests.models import test_prefix
from tests.models.chatglm_folders import change_json
from tests.models.common import Stops, load, tokens, trained
from tests.models.golden import golden

FAMILIES = ("chatglm-6b", "chatglm2-6b")
TUNED = ("tiny-prefix", "tiny-prefix-proj")
OWN = "transformer.prefix_encoder."
LENGTH = 4


def without_prefix(source, target):
    """The base that a golden folder's prefix was trained on: its other weights, and a config that knows no prefix."""
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    change_json(target / "config.json", pre_seq_len=None, prefix_projection=False)
    whole = source / "model.safetensors"
    tensors = load_file(whole) if whole.exists() else torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({name: t for name, t in tensors.items() if not name.startswith(OWN)}, target / "pytorch_model.bin")
    return target


@pytest.mark.parametrize("tuned", TUNED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_of_the_original_trainer_gives_the_originals_logits(monkeypatch, shared_dir, family, tuned, tmp_path):
    """And ours is stored as theirs: same names, shapes and type, so that the original opens it."""
    source = shared_dir / "golden" / family / tuned
    base = without_prefix(source, tmp_path / "base")
    (tmp_path / "checkpoint-10").mkdir()
    official = tmp_path / "checkpoint-10" / "pytorch_model.bin"  # as the original trainer names it
    shutil.copyfile(source / "prefix_only.bin", official)
    cases, _ = golden(source)
    case = next(name for name in cases if name.startswith("train") and "right_pad" in name)
    given = {"input_ids": cases[case]["input_ids"]}
    model = load(base, ptuning_checkpoint=official.parent).eval()
    assert_close(model(**given).logits, cases[case]["logits"])
    with_other_start = load(base, pre_seq_len=8, prefix_projection="proj" in tuned).eval()
    assert (with_other_start(**given).logits - cases[case]["logits"]).abs().max() > 1e-3

    theirs = torch.load(official, weights_only=True)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(theirs)
    monkeypatch.setattr(save, "check_tokenizer", lambda *_: None)  # the golden vocabulary of 512 has none of its own
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    save_prefix(model, SimpleNamespace(**ids, save_pretrained=lambda folder: None), Stops(), tmp_path / "ours", trained(model))
    ours = torch.load(tmp_path / "ours" / "prefix_only.bin", weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, theirs[name])
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["pre_seq_len"], config["prefix_projection"]) == (8, "proj" in tuned)
    assert config["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("family", FAMILIES)
def test_over_a_quantised_base(folder_of, family, tmp_path):
    """The prefix belongs to the checkpoint as it is on disk, whatever the base was held in while it was trained."""
    base = folder_of(family)
    model = load(base, pre_seq_len=LENGTH, quantization_bit=8, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in trained(model).values()} == {torch.float32}  # in a network of bfloat16
    TokenLogProbs(model)(*tokens(folder=base)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    folder = test_prefix.save(model, base, tmp_path / "tuned")
    assert not json.loads((folder / "config.json").read_text()).get("quantization_bit")
    again = load(folder)
    assert all(torch.equal(tensor, trained(again)[name]) for name, tensor in trained(model).items())


def test_a_whole_checkpoint_with_a_prefix_goes_on_with_it(shared_dir):
    folder = shared_dir / "golden" / "chatglm-6b" / "tiny-prefix"  # holds all weights, and the prefix alone beside them
    model = load(folder)
    (name,) = trained(model)
    assert torch.equal(trained(model)[name], AutoModelForCausalLM.from_pretrained(folder).get_parameter(name))
    with pytest.raises(UserError, match=r"--pre_seq_len 9, but model .* has a prefix of 8 places"):
        load(folder, pre_seq_len=9)
    check_context_length(folder, 10**6, "--max_seq_len")


def test_numbers_and_bases_that_do_not_fit(folder_of, tmp_path):
    base = folder_of("chatglm-6b")
    folder = test_prefix.save(load(base, pre_seq_len=LENGTH, prefix_projection=True), base, tmp_path / "tuned")
    with pytest.raises(UserError, match=r"--pre_seq_len 128, but the prefix in .*prefix_only.bin has 4 places"):
        load(folder, pre_seq_len=128)
    with pytest.raises(UserError, match=r"--prefix_projection false, but .* was saved with a projection; add the flag"):
        load(base, ptuning_checkpoint=folder, pre_seq_len=LENGTH)
    with pytest.raises(UserError, match=r"prefix_only.bin: embedding.weight has the shape"):
        load(folder_of("chatglm2-6b"), ptuning_checkpoint=folder)
    gone = str(tmp_path / "gone")
    for name, value, words in (
        ("pre_seq_len", 6, r"says pre_seq_len 6, but the prefix in .*prefix_only.bin has 4 places"),
        ("base_model_name_or_path", gone, rf'"base_model_name_or_path" names {gone}, .* correct that field'),
    ):
        before = json.loads((folder / "config.json").read_text())[name]
        change_json(folder / "config.json", **{name: value})
        with pytest.raises(UserError, match=f"config.json.*{words}"):
            load(folder)
        change_json(folder / "config.json", **{name: before})
    half = folder / "prefix_only.bin"
    half.write_bytes(half.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"prefix_only\.bin is truncated or damaged"):
        load(folder)
