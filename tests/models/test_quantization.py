"""8-bit and 4-bit weights: the published scheme against plain loops, quantised layers, whole models, LoRA on them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from errors import UserError
from models.adapters.lora import add_lora, merged_state_dict, save_adapter
from models.adapters.quantization import plain_state_dict, quantize_linears, quantized_layers
from models.chatglm.quantized_linear import QuantizedLinear, block_linears, dequantize, quantize
from models.heads import TokenLogProbs, TokenScores
from models.load import load_scalar_model
from models.save import save_model
from models.tokenizer import load_tokenizer
from tests.closeness import assert_close
from tests.models.common import Stops, load, shake, tokens, trained
from tests.models.test_adapters import LAYERS_PER_BLOCK


def some_weight(rows=7, columns=10, seed=0, spread=1.0):
    return spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# --- numbers ----------------------------------------------------------------------------------------------------------


def plain_loop_quantize(weight, bits):
    """The published scheme with python's own numbers: rows of bytes, scales rounded to float16."""
    largest = {8: 127, 4: 7}[bits]
    rows, scales = [], []
    for row in weight.tolist():
        scale = torch.tensor(max(abs(value) for value in row) / largest).half().item()
        integers = [round(value / scale) for value in row]
        if bits == 4:
            packed = [(high % 16) * 16 + low % 16 for high, low in zip(integers[0::2], integers[1::2], strict=True)]
            integers = [byte - 256 if byte > 127 else byte for byte in packed]
        rows.append(integers)
        scales.append(scale)
    return torch.tensor(rows, dtype=torch.int8), torch.tensor(scales, dtype=torch.float16)


def test_bytes_counted_by_hand():
    # 8 bits: the largest of the row is 127, the scale 1/127 of it
    values, scale = quantize(torch.tensor([[127.0, -127.0, 1.0, -2.0], [0.0, 254.0, -3.1, 2.9]]), 8)
    assert values.tolist() == [[127, -127, 1, -2], [0, 127, -2, 1]] and scale.tolist() == [1.0, 2.0]
    # 4 bits: (7, -7) = 0x7, 0x9 -> 0x79; (-1, 3) = 0xF, 0x3 -> 0xF3 = -13; the even column is the high half
    values, scale = quantize(torch.tensor([[7.0, -7.0, -1.0, 3.0]]), 4)
    assert values.tolist() == [[0x79, 0xF3 - 256]] and scale.tolist() == [1.0]
    # reading knows -8 too, which a file may hold: 0x8 = -8, 0x7 = 7
    packed = torch.tensor([[0x87 - 256, 0x08]], dtype=torch.int8)
    assert dequantize(packed, torch.tensor([0.5]).half(), 4, torch.float32).tolist() == [[-4.0, 3.5, 0.0, -4.0]]


@pytest.mark.parametrize("bits", [4, 8])
def test_values_and_scales_equal_a_plain_loop(bits):
    for seed in range(3):
        weight = some_weight(seed=seed, spread=10.0**-seed)
        values, scale = quantize(weight, bits)
        expected_values, expected_scale = plain_loop_quantize(weight, bits)
        assert values.dtype == torch.int8 and scale.dtype == torch.float16
        assert torch.equal(values, expected_values) and torch.equal(scale, expected_scale)
        # fixed points: what was read back gives the same integers
        again, scale_again = quantize(dequantize(values, scale, bits, torch.float32), bits)
        assert torch.equal(again, values) and torch.equal(scale_again, scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_and_of_hardly_anything(bits):
    weight = torch.zeros(3, 4)
    weight[1, 2] = 1e-7  # its scale rounds to zero in float16
    weight[2] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    values, scale = quantize(weight, bits)
    back = dequantize(values, scale, bits, torch.float32)
    assert back.isfinite().all() and (back[0] == 0).all() and scale[0] == 0
    assert (back[1] - weight[1]).abs().max() <= 2.0**-24 / 2  # half a step of float16's smallest number
    assert back[2, 0] > 0.99 and back[2, 3] == 0


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        (torch.ones(2, 3), 4, "even number"),
        (torch.ones(2, 4), 3, "4 and 8"),
        (torch.tensor([[1.0, float("nan")]]), 8, "not finite"),
        (torch.tensor([[1.0, float("-inf")]]), 8, "not finite"),
    ],
)
def test_what_cannot_be_quantised(weight, bits, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, bits)


# --- a layer ----------------------------------------------------------------------------------------------------------


def pair_of_layers(bits, dtype=torch.float32, bias=True):
    """A quantised layer and a float one that holds its dequantised weight."""
    torch.manual_seed(1)
    layer = nn.Linear(12, 6, bias=bias).to(dtype)
    quantized = QuantizedLinear.of(layer, bits)
    twin = copy.deepcopy(layer)
    twin.weight.data = dequantize(quantized.weight, quantized.weight_scale, bits, dtype)
    return quantized, twin


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_what_its_dequantised_weight_does(bits, dtype, bias):
    quantized, twin = pair_of_layers(bits, dtype, bias)
    assert isinstance(quantized, nn.Linear) and [name for name, _ in quantized.named_parameters()] == ["bias"] * bias
    assert not trained(quantized)
    for layer in (quantized, twin):  # which somebody may train
        layer.requires_grad_(True)
    x = torch.randn(2, 5, 12).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    results = [quantized(inputs[0]), twin(inputs[1])]
    for result in results:
        assert result.dtype == dtype
        result.square().sum().backward()
    if bias:
        torch.testing.assert_close(quantized.bias.grad, twin.bias.grad)
    again = checkpoint(quantized, inputs[2], use_reentrant=False)
    again.square().sum().backward()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], again)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert torch.equal(inputs[0].grad, inputs[2].grad)


def test_no_float_weight_is_kept_for_the_backward_pass():
    quantized, _ = pair_of_layers(4)
    kept = []
    x = torch.randn(3, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantized(x).sum()
    assert {t.dtype for t in kept if t.numel() >= 6} == {torch.int8, torch.float16}


@pytest.mark.parametrize("bits", [4, 8])
def test_casting_copying_and_storing_keep_the_integers(bits, tmp_path):
    quantized, _ = pair_of_layers(bits)
    state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    assert state.keys() == {"weight", "weight_scale", "bias"}
    for cast in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.float(), lambda m: m.to("cpu"), copy.deepcopy):
        same = cast(copy.deepcopy(quantized))
        assert torch.equal(same.weight, state["weight"]) and same.weight.dtype == torch.int8
        assert torch.equal(same.weight_scale, state["weight_scale"]) and same.weight_scale.dtype == torch.float16
    torch.save(quantized.state_dict(), tmp_path / "layer.pt")
    empty = QuantizedLinear(12, 6, bits)
    empty.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    x = torch.randn(3, 12)
    assert torch.equal(empty(x), quantized(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_conv1d_of_gpt2_becomes_a_linear_and_goes_back(bits):
    torch.manual_seed(0)
    layer = Conv1D(6, 12)  # weight [12 in, 6 out]
    quantized = QuantizedLinear.of(layer, bits)
    box = nn.Sequential(quantized)
    plain = plain_state_dict(box, box.state_dict(), torch.float32)
    assert plain.keys() == {"0.weight", "0.bias"} and plain["0.weight"].shape == layer.weight.shape
    layer.weight.data = plain["0.weight"]
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(quantized(x), layer(x))


# --- whole models -----------------------------------------------------------------------------------------------------


def dequantised_twin(model, folder, **options):
    """The same checkpoint in float, its block weights replaced by what the quantised model's stand for."""
    twin = load(folder, **options)
    twin.load_state_dict(plain_state_dict(model, model.state_dict(), torch.float32), strict=True)
    return twin


@pytest.mark.parametrize("bits", [4, 8])
def test_lora_learns_on_a_quantised_base_what_it_learns_on_the_float_one(checkpoint, bits, tmp_path):
    """Blocks are quantised and nothing else; merged, the weights are those of the float twin."""
    base = load(checkpoint, quantization_bit=bits, gradient_checkpointing=True)
    layers = quantized_layers(base)
    assert len(layers) == 2 * LAYERS_PER_BLOCK[checkpoint.name] and not list(block_linears(base))
    assert not isinstance(base.get_output_embeddings(), QuantizedLinear)
    twin = dequantised_twin(base, checkpoint, gradient_checkpointing=True)
    ids, mask = tokens()
    with torch.no_grad():
        ours, theirs, original = (TokenLogProbs(one)(ids, mask) for one in (base, twin, load(checkpoint)))
    assert_close(ours, theirs)
    assert (ours - original).abs().max() > 1e-4
    gradients, merged = [], []
    for one in (base, twin):
        torch.manual_seed(0)
        model = add_lora(one, 4, 8)
        shake(model)
        found = TokenLogProbs(model)(ids, mask)
        found.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        merged.append(merged_state_dict(model))
        if one is base:
            save_model(model, load_tokenizer(checkpoint), Stops(), tmp_path, merged[0])
            save_adapter(model, tmp_path / "adapter")
            expected = found.detach()
    assert len(gradients[0]) == 2 * len(layers) and all("lora_" in name for name in gradients[0])
    for name, gradient in gradients[1].items():
        assert_close(gradients[0][name], gradient, 1e-3)
    assert merged[0].keys() == merged[1].keys()
    for name, tensor in merged[1].items():
        torch.testing.assert_close(merged[0][name], tensor)
    with torch.no_grad():
        opened = TokenLogProbs(AutoModelForCausalLM.from_pretrained(tmp_path))(ids, mask)
    assert_close(opened, expected, 1e-4)


def test_a_scalar_model_keeps_its_float_head(folder_of):
    half = add_lora(load(folder_of("llama"), load_scalar_model, dtype=torch.bfloat16, quantization_bit=8), 2, 4)
    assert {p.dtype for p in trained(half).values()} == {torch.bfloat16}
    assert all(layer.weight_scale.dtype == torch.float16 for layer in quantized_layers(half).values())
    model = load(folder_of("llama"), load_scalar_model, quantization_bit=4)
    assert type(model.score) is nn.Linear and len(quantized_layers(model)) == 2 * LAYERS_PER_BLOCK["llama"]
    adapted = add_lora(model, 2, 4)
    TokenScores(adapted)(*tokens()).sum().backward()
    with_gradient = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("score" in name for name in with_gradient) and any("lora_B" in name for name in with_gradient)


def test_a_layer_that_cannot_be_quantised_is_named():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3)])})
    with pytest.raises(UserError, match=r"--quantization_bit 4: the layer blocks\.0 .*even number"):
        quantize_linears(model, 4)
