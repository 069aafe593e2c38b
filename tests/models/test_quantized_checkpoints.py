"""int8 and int4 checkpoints in the layout of the ChatGLM releases: opened, trained under LoRA, saved, refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from errors import UserError
from models.adapters.lora import add_lora, merged_state_dict
from models.adapters.quantization import model_bits, quantized_layers
from models.chatglm.quantized_linear import QuantizedLinear
from models.checkpoint_folder import check_quantized_base, open_checkpoint
from models.heads import TokenLogProbs, score_layer
from models.load import load_scalar_model
from models.save import save_model
from tests.closeness import assert_close
from tests.models.chatglm_folders import change_json
from tests.models.common import Stops, load, shake
from tests.models.test_quantization import plain_loop_quantize
from tests.tiny import tiny_tokenizer
from tests.tiny_chatglm import write_shards

LINEAR = re.compile(r"\.layers\.\d+\.\w+\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)\.weight$")
SPECIAL = {"chatglm-6b": [501, 504], "chatglm2-6b": [501, 503]}  # [gMASK] <sop> of the tiny vocabularies
BLOCKS = 3


def write_checkpoints(golden, folder, bits):
    """From a golden tiny checkpoint: folder/integers in the official layout, folder/floats with what they stand for."""
    weights = load_file(golden / "model.safetensors")
    integers, floats = {}, {}
    for name, weight in weights.items():
        if LINEAR.search(name):
            integers[name], scale = plain_loop_quantize(weight, bits)
            integers[f"{name}_scale"] = scale
            values = integers[name].tolist()
            if bits == 4:
                values = [[half for byte in row for half in ((byte % 256) // 16, byte % 16)] for row in values]
                values = [[half - 16 if half > 7 else half for half in row] for row in values]
            floats[name] = torch.tensor(values, dtype=torch.float32) * scale.float()[:, None]
        else:
            integers[name] = weight.half()
            floats[name] = integers[name].float()
    for kind in ("integers", "floats"):
        (folder / kind).mkdir()
        shutil.copy(golden / "config.json", folder / kind)
    change_json(folder / "integers" / "config.json", quantization_bit=bits)
    torch.save(floats, folder / "floats" / "pytorch_model.bin")
    if bits == 4:  # one file, as the int4 releases; the int8 release has shards
        torch.save(integers, folder / "integers" / "pytorch_model.bin")
    else:
        write_shards(folder / "integers", integers, 2)


@pytest.fixture(
    scope="module", params=[(family, bits) for family in SPECIAL for bits in (4, 8)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def made(request, tmp_path_factory, shared_dir):
    family, bits = request.param
    folder = tmp_path_factory.mktemp(f"{family}-int{bits}")
    write_checkpoints(shared_dir / "golden" / family / "tiny", folder, bits)
    return folder, family, bits


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made[0] / "integers", tmp_path / "copied"), made[2]


def tokens(family):
    generator = torch.Generator().manual_seed(0)
    prompt, answer = (torch.randint(10, 490, (2, length), generator=generator) for length in (9, 5))
    ids = torch.cat([prompt, torch.tensor(SPECIAL[family]).expand(2, 2), answer], dim=1)
    return ids, torch.ones_like(ids)


def logits_of(folder, family, dtype):
    """The model of a folder and what it gives for the same tokens."""
    model = load(folder, dtype=dtype)
    ids, mask = tokens(family)
    with torch.no_grad():
        return model, model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_are_those_of_the_floats_that_the_integers_stand_for(made, dtype):
    folder, family, bits = made
    (model, ours), (floats, theirs) = (logits_of(folder / kind, family, dtype) for kind in ("integers", "floats"))
    layers = quantized_layers(model)
    assert len(layers) == 4 * BLOCKS and model_bits(model) == bits and not quantized_layers(floats)
    for layer in layers.values():
        assert layer.weight.dtype == torch.int8 and layer.weight_scale.dtype == torch.float16
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_close(ours, theirs)
    assert theirs.std() > 0.1


def test_a_reward_model_over_integers_has_a_float_head(made):
    folder, _, bits = made
    model = load(folder / "integers", load_scalar_model, seed=3)
    head = score_layer(model)
    assert model_bits(model) == bits and not isinstance(head, QuantizedLinear)
    assert head.weight.dtype == torch.float32 and head.weight.abs().sum() > 0


def test_lora_over_integers_exports_a_plain_checkpoint(made, tmp_path):
    folder, family, _ = made
    ids, mask = tokens(family)
    model = add_lora(load(folder / "integers", gradient_checkpointing=True), 4, 8)
    base = TokenLogProbs(model)(ids, mask)
    base.sum().backward()
    weights = [p for p in model.parameters() if p.requires_grad]
    assert weights and all(p.grad is not None for p in weights)
    shake(model)
    save_model(model, tiny_tokenizer("llama"), Stops(), tmp_path, merged_state_dict(model))
    assert json.loads((tmp_path / "config.json").read_text()).get("quantization_bit", 0) == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not quantized_layers(opened)
    with torch.no_grad():
        adapted, plain = TokenLogProbs(model.eval())(ids, mask), TokenLogProbs(opened)(ids, mask)
    assert_close(adapted, plain, 1e-4)
    assert (adapted - base).abs().max() > 1e-2


def test_a_prefix_over_integers_learns_what_it_learns_over_floats(made):
    folder, family, bits = made
    ids, mask = tokens(family)
    gradients = []
    for kind, options in (("integers", {}), ("floats", {}), ("floats", {"quantization_bit": bits})):
        model = load(folder / kind, pre_seq_len=4, seed=1, **options)
        TokenLogProbs(model)(ids, mask).sum().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all("prefix_encoder" in name and p.dtype == torch.float32 for name, p in trained.items())
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values()]))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        assert_close(other, gradients[0], 1e-3)


def test_a_quantised_model_saved_whole_keeps_the_official_layout(made, tmp_path):
    folder, _, bits = made
    model = load(folder / "integers")
    save_model(model, tiny_tokenizer("llama"), Stops(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_bit"] == bits
    stored, opened = load_file(tmp_path / "model.safetensors"), load(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened[name], tensor) and torch.equal(stored.get(name, tensor), tensor), name
    # From the same floats, --quantization_bit gives the same integers as a release: fixed points of the scheme.
    quantised = quantized_layers(load(folder / "floats", quantization_bit=bits))
    for name, layer in quantized_layers(model).items():
        assert torch.equal(stored[f"{name}.weight"], layer.weight)
        assert stored[f"{name}.weight_scale"].dtype == torch.float16
        assert torch.equal(quantised[name].weight, layer.weight)
        assert torch.equal(quantised[name].weight_scale, layer.weight_scale)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_integers_without_scales(copied):
    folder, bits = copied
    whole = {}
    for file in folder.glob("*.bin"):
        whole |= {name: tensor for name, tensor in torch.load(file).items() if not name.endswith("_scale")}
        file.unlink()
    write_shards(folder, whole, 2)
    with pytest.raises(UserError, match=rf"quantization_bit {bits}, but .*weight_scale is not in .*12 scales.*[Cc]opy"):
        load(folder)


def test_integers_that_the_config_does_not_know_of(copied):
    change_json(copied[0] / "config.json", quantization_bit=0)
    with pytest.raises(UserError, match=r"integer weights .*no quantization_bit; copy"):
        _ = open_checkpoint(copied[0]).weights


@pytest.mark.parametrize("bits", [3, 16, "8", True])
def test_other_numbers_of_bits(copied, bits):
    change_json(copied[0] / "config.json", quantization_bit=bits)
    with pytest.raises(UserError, match="4 and 8 can be read"):
        load(copied[0])


def test_training_integers_needs_an_adapter(made):
    folder, _, bits = made
    check_quantized_base(folder / "integers", 0, adapters=True)
    check_quantized_base(folder / "integers", bits, adapters=True)
    check_quantized_base(folder / "floats", 0, adapters=False)
    with pytest.raises(UserError, match=rf"{bits}-bit integers, which cannot be trained.*--lora_dim or --pre_seq_len"):
        check_quantized_base(folder / "integers", 0, adapters=False)
    with pytest.raises(UserError, match=rf"--quantization_bit {12 - bits}: .*{bits}-bit integers already"):
        check_quantized_base(folder / "integers", 12 - bits, adapters=True)
