"""Checkpoints in and out: what is loaded, what is refused and in which words, what a saved folder holds."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from errors import UserError
from models.checkpoint_folder import check_context_length, check_new_tokens, open_checkpoint
from models.heads import start_head
from models.load import load_scalar_model
from models.save import save_model
from models.tokenizer import check_same_tokenizer, load_tokenizer
from tests.closeness import assert_close
from tests.models.chatglm_folders import change_json
from tests.models.common import Stops, load
from tests.tiny import SPARE_ROWS, tiny_checkpoint, tiny_tokenizer


@pytest.fixture
def gpt2(folder_of, tmp_path):
    return shutil.copytree(folder_of("gpt2"), tmp_path / "gpt2")


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_loads_what_transformers_loads_and_no_dropout(checkpoint):
    model = load(checkpoint)
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(checkpoint))
    assert model.training
    assert all(layer.p == 0 for layer in model.modules() if isinstance(layer, torch.nn.Dropout))
    dropouts = {name: value for name, value in model.config.to_dict().items() if "drop" in name and value is not None}
    assert not any(dropouts.values())
    # spare rows stay: the embedding is never cut to the tokenizer's length
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == len(load_tokenizer(checkpoint)) + SPARE_ROWS


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("opt", {"dropout", "attention_dropout"}),
        ("bloom", {"hidden_dropout", "attention_dropout"}),
        ("gpt2", {"resid_pdrop", "embd_pdrop", "attn_pdrop"}),
        ("llama", {"attention_dropout"}),
    ],
)
def test_dropout_flag_reaches_every_field(folder_of, tmp_path, family, fields):
    folder = shutil.copytree(folder_of(family), tmp_path / family)
    change_json(folder / "config.json", layerdrop=0.5)
    config, kept = (load(folder, dropout=value).config.to_dict() for value in (0.25, None))
    assert {config[name] for name in fields} == {0.25} and config["layerdrop"] == kept["layerdrop"] == 0.0
    before = AutoConfig.from_pretrained(folder).to_dict()
    assert {name: kept[name] for name in fields} == {name: before[name] for name in fields}


def test_scalar_model_has_the_trunk_and_a_fresh_seeded_head_and_is_saved_with_it(checkpoint, tmp_path):
    model, again, other = (load(checkpoint, load_scalar_model, seed=seed) for seed in (3, 3, 4))
    assert same_weights(model.base_model, AutoModelForCausalLM.from_pretrained(checkpoint).base_model)
    assert same_weights(model, again)
    assert not torch.equal(model.score.weight, other.score.weight)
    assert model.score.weight.shape == (1, 32)
    model.config.update({"reward_mean": 1.5, "reward_std": 0.25})
    save_model(model, load_tokenizer(checkpoint), Stops(), tmp_path)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same_weights(model, opened) and opened.config.num_labels == 1
    again = load(tmp_path, load_scalar_model, seed=99)
    assert same_weights(model, again)
    assert (again.config.reward_mean, again.config.reward_std) == (1.5, 0.25)


@pytest.mark.detail(43)
@pytest.mark.ppo
def test_fresh_head_has_the_right_spread():
    head = torch.nn.Linear(2000, 1)
    start_head(head, seed=0)
    assert head.weight.std().item() == pytest.approx(1 / 2001**0.5, rel=0.05)
    assert abs(head.weight.mean().item()) < 4 / 2001 and head.bias.item() == 0


def test_saved_actor_opens_with_transformers(checkpoint, tmp_path):
    model, tokenizer = load(checkpoint), load_tokenizer(checkpoint)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] += 1.0
    save_model(model, tokenizer, Stops((2, 5)), tmp_path / "actor")
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "actor", output_loading_info=True)
    assert same_weights(model, opened)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    text = "Hello 你好, how are you?\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "actor")(text).input_ids == tokenizer(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "actor").chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "actor").eos_token_id == [2, 5]
    assert (tmp_path / "actor" / "sanbu_template.json").exists()
    assert not list(tmp_path.rglob(".*"))  # no draft left
    assert same_weights(load(tmp_path / "actor"), model)


def test_saved_dtype_is_the_trained_one(gpt2, tmp_path):
    model, tokenizer = load(gpt2, dtype=torch.bfloat16), load_tokenizer(gpt2)
    masters = {name: tensor.float() for name, tensor in model.state_dict().items()}
    save_model(model, tokenizer, Stops(), tmp_path / "out", masters)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_interrupted_save_leaves_the_old_checkpoint_or_none(gpt2, tmp_path, monkeypatch):
    """The output folder also holds metrics and the run's own checkpoints."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    (out / "model-00001-of-00002.safetensors").write_text("left by an older, sharded save")
    model, tokenizer = load(gpt2), load_tokenizer(gpt2)
    save_model(model, tokenizer, Stops(), out)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    save_model(model, tokenizer, Stops(), out)
    assert (out / "metrics.jsonl").exists() and not (out / "model-00001-of-00002.safetensors").exists()

    class Broken(Stops):
        def save(self, folder, tokenizer):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # before anything is moved: the old one is whole
        save_model(model, tokenizer, Broken(), out)
    assert same_weights(load(out), model)
    assert not list(out.glob(".*"))  # weights that nobody will read take no room

    move = Path.replace

    def stumble(self, target):
        if self.name == "model.safetensors":
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", stumble)
    # in the middle of the move: no config.json, so nothing takes it for a checkpoint
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tokenizer, Stops(), out)
    with pytest.raises(UserError, match=r"has no config\.json"):
        _ = open_checkpoint(out).weights


def test_lost_and_empty_tensors_are_not_published(gpt2, tmp_path, monkeypatch):
    model, tokenizer = load(gpt2), load_tokenizer(gpt2)
    empty = {name: torch.empty(0) for name in model.state_dict()}  # what ZeRO-3 leaves where nobody gathered
    with pytest.raises(OSError, match="are empty"):
        save_model(model, tokenizer, Stops(), tmp_path / "out", empty)
    write = type(model).save_pretrained

    def lose_a_tensor(self, folder, state_dict, **more):
        write(self, folder, state_dict=state_dict, **more)
        tensors = load_file(Path(folder) / "model.safetensors")
        tensors.pop("transformer.wpe.weight")
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", lose_a_tensor)
    with pytest.raises(OSError, match="read back"):
        save_model(model, tokenizer, Stops(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_draft_lies_in_the_folder(gpt2, tmp_path, monkeypatch):
    """--output_dir . and folders that are mounts, whose neighbours are on another disk or belong to somebody else."""
    model, tokenizer = load(gpt2), load_tokenizer(gpt2)
    room = tmp_path / "room"
    (room / ".draft" / "left").mkdir(parents=True)   # by a save that was killed
    monkeypatch.chdir(room)
    tmp_path.chmod(0o555)
    try:
        save_model(model, tokenizer, Stops(), ".")
    finally:
        tmp_path.chmod(0o755)
    assert same_weights(load(room), model)
    assert not (room / ".draft").exists() and not (room / "left").exists()


def test_published_folders_can_be_entered(gpt2, tmp_path):
    """Files get the mode of config.json, which has no x bit; a folder with it could not be listed."""

    class WithParts(Stops):
        def save(self, folder, tokenizer):
            super().save(folder, tokenizer)
            (folder / "parts").mkdir(mode=0o755)
            (folder / "parts" / "one").write_text("1")
            (folder / "parts" / "one").chmod(0o600)

    save_model(load(gpt2), load_tokenizer(gpt2), WithParts(), tmp_path / "out")
    assert (tmp_path / "out" / "parts").stat().st_mode & 0o100
    assert (tmp_path / "out" / "parts" / "one").stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode


def test_pad_is_eos_where_there_is_none_and_scoring_by_transformers_stays_right(gpt2, tmp_path):
    tokenizer = load_tokenizer(gpt2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    model = load(gpt2, load_scalar_model).eval()
    save_model(model, tokenizer, Stops((0,)), tmp_path / "reward")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    ids = torch.tensor([[9, 30, 41, 0]])  # ends in the end token, which is also the pad token
    with torch.no_grad():
        hidden = model.transformer(ids).last_hidden_state[0, -1]
        assert_close(opened(ids).logits[0], model.score(hidden))


def test_more_tokens_than_rows_grow_the_embedding(gpt2):
    tokenizer = load_tokenizer(gpt2)
    rows = len(tokenizer) + SPARE_ROWS
    tokenizer.add_tokens([f"<new{i}>" for i in range(SPARE_ROWS)])
    before = load(gpt2, tokenizer=tokenizer)
    assert before.get_input_embeddings().weight.shape[0] == rows  # the spare rows take them
    tokenizer.add_tokens(["<one more>"])
    grown = load(gpt2, tokenizer=tokenizer)
    assert grown.get_input_embeddings().weight.shape[0] == rows + 1 == grown.config.vocab_size
    assert grown.lm_head.weight is grown.get_input_embeddings().weight
    assert torch.equal(grown.lm_head.weight[:rows], before.lm_head.weight)


def test_a_prefix_has_no_new_rows(gpt2):
    tokenizer = load_tokenizer(gpt2)
    tokenizer.add_tokens([f"<spare{i}>" for i in range(SPARE_ROWS)])
    check_new_tokens(gpt2, tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(UserError, match=r"\(<end>\): P-Tuning freezes the embedding.*--lora_dim"):
        check_new_tokens(gpt2, tokenizer)


def test_position_tables_end(folder_of, tmp_path):
    folder = tiny_checkpoint(tmp_path / "gpt2", "gpt2", n_positions=128)
    check_context_length(folder, 128, "--max_seq_len")
    with pytest.raises(UserError, match=r"--max_seq_len 129.*128 positions"):
        check_context_length(folder, 129, "--max_seq_len")
    check_context_length(folder_of("bloom"), 10**6, "--max_seq_len")


def test_tokenizers_are_compared_id_by_id(folder_of):
    first, other = (load_tokenizer(folder_of(family)) for family in ("llama", "gpt2"))
    check_same_tokenizer(first, load_tokenizer(folder_of("llama")), ("a", "b"))
    with pytest.raises(UserError, match=r"The tokenizers of a .* and c .* differ in \d+ tokens"):
        check_same_tokenizer(first, other, ("a", "c"))


# --- what is refused --------------------------------------------------------------------------------------------------


def without_end_token(folder):
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def lose(pattern):
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


@pytest.mark.parametrize(
    ("read", "break_it", "words"),
    [
        (load, shutil.rmtree, "does not exist"),
        (open_checkpoint, lose("config.json"), r"has no config\.json"),
        (load, lambda folder: change_json(folder / "config.json", model_type="bert"), r"'bert'.*opt, bloom, llama"),
        (load, lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"'), r"config\.json cannot be read"),
        (load, lambda folder: change_json(folder / "config.json", n_embd=64), "shapes"),
        (load, lose("model.safetensors"), r"no weights.*model\.safetensors"),
        (load, lambda folder: (folder / "adapter_config.json").write_text("{}"), "an adapter.* remove adapter_config.json and"),
        (load_tokenizer, lose("tokenizer*"), "has no tokenizer"),
        (load_tokenizer, without_end_token, "neither a pad nor an end token"),
    ],
)
def test_a_folder_that_is_not_whole(gpt2, read, break_it, words):
    break_it(gpt2)
    with pytest.raises(UserError, match=words):
        read(gpt2)


def test_hub_id_without_network():
    with pytest.raises(UserError, match=r"some-one/no-such-model.*hf download some-one/no-such-model"):
        load_tokenizer("some-one/no-such-model")


def test_a_reward_checkpoint_is_no_language_model(folder_of, tmp_path):
    folder = folder_of("llama")  # untied: the output matrix is a weight of its own
    save_model(load(folder, load_scalar_model), load_tokenizer(folder), Stops(), tmp_path)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load(tmp_path)
