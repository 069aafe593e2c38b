"""LoRA: what it touches in every family, what is trained, the model without it, saved alone and merged."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from errors import UserError
from models.adapters.lora import adapter_disabled, add_lora, lora_targets, merged_state_dict, save_adapter
from models.heads import TokenLogProbs, TokenScores, last_token_scores
from models.load import load_causal_lm, load_scalar_model, load_tokenizer
from models.save import save_model
from tests.closeness import assert_close
from tests.tiny import FAMILIES, tiny_checkpoint

# counted by hand from the published networks: linear layers in one block
LAYERS_PER_BLOCK = {
    "opt": 6, "bloom": 4, "llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7,
    "gpt2": 4, "gpt_neox": 4, "glm": 6, "glm4": 6,
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, folder


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("opt"), "opt")


def shake(model, seed=0):
    """Give every trained weight a value, as training would: B starts at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def tokens(seed=0):
    ids = torch.randint(7, 390, (2, 8), generator=torch.Generator().manual_seed(seed))
    return ids, torch.ones_like(ids)


def test_auto_takes_all_linear_layers_of_the_blocks(checkpoint):
    family, folder = checkpoint
    model = load_causal_lm(folder, dtype=torch.float32)
    assert len(lora_targets(model)) == 2 * LAYERS_PER_BLOCK[family]
    adapted = add_lora(model, 2, 4)
    pairs = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(pairs) == 2 * LAYERS_PER_BLOCK[family]
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_scalar_models_train_adapter_and_head(checkpoint):
    _, folder = checkpoint
    adapted = add_lora(load_scalar_model(folder, dtype=torch.float32), 2, 4)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    head = {name for name in trained if "lora_" not in name}
    assert len(head) == 1 and "score" in head.pop()


def test_merged_equals_adapted_and_opens_with_transformers(checkpoint, tmp_path):
    _, folder = checkpoint
    ids, mask = tokens()
    model = add_lora(load_causal_lm(folder, dtype=torch.float32), 2, 6)
    shake(model)
    with torch.no_grad():
        adapted = TokenLogProbs(model)(ids, mask)
        plain = TokenLogProbs(load_causal_lm(folder, dtype=torch.float32))(ids, mask)
        assert (adapted - plain).abs().max() > 1e-3
        with adapter_disabled(model):
            assert torch.equal(TokenLogProbs(model)(ids, mask), plain)  # the reference, without a second copy
        assert torch.equal(TokenLogProbs(model)(ids, mask), adapted)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)

    save_model(model, load_tokenizer(folder), Stops(), tmp_path / "merged", merged_state_dict(model))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert_close(TokenLogProbs(merged)(ids, mask), adapted)
    theirs = model.merge_and_unload().state_dict()  # peft's own merge
    ours = merged.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name])


class Stops:
    """As much of a template as save_model asks for."""

    stop_token_ids = (2,)

    def save(self, folder):
        pass


def test_adapter_alone_opens_with_peft(checkpoint, tmp_path):
    _, folder = checkpoint
    ids, mask = tokens()
    model = add_lora(load_causal_lm(folder, dtype=torch.float32), 2, 6)
    shake(model)
    assert save_adapter(model, tmp_path / "adapter")
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(TokenLogProbs(opened)(ids, mask), TokenLogProbs(model)(ids, mask))
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 60_000 < (folder / "model.safetensors").stat().st_size


def test_scalar_adapter_merged_and_alone(checkpoint, tmp_path):
    _, folder = checkpoint
    ids, mask = tokens()
    model = add_lora(load_scalar_model(folder, dtype=torch.float32, seed=5), 2, 6)
    with torch.no_grad():
        start = TokenScores(model)(ids, mask)
        shake(model)
        scores = TokenScores(model)(ids, mask)
        with adapter_disabled(model):
            assert torch.equal(TokenScores(model)(ids, mask), start)
    assert (scores - start).abs().max() > 1e-3
    save_model(model, load_tokenizer(folder), Stops(), tmp_path / "merged", merged_state_dict(model))
    save_adapter(model, tmp_path / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    base = load_scalar_model(folder, dtype=torch.float32, seed=6)  # another head; the adapter brings its own
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert_close(TokenScores(merged)(ids, mask), scores)
        assert_close(TokenScores(opened)(ids, mask), scores)
        assert last_token_scores(scores, mask).shape == (2,)


def test_scale_is_alpha_over_dim(opt):
    """One layer by hand: y = W x + b + alpha/dim * B A x."""
    model = add_lora(load_causal_lm(opt, dtype=torch.float32), 4, 12, module_name="layers.1.fc1")
    shake(model)
    layer = model.get_base_model().model.decoder.layers[1].fc1
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + layer.base_layer.bias + 3.0 * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("module_name", "count"),
    [("decoder.layers.", 12), ("q_proj,v_proj", 4), ("layers.0.", 6), ("fc", 4), ("layers.1.self_attn, fc2", 6)],
)
def test_module_names_are_substrings(opt, module_name, count):
    model = load_causal_lm(opt, dtype=torch.float32)
    assert len(lora_targets(model, module_name)) == count
    adapted = add_lora(model, 2, 4, module_name=module_name)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == count


def test_conv1d_of_gpt2_is_a_linear_layer(tmp_path):
    model = load_causal_lm(tiny_checkpoint(tmp_path, "gpt2"), dtype=torch.float32)
    assert len(lora_targets(model, "c_attn")) == 2


def test_a_scope_that_matches_nothing_is_an_error(tmp_path):
    """The predecessors' default scope on a family that names its layers otherwise trained the whole model, silently."""
    model = load_causal_lm(tiny_checkpoint(tmp_path, "bloom"), dtype=torch.float32)
    with pytest.raises(UserError, match=r"decoder\.layers\..*bloom.*query_key_value"):
        add_lora(model, 2, 4, module_name="decoder.layers.")
    with pytest.raises(UserError):  # the output matrix is no target
        add_lora(model, 2, 4, module_name="lm_head")


def test_adapter_has_the_models_dtype(opt):
    model = add_lora(load_causal_lm(opt, dtype=torch.bfloat16), 2, 4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in merged_state_dict(model).values()} == {torch.bfloat16}


def test_plain_models_pass_through(opt, tmp_path):
    model = load_causal_lm(opt, dtype=torch.float32)
    assert merged_state_dict(model).keys() == model.state_dict().keys()
    assert not save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
