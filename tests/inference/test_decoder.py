"""The pass of decoder.py gives the logits, keys and values of transformers' own modules."""

import pytest
import torch

from inference import engine
from inference.decoder import FAMILIES
from inference.engine import Batch, Rules, read
from inference.few_rows import packed_weights
from models.adapters.lora import add_lora
from models.load import load_causal_lm
from tests.closeness import assert_close
from tests.tiny import tiny_checkpoint

RULES = Rules(8, (), 0)
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11]]


def passes(model, direct: bool, monkeypatch) -> list[torch.Tensor]:
    """Logits after the prompts and after each of three tokens, and all keys and values."""
    monkeypatch.setattr(engine, "runs", lambda network: direct and DECODES(network))
    with torch.no_grad():
        batch = Batch(model, RULES, PROMPTS, [0, 1, 2], [0, 1, 2])
        read(batch)
        seen = [batch.logits]
        for number in range(1, 4):
            batch.tokens = torch.tensor([3, 12, 20]) + number
            batch.go_on(torch.full((3,), number))
            read(batch)
            seen.append(batch.logits)
    assert batch.direct == direct
    own = batch.mask.bool()[:, None, :, None]
    return [*seen, *(part.masked_fill(~own, 0.0) for layer in batch.cache.layers for part in (layer.keys, layer.values))]


DECODES = engine.runs


@pytest.mark.parametrize("family", [*FAMILIES, "grouped", "lora", "norms behind", "in turn"])
def test_it_computes_what_the_modules_compute(tmp_path, monkeypatch, family):
    name, changes = {
        "grouped": ("llama", {"num_key_value_heads": 1}),
        "lora": ("qwen2", {}),
        "norms behind": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
        "in turn": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    }.get(family, (family, {}))
    model = load_causal_lm(tiny_checkpoint(tmp_path, name, seed=1, **changes), dtype=torch.float32)
    if family == "lora":
        model = add_lora(model, 4, 8.0)
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    expected, found = passes(model, False, monkeypatch), passes(model, True, monkeypatch)
    with packed_weights(model):
        packed = passes(model, True, monkeypatch)
    for mine, laid_out, modules in zip(found, packed, expected, strict=True):
        assert_close(mine, modules)
        assert_close(laid_out, modules)
    assert not any("scaled" in vars(module) or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["bloom", "glm4"])
def test_other_networks_run_as_they_are(tmp_path, family):
    model = load_causal_lm(tiny_checkpoint(tmp_path, family, seed=1), dtype=torch.float32)
    assert not engine.runs(model)


def test_a_hook_on_the_network_is_called(tmp_path):
    model = load_causal_lm(tiny_checkpoint(tmp_path, "llama", seed=1), dtype=torch.float32).eval()
    called = []
    model.register_forward_pre_hook(lambda *given: called.append(1))
    with torch.no_grad():
        read(Batch(model, RULES, PROMPTS, [0], [0]))
    assert called
