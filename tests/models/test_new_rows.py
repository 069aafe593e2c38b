"""New rows of embedding and output matrix under LoRA: what they compute and learn, saved alone and merged."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from models.adapters.lora import adapter_disabled, add_lora, merged_state_dict, save_adapter
from models.checkpoint_folder import first_new_row, open_checkpoint
from models.heads import TokenLogProbs, TokenScores, base_model
from models.load import load_causal_lm, load_scalar_model
from models.save import save_model
from models.tokenizer import load_tokenizer
from tests.closeness import assert_close
from tests.models.common import Stops, load, shake, tokens, trained

NEW = 3

MERGED = 3e-4  # W + BA is rounded: 8e-5 seen


def wider(folder):
    """Return the rows of a model's embedding, and as much of a tokenizer as loading asks for, with NEW ids more."""
    rows = open_checkpoint(folder).config().vocab_size
    return rows, SimpleNamespace(get_vocab=lambda: {"old": 0, "new": rows + NEW - 1})


def adapted(folder, read=load_causal_lm, **options):
    """A model with LoRA over an enlarged embedding; every trained weight is moved."""
    rows, tokenizer = wider(folder)
    assert first_new_row(folder, tokenizer) == rows and first_new_row(folder, load_tokenizer(folder)) is None
    model = add_lora(load(folder, read, tokenizer=tokenizer, **options), 2, 6, first_new_row=rows)
    shake(model, size=0.3)
    return model


def with_new_ids(folder):
    """Ids among which are all new ones, as context and as target."""
    rows, _ = wider(folder)
    ids, mask = tokens(time=12, folder=folder)
    ids[:, 5:8] = torch.arange(rows, rows + NEW)
    return ids, mask


def test_a_language_model_disabled_merged_and_alone(any_checkpoint, tmp_path):
    rows, tokenizer = wider(any_checkpoint)
    ids, mask = with_new_ids(any_checkpoint)
    plain = load(any_checkpoint, tokenizer=tokenizer)
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    model = adapted(any_checkpoint)
    assert len([name for name in trained(model) if "lora_" not in name]) == (1 if tied else 2)
    with torch.no_grad():
        found = TokenLogProbs(model)(ids, mask)
        assert_close(TokenLogProbs(model, chunk_logits=2 * rows)(ids, mask), found)  # few rows at a time
        logits = base_model(model)(input_ids=ids, attention_mask=mask).logits  # as answers are drawn
        expected = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        assert_close(found, expected, MERGED)
        with adapter_disabled(model):
            assert torch.equal(TokenLogProbs(model)(ids, mask), TokenLogProbs(plain)(ids, mask))
        assert torch.equal(TokenLogProbs(model)(ids, mask), found)
        save_model(model, load_tokenizer(any_checkpoint), Stops(), tmp_path, merged_state_dict(model))
        assert save_adapter(model, tmp_path / "adapter")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_close(TokenLogProbs(merged)(ids, mask), found, MERGED)
        assert torch.equal(merged.get_input_embeddings().weight[:rows], plain.get_input_embeddings().weight[:rows])
        enlarged = AutoModelForCausalLM.from_pretrained(any_checkpoint, dtype=torch.float32)
        enlarged.resize_token_embeddings(rows + NEW)
        alone = PeftModel.from_pretrained(enlarged, tmp_path / "adapter")
        assert_close(alone(input_ids=ids, attention_mask=mask).logits, logits, MERGED)
        assert_close(alone.merge_and_unload()(input_ids=ids, attention_mask=mask).logits, logits, MERGED)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 60_000


def test_a_scalar_model_has_them_in_the_embedding(any_checkpoint, tmp_path):
    rows, _ = wider(any_checkpoint)
    ids, mask = with_new_ids(any_checkpoint)
    model = adapted(any_checkpoint, load_scalar_model, seed=5)
    with torch.no_grad():
        found = TokenScores(model)(ids, mask)
        save_model(model, load_tokenizer(any_checkpoint), Stops(), tmp_path, merged_state_dict(model))
        assert save_adapter(model, tmp_path / "adapter")
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert_close(TokenScores(merged)(ids, mask), found, MERGED)
        enlarged = load(any_checkpoint, load_scalar_model, seed=6)
        enlarged.resize_token_embeddings(rows + NEW)
        assert_close(TokenScores(PeftModel.from_pretrained(enlarged, tmp_path / "adapter"))(ids, mask), found, MERGED)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "chatglm-6b"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"quantization_bit": 4}], ids=str)
def test_gradients_are_those_of_the_whole_matrices(folder_of, family, options):
    """The rows' gradient equals the last rows' of the merged model, all of whose weights are trained."""
    folder = folder_of(family)
    rows, _ = wider(folder)
    ids, mask = with_new_ids(folder)
    model = adapted(folder, **options)
    TokenLogProbs(model, chunk_logits=2 * rows)(ids, mask).sum().backward()
    whole = load(folder, tokenizer=wider(folder)[1])
    whole.load_state_dict(merged_state_dict(model))
    TokenLogProbs(whole)(ids, mask).sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("new_rows"):
            matrix = whole.get_submodule(name.removeprefix("base_model.model.").removesuffix(".new_rows")).weight
            assert_close(parameter.grad, matrix.grad[rows:], relative=3e-4)  # W + BA is rounded: 7e-5 seen
        else:
            assert parameter.requires_grad == ("lora_" in name)


def test_new_rows_start_the_same_for_a_seed(folder_of):
    """PPO's actor and reference; what the caller draws next is not touched."""
    rows, tokenizer = wider(folder_of("llama"))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = load(folder_of("llama"), tokenizer=tokenizer).lm_head.weight[rows:]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(load(folder_of("llama"), tokenizer=tokenizer).lm_head.weight[rows:], one)
