"""int8 and int4 checkpoints in the layout of the ChatGLM releases: opened, trained under LoRA, saved, refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from errors import UserError
from models.adapters.lora import add_lora, merged_state_dict
from models.adapters.quantization import QuantizedLinear, model_bits, quantized_layers
from models.checkpoint_folder import check_quantized_base, open_checkpoint
from models.heads import TokenLogProbs, score_layer
from models.load import load_causal_lm, load_scalar_model
from models.save import save_model
from tests.closeness import assert_close
from tests.models.test_adapters import shake
from tests.models.test_quantization import plain_loop_quantize
from tests.models.zero3_worker import Stops
from tests.tiny import tiny_tokenizer

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
    set_config(folder / "integers", quantization_bit=bits)
    torch.save(floats, folder / "floats" / "pytorch_model.bin")
    if bits == 4:  # one file, as the int4 releases; the int8 release has shards
        torch.save(integers, folder / "integers" / "pytorch_model.bin")
        return
    names = sorted(integers)
    shards = {f"pytorch_model-0000{part + 1}-of-00002.bin": names[part::2] for part in range(2)}
    for shard, held in shards.items():
        torch.save({name: integers[name] for name in held}, folder / "integers" / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "integers" / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def set_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_are_those_of_the_floats_that_the_integers_stand_for(made, dtype):
    folder, family, bits = made
    model = load_causal_lm(folder / "integers", dtype=dtype)
    layers = quantized_layers(model)
    assert len(layers) == 4 * BLOCKS and model_bits(model) == bits
    for layer in layers.values():
        assert layer.weight.dtype == torch.int8 and layer.weight_scale.dtype == torch.float16
    assert {p.dtype for p in model.parameters()} == {dtype}
    floats = load_causal_lm(folder / "floats", dtype=dtype)
    assert not quantized_layers(floats)
    ids, mask = tokens(family)
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids, attention_mask=mask).logits for one in (model, floats))
    assert_close(ours, theirs)
    assert theirs.std() > 0.1


def test_generation_is_that_of_the_floats(made):
    folder, family, _ = made
    ids, mask = tokens(family)
    ids, mask = ids[:, :11], mask[:, :11]
    answers = []
    for kind in ("integers", "floats"):
        model = load_causal_lm(folder / kind, dtype=torch.float32).eval()
        answers.append(
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=True)
        )
    assert torch.equal(*answers) and answers[0].shape[1] > 11


def test_a_reward_model_over_integers_has_a_float_head(made):
    folder, _, bits = made
    model = load_scalar_model(folder / "integers", dtype=torch.float32, seed=3)
    head = score_layer(model)
    assert model_bits(model) == bits and not isinstance(head, QuantizedLinear)
    assert head.weight.dtype == torch.float32 and head.weight.abs().sum() > 0


def test_lora_over_integers_exports_a_plain_checkpoint(made, tmp_path):
    folder, family, _ = made
    ids, mask = tokens(family)
    model = add_lora(load_causal_lm(folder / "integers", dtype=torch.float32, gradient_checkpointing=True), 4, 8)
    TokenLogProbs(model)(ids, mask).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    shake(model)
    save_model(model, tiny_tokenizer("llama"), Stops(), tmp_path / "merged", merged_state_dict(model))
    assert json.loads((tmp_path / "merged" / "config.json").read_text()).get("quantization_bit", 0) == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not quantized_layers(opened)
    with torch.no_grad():
        adapted, plain = TokenLogProbs(model.eval())(ids, mask), TokenLogProbs(opened)(ids, mask)
        base = TokenLogProbs(load_causal_lm(folder / "integers", dtype=torch.float32))(ids, mask)
    assert_close(adapted, plain, 1e-4)
    assert (adapted - base).abs().max() > 1e-2


def test_a_prefix_over_integers_learns_what_it_learns_over_floats(made):
    folder, family, bits = made
    ids, mask = tokens(family)
    gradients = []
    for kind, options in (("integers", {}), ("floats", {}), ("floats", {"quantization_bit": bits})):
        model = load_causal_lm(folder / kind, dtype=torch.float32, pre_seq_len=4, seed=1, **options).train()
        TokenLogProbs(model)(ids, mask).sum().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all("prefix_encoder" in name and p.dtype == torch.float32 for name, p in trained.items())
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values()]))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        assert_close(other, gradients[0], 1e-3)


def test_a_quantised_model_saved_whole_keeps_the_official_layout(made, tmp_path):
    folder, _, bits = made
    model = load_causal_lm(folder / "integers", dtype=torch.float32)
    save_model(model, tiny_tokenizer("llama"), Stops(), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_bit"] == bits
    with safe_open(tmp_path / "again" / "model.safetensors", framework="pt") as content:
        stored = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    for name, layer in quantized_layers(model).items():
        assert torch.equal(stored[f"{name}.weight"], layer.weight)
        assert torch.equal(stored[f"{name}.weight_scale"], layer.weight_scale)
        assert stored[f"{name}.weight_scale"].dtype == torch.float16
    opened = load_causal_lm(tmp_path / "again", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


def test_the_flag_quantises_as_the_release_did(made):
    """From the same floats: --quantization_bit and a release give the same integers. Fixed points of the scheme."""
    folder, _, bits = made
    model = load_causal_lm(folder / "floats", dtype=torch.float32, quantization_bit=bits)
    release = quantized_layers(load_causal_lm(folder / "integers", dtype=torch.float32))
    assert quantized_layers(model).keys() == release.keys()
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.weight, release[name].weight)
        assert torch.equal(layer.weight_scale, release[name].weight_scale)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_integers_without_scales(copied):
    folder, bits = copied
    for file in folder.glob("*.bin"):
        torch.save({name: t for name, t in torch.load(file).items() if not name.endswith("_scale")}, file)
    index = folder / "pytorch_model.bin.index.json"
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
        index.write_text(json.dumps({"weight_map": {n: f for n, f in files.items() if not n.endswith("_scale")}}))
    with pytest.raises(UserError, match=rf"quantization_bit {bits}, but .*weight_scale is not in .*12 scales.*[Cc]opy"):
        load_causal_lm(folder, dtype=torch.float32)


def test_integers_that_the_config_does_not_know_of(copied):
    set_config(copied[0], quantization_bit=0)
    with pytest.raises(UserError, match=r"integer weights .*no quantization_bit; copy"):
        _ = open_checkpoint(copied[0]).weights


@pytest.mark.parametrize("bits", [3, 16, "8", True])
def test_other_numbers_of_bits(copied, bits):
    set_config(copied[0], quantization_bit=bits)
    with pytest.raises(UserError, match="4 and 8 can be read"):
        load_causal_lm(copied[0], dtype=torch.float32)


def test_training_integers_needs_an_adapter(made):
    folder, _, bits = made
    check_quantized_base(folder / "integers", 0, adapters=True)
    check_quantized_base(folder / "integers", bits, adapters=True)
    check_quantized_base(folder / "floats", 0, adapters=False)
    with pytest.raises(UserError, match=rf"{bits}-bit integers, which cannot be trained.*--lora_dim or --pre_seq_len"):
        check_quantized_base(folder / "integers", 0, adapters=False)
    with pytest.raises(UserError, match=rf"--quantization_bit {12 - bits}: .*{bits}-bit integers already"):
        check_quantized_base(folder / "integers", 12 - bits, adapters=True)
