"""Counts of networks: published sizes, adapters of some blocks, integers by hand."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from errors import UserError
from models.adapters.lora import add_lora, linear_layers
from models.families import linear_names
from scripts.plan.known import config_of, find_config, known_models
from training.utils.memory.footprint import Footprint

# By hand: 12 h^2 + 13 h a block; 50272 tokens, 2048 + 2 positions, one norm.
OPT_66B = 64 * (12 * 9216**2 + 13 * 9216) + (50272 + 2050 + 2) * 9216
# Parameters as published, or as the checkpoint's index counts them.
PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-66b": OPT_66B,
    "bloom-1b1": 1_065_314_304,
    "llama-2-7b": 6_738_415_616,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "opt-2.7b": 2_651_596_800,
    "opt-30b": 29_974_540_288,
    "bloom-560m": 559_214_592,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "glm-4-9b": 9_399_951_360,
    "glm-4-9b-0414": 9_400_279_040,
    "chatglm-6b": 6_173_286_400,
    "chatglm2-6b": 6_243_584_000,
    "chatglm3-6b": 6_243_584_000,
}


def test_known_models_have_the_published_number_of_parameters_and_the_listed_layers():
    assert known_models().keys() == PUBLISHED.keys()
    for name, count in PUBLISHED.items():
        network, config = Footprint(config_of(name), dtype=torch.float16), find_config(name)
        assert (network.weights.trained, network.weights.frozen) == (count, 0), name
        blocks = "n_layer" if "n_layer" in config else "num_layers" if "num_layers" in config else "num_hidden_layers"
        assert sorted(linear_layers(network.model(2).model)) == sorted(linear_names(config | {blocks: 2})), name


@pytest.mark.parametrize("flags", [{}, {"lora_dim": 8, "gradient_checkpointing": True}])
def test_a_larger_batch_follows_from_two_small_ones(flags):
    """Without logits the peak grows with the rows; the plan measures no batch of hundreds."""
    config = AutoConfig.for_model(
        "llama", vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4
    )
    network = Footprint(config, dtype=torch.bfloat16, scalar=True, **flags)
    measured = network._passes(2, 100, 32, None, True, True)
    assert network._moments(2, 100, 32, None) == pytest.approx(measured, rel=1e-3)


def test_known_models_are_the_networks_of_the_published_configs(shared_dir):
    for name in ("chatglm-6b", "chatglm2-6b", "chatglm3-6b"):
        config = config_of(str(shared_dir / "golden" / name / "official" / "config.json"))
        official = Footprint(config, dtype=torch.float16, scalar=True, lora_dim=8).weights
        assert official == Footprint(config_of(name), dtype=torch.float16, scalar=True, lora_dim=8).weights


@pytest.mark.parametrize("names", ["layers.18.,layers.29.", "q_proj,v_proj", "layers.29.mlp,layers.18.self_attn.q_proj", "layers."])
def test_adapters_of_some_blocks_are_counted_as_in_the_whole_network(names):
    """The plan's networks have one and two blocks, and none of them the number 18."""
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=30, num_attention_heads=2
    )
    with torch.device("meta"):
        whole = add_lora(AutoModelForCausalLM.from_config(config), dim=4, alpha=1.0, module_name=names)
    trained = sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)
    found = Footprint(config, dtype=torch.float32, lora_dim=4, lora_module_name=names)
    frozen = sum(parameter.numel() for parameter in whole.parameters()) - trained
    several_kinds = names.startswith("layers.29.mlp")  # then both blocks count with the layers of either
    assert found.weights.frozen == frozen
    assert found.weights.trained > trained if several_kinds else found.weights.trained == trained
    if "18" in names:  # what lies below the first adapter keeps nothing for a backward pass
        everywhere = Footprint(config, dtype=torch.float32, lora_dim=4, lora_module_name="layers.")
        assert found.training(2, 8).activations < 0.6 * everywhere.training(2, 8).activations
    wrong = Footprint(config, dtype=torch.float32, lora_dim=4, lora_module_name="layers.30.")
    with pytest.raises(UserError, match=r"--lora_module_name layers\.30\. matches no linear layer"):
        wrong.model(1)


def test_adapters_and_integers_are_counted_by_hand():
    network = Footprint(config_of("chatglm-6b"), dtype=torch.float16, lora_dim=8, quantization_bit=4)
    layers, width, inner = 28, 4096, 16384
    assert network.weights.trained == layers * 8 * (width + 3 * width)  # query_key_value alone
    rows = {3 * width: width, width: width + inner, inner: width}  # outputs -> inputs: qkv, dense and down, up
    assert network.weights.integers == layers * (
        sum(out * inputs // 2 for out, inputs in rows.items()) + 2 * (3 * width + 2 * width + inner)
    )
    assert network.cache(1, 1) == 2 * layers * width * 2
