"""LoRA: what it touches in every family, what is trained, the model without it, saved alone and merged."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from errors import UserError
from models.adapters.lora import adapter_disabled, add_lora, lora_targets, merged_state_dict, save_adapter
from models.heads import TokenLogProbs, TokenScores
from models.load import load_scalar_model
from models.save import save_model
from models.tokenizer import load_tokenizer
from tests.closeness import assert_close
from tests.models.common import Stops, load, shake, tokens, trained

# counted by hand from the published networks: linear layers in one block
LAYERS_PER_BLOCK = dict.fromkeys(("bloom", "gpt2", "gpt_neox"), 4) | dict.fromkeys(("opt", "glm", "glm4"), 6)
LAYERS_PER_BLOCK |= dict.fromkeys(("chatglm-6b", "chatglm2-6b"), 1)  # of ChatGLM query_key_value alone is adapted
LAYERS_PER_BLOCK |= dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), 7)


def save(model, source, folder):
    """Merged weights in the folder, the adapter alone in folder/adapter."""
    save_model(model, load_tokenizer(source), Stops(), folder, merged_state_dict(model))
    assert save_adapter(model, folder / "adapter")


def test_a_language_model_disabled_merged_and_alone(any_checkpoint, tmp_path):
    checkpoint = any_checkpoint
    ids, mask = tokens(folder=checkpoint)
    assert len(lora_targets(load(checkpoint))) == 2 * LAYERS_PER_BLOCK[checkpoint.name]
    model = add_lora(load(checkpoint), 2, 6)
    assert len(trained(model)) == 4 * LAYERS_PER_BLOCK[checkpoint.name]  # two matrices a layer
    assert all("lora_" in name for name in trained(model))
    shake(model)
    with torch.no_grad():
        adapted, plain = TokenLogProbs(model)(ids, mask), TokenLogProbs(load(checkpoint))(ids, mask)
        assert (adapted - plain).abs().max() > 1e-3
        with adapter_disabled(model):
            assert torch.equal(TokenLogProbs(model)(ids, mask), plain)  # the reference, without a second copy
        assert torch.equal(TokenLogProbs(model)(ids, mask), adapted)
    save(model, checkpoint, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter")
    with torch.no_grad():
        assert_close(TokenLogProbs(merged)(ids, mask), adapted)
        assert_close(TokenLogProbs(alone)(ids, mask), adapted)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 60_000
    (tmp_path / "plain").touch()  # with the mode that the umask says
    assert len({file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file()}) == 1
    theirs = model.merge_and_unload().state_dict()  # peft's own merge
    ours = merged.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name])


def test_a_scalar_model_trains_its_head_too(any_checkpoint, tmp_path):
    checkpoint = any_checkpoint
    ids, mask = tokens(folder=checkpoint)
    model = add_lora(load(checkpoint, load_scalar_model, seed=5), 2, 6)
    head = {name for name in trained(model) if "lora_" not in name}
    assert head and all("score" in name or "classifier_head" in name for name in head)
    with torch.no_grad():
        start = TokenScores(model)(ids, mask)
        shake(model)
        scores = TokenScores(model)(ids, mask)
        with adapter_disabled(model):
            assert torch.equal(TokenScores(model)(ids, mask), start)
        assert (scores - start).abs().max() > 1e-3
        save(model, checkpoint, tmp_path)
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        base = load(checkpoint, load_scalar_model, seed=6)  # another head; the adapter brings its own
        opened = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert_close(TokenScores(merged)(ids, mask), scores)
        assert_close(TokenScores(opened)(ids, mask), scores)


def test_scale_is_alpha_over_dim(folder_of):
    """One layer by hand: y = W x + b + alpha/dim * B A x."""
    model = add_lora(load(folder_of("opt")), 4, 12, module_name="layers.1.fc1")
    shake(model)
    layer = model.get_base_model().model.decoder.layers[1].fc1
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + layer.base_layer.bias + 3.0 * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("family", "module_name", "count"),
    [
        ("opt", "decoder.layers.", 12),
        ("opt", "q_proj,v_proj", 4),
        ("opt", "layers.0.", 6),
        ("opt", "layers.1.self_attn, fc2", 6),
        ("gpt2", "c_attn", 2),  # a Conv1D is a linear layer
    ],
)
def test_module_names_are_substrings(folder_of, family, module_name, count):
    adapted = add_lora(load(folder_of(family)), 2, 4, module_name=module_name)
    assert len(trained(adapted)) == 2 * count


def test_a_scope_that_matches_nothing_is_an_error(folder_of):
    """The predecessors' default scope on a family that names its layers otherwise trained the whole model, silently."""
    model = load(folder_of("bloom"))
    with pytest.raises(UserError, match=r"decoder\.layers\..*bloom.*query_key_value"):
        add_lora(model, 2, 4, module_name="decoder.layers.")
    for names, unmatched in (("lm_head", "lm_head"), ("word_embeddings,query_key_value", "word_embeddings"), (",", ",")):
        with pytest.raises(UserError, match=f"--lora_module_name {unmatched} matches no linear layer"):
            add_lora(model, 2, 4, module_name=names)


def test_adapters_have_the_models_dtype_and_plain_models_pass_through(folder_of, tmp_path):
    model = load(folder_of("opt"), dtype=torch.bfloat16)
    assert merged_state_dict(model).keys() == model.state_dict().keys()
    assert not save_adapter(model, tmp_path / "adapter") and not (tmp_path / "adapter").exists()
    adapted = add_lora(model, 2, 4)
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in merged_state_dict(adapted).values()} == {torch.bfloat16}
