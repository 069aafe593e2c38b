"""--generation_weights: gathered where they fit, layer by layer where they do not, the same rollout either way."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from inference.cache import RowsCache
from models.load import load_causal_lm
from models.tokenizer import load_tokenizer
from tests.tiny import FAMILIES, tiny_checkpoint
from tests.training.step3_ppo.small_ppo import build, rollout
from training.utils.engine import weights
from training.utils.engine.build import read_in_turn
from training.utils.engine.extras import extras
from training.utils.engine.weights import cache_bytes, choice

pytestmark = pytest.mark.ppo


def test_a_rollout_is_the_same_with_split_weights(models, tmp_path):
    """Tokens, log-probabilities and, after an update each, the next rollout's."""
    found = []
    for kind in ("gathered", "layerwise"):
        flags = ["--actor_zero_stage", "3", "--generation_weights", kind]
        trainer = build(models, tmp_path / kind, *flags)
        first = rollout(trainer, 1)
        metrics = trainer.train_rlhf(first, 1)
        found.append((first, metrics, rollout(trainer, 2)))
        assert extras(trainer.engine.actor).generation_weights == kind
    for one, other in ((found[0][0], found[1][0]), (found[0][2], found[1][2])):
        assert torch.equal(one.input_ids, other.input_ids)
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-6, rtol=0)
    assert found[0][1]["actor_loss"] == pytest.approx(found[1][1]["actor_loss"], abs=1e-6)
    assert not torch.equal(found[0][0].log_probs[:, 0], found[0][2].log_probs[:, 0])


def test_the_choice_is_asked_about_the_largest_rectangle_of_the_run(models, tmp_path, monkeypatch):
    """The first prompts may be few and short (an evaluation before the first rollout); the choice holds for all."""
    asked = []

    @contextmanager
    def look(engine, args, run, *, rows, columns):
        asked.append((rows, columns))
        yield getattr(engine, "module", engine)

    trainer = build(models, tmp_path, "--num_return_sequences", "2", "--advantage", "rloo")
    monkeypatch.setattr("training.step3_ppo.rollout.generation_model", look)
    rollout(trainer, 1)
    args = trainer.args
    assert asked == [(2 * args.per_device_generation_batch_size, args.max_prompt_seq_len + args.max_answer_seq_len)]


def stand_in(config):
    """As much of an engine as the choice asks: 1000 float32 weights."""
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.ds_numel = 1000
    model = SimpleNamespace(config=config)
    engine = torch.nn.Module()
    engine.module = SimpleNamespace(model=model, parameters=lambda: [weight])
    return engine


@pytest.mark.parametrize(
    ("free", "asked", "others", "expected"),
    [
        (10_000, "auto", 0.0, "gathered"),
        (8_000, "auto", 0.0, "layerwise"),  # 4000 of weights + 4096 of cache
        (8_000, "gathered", 0.0, "gathered"),
        (10_000, "layerwise", 0.0, "layerwise"),
        (10_000, "auto", 1.0, "layerwise"),  # another process has no room
        (None, "auto", 0.0, "gathered"),
    ],
)
def test_what_auto_takes_and_what_it_says(free, asked, others, expected, tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path, "llama")  # a token's keys and values: 2 layers x 2 x 2 heads x 8 x 4 bytes = 256
    engine = stand_in(AutoConfig.from_pretrained(tmp_path))
    run = SimpleNamespace(dtype=torch.float32, maximum=lambda value: max(value, others))
    monkeypatch.setattr(weights, "free_memory", lambda: free)
    said = []
    monkeypatch.setattr(logging.getLogger("sanbu"), "info", lambda text, *values: said.append(text % values))
    args = SimpleNamespace(generation_weights=asked)
    assert choice(engine, args, run, rows=2, columns=8) == expected
    assert choice(engine, args, run, rows=99, columns=99) == expected  # once a run
    assert len(said) == 1 and "0.00 GB" in said[0] and ("slow" in said[0]) is (expected == "layerwise")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mistral",)])
def test_cache_bytes_are_those_of_the_cache(family, tmp_path):
    """Counted on a cache that a network filled."""
    model = load_causal_lm(tiny_checkpoint(tmp_path, family), dtype=torch.float32)
    ids = torch.arange(10, 17).view(1, 7).repeat(3, 1)
    cache = RowsCache()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    found = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    assert found == 3 * 7 * cache_bytes(model.config, torch.float32)


def test_stop_strings_end_an_answer_in_a_rollout(models, tmp_path):
    """The text that an answer would go on with ends it instead, and counts as an end."""
    plain = rollout(build(models, tmp_path / "plain"), 1)
    tokenizer = load_tokenizer(models[0])
    mask = plain.action_mask.bool()
    row = int(mask.sum(1).argmax())
    answer = plain.input_ids[row, -mask.shape[1] :][mask[row]]
    word = next(tokenizer.decode([token]) for token in answer[1:].tolist() if tokenizer.decode([token]).strip())
    found = rollout(build(models, tmp_path / "stopped", "--stop_strings", word), 1)
    length = int(found.action_mask[row].sum())
    assert length < len(answer) and found.ended[row]
    assert word in tokenizer.decode(found.input_ids[row, -found.action_mask.shape[1] :][:length])


def test_offloaded_models_are_in_memory_only_while_they_compute(models, tmp_path):
    """The same rollout; between its parts no process holds more of reference and reward model than their small weights."""
    plain, offloaded = (
        build(models, tmp_path / str(len(flags)), *flags) for flags in ((), ("--offload_reference_model", "--offload_reward_model"))
    )
    fetched = []
    frozen = offloaded.engine.ref, offloaded.engine.reward
    for model in frozen:
        embedding = next(module for module in model.module.modules() if isinstance(module, torch.nn.Embedding))
        embedding.register_forward_hook(lambda *_: fetched.append(held(frozen)))
    first, second = (rollout(trainer, 1) for trainer in (plain, offloaded))
    assert torch.equal(first.input_ids, second.input_ids)
    for name in ("ref_log_probs", "scores"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), atol=1e-5, rtol=0)
    for number in (1, 2):
        assert held(frozen) == 0 < len(fetched)
        offloaded.train_rlhf(second, number)


def held(models) -> int:
    """Elements of large weights (DeepSpeed keeps those up to 10,000 at hand) outside their place on the host."""
    parameters = [parameter for model in models for parameter in model.module.parameters()]
    assert all(parameter.ds_tensor.device.type == "cpu" for parameter in parameters)
    return sum(parameter.numel() for parameter in parameters if parameter.ds_numel > 10_000)


def test_a_card_takes_over_what_was_copied_for_it(models):
    """In its turn; what is mapped, or split while it is read, is not waited for."""
    calls = []

    class Turns:
        def __init__(self, device):
            self.device = torch.device(device)

        @contextmanager
        def in_turn(self, needed):
            calls.append(needed)
            yield

    settings = {"dtype": torch.bfloat16, "quantization_bit": 0, "zero3_config": None}
    whole = settings | {"dtype": torch.float32}
    cases = [("meta", settings, True), ("meta", whole, False), ("meta", whole | {"quantization_bit": 8}, True)]
    cases += [("meta", settings | {"zero3_config": {"a": 1}}, False), ("cpu", settings, False)]
    for device, how, copies in cases:
        model = read_in_turn(lambda path, **_: torch.nn.Linear(2, 2), models[0], Turns(device), how)
        assert model.weight.is_meta == copies == calls.pop()
