"""A folder with an adapter alone is the base that it names with the adapter added: what the merged folder around it is."""

import shutil

import pytest

from errors import UserError
from models.adapters.lora import add_lora, merged_state_dict, save_adapter
from models.checkpoint_folder import first_new_row, gets_prefix, open_checkpoint
from models.heads import TokenLogProbs, TokenScores, base_model, is_peft
from models.load import load_causal_lm, load_scalar_model
from models.save import save_model
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.closeness import assert_close
from tests.models.chatglm_folders import change_json
from tests.models.common import load, shake, tokens
from tests.models.test_zero3 import tiny_integers
from tests.tiny import tiny_checkpoint


def write(base, folder, read=load_causal_lm, first_new_row=None, tokenizer=None):
    """What training with LoRA leaves: merged weights, and the adapter alone in folder/adapter."""
    tokenizer = tokenizer or load_tokenizer(base)
    model = add_lora(load(base, read, tokenizer=tokenizer), 2, 6, first_new_row=first_new_row)
    shake(model, size=0.3)
    base_model(model).config.update({"reward_mean": 0.3, "reward_std": 1.7} if read is load_scalar_model else {})
    save_model(model, tokenizer, load_template(base, tokenizer), folder, merged_state_dict(model))
    save_adapter(model, folder / "adapter")
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "chatglm2-6b"])
@pytest.mark.parametrize(("read", "head"), [(load_causal_lm, TokenLogProbs), (load_scalar_model, TokenScores)])
def test_it_computes_what_the_merged_folder_computes(folder_of, tmp_path, family, read, head):
    base = folder_of(family)
    folder = write(base, tmp_path / "tuned", read)
    alone, merged = (load(path, read) for path in (folder / "adapter", folder))
    ids, mask = tokens(folder=base)
    assert_close(head(alone)(ids, mask), head(merged)(ids, mask))
    assert not is_peft(alone) and alone.training and all(weight.requires_grad for weight in alone.parameters())
    checkpoint = open_checkpoint(folder / "adapter")
    assert checkpoint.gives_scores == open_checkpoint(folder).gives_scores == (read is load_scalar_model)
    assert getattr(alone.config, "reward_std", None) == getattr(merged.config, "reward_std", None)
    tokenizer = load_tokenizer(checkpoint)
    assert load_template(checkpoint, tokenizer) == load_template(folder, tokenizer)
    # without the merged model around it, as copied elsewhere
    shutil.move(folder / "adapter", tmp_path / "copied")
    assert_close(head(load(tmp_path / "copied", read))(ids, mask), head(merged)(ids, mask))


def test_new_rows_come_with_it(folder_of, tmp_path):
    base = folder_of("llama")
    tokenizer, rows = load_tokenizer(base), open_checkpoint(base).config().vocab_size
    tokenizer.add_tokens([f"<new{number}>" for number in range(rows - len(tokenizer) + 2)])
    folder = write(base, tmp_path, first_new_row=rows, tokenizer=tokenizer)
    tokenizer = load_tokenizer(folder / "adapter")
    alone = load(folder / "adapter", tokenizer=tokenizer)
    assert first_new_row(base, tokenizer) == rows and first_new_row(folder / "adapter", tokenizer) is None
    for name, tensor in load(folder).state_dict().items():
        assert_close(alone.state_dict()[name], tensor)


def test_an_adapter_over_an_adapter(folder_of, tmp_path):
    """Training from an adapter's folder names that folder as the base."""
    first = write(folder_of("llama"), tmp_path / "first")
    second = write(first / "adapter", tmp_path / "second")
    ids, mask = tokens()
    assert open_checkpoint(second / "adapter").adapters == (first / "adapter", second / "adapter")
    assert_close(TokenLogProbs(load(second / "adapter"))(ids, mask), TokenLogProbs(load(second))(ids, mask))


def test_what_cannot_be_opened_is_told(folder_of, tmp_path):
    adapter = write(folder_of("llama"), tmp_path / "tuned") / "adapter"
    with pytest.raises(UserError, match=r"beside which no prefix is trained.*merge_and_unload"):
        open_checkpoint(adapter).prefix(pre_seq_len=4)
    with pytest.raises(UserError, match="holds the adapter that the run starts from"):
        gets_prefix(adapter, tmp_path / "tuned")
    narrow = tiny_checkpoint(tmp_path / "narrow", "llama", hidden_size=16)
    tiny_integers(tmp_path / "integers")
    for base, sentence in (
        (narrow, "adapter_model.safetensors does not fit over .*narrow"),
        (folder_of("opt"), "adapter_model.safetensors lacks base_model.model.model.decoder"),
        (tmp_path / "integers", "its weights are 4-bit integers; name the merged model"),
    ):
        change_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
        with pytest.raises(UserError, match=sentence):
            load(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        open_checkpoint(adapter)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    (adapter / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match=r"names .*gone, which does not open here: model folder"):
        open_checkpoint(adapter)
