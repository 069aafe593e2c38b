"""Several answers a prompt, and more prompts than fit at once: always what generate() answers to one prompt alone."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

import inference.engine
from inference.cache import MOST_COLUMNS, RowsCache, RowsLayer
from inference.decoder import attend_once, stands_by_columns
from inference.engine import generate, generate_many
from models.load import load_causal_lm
from models.sizes import SPARE_COLUMNS
from tests.closeness import assert_close
from tests.models.test_chatglm import TINY, tiny
from tests.models.test_chatglm import prompts as chatglm_prompts
from tests.tiny import FAMILIES, tiny_checkpoint

PAD = 3
LENGTHS = (5, 2, 9, 1, 4, 4, 12, 7, 3)
STOPS = range(8, 60)
MODELS = [*FAMILIES, "sliding window", *TINY, *(f"{family}, prefix" for family in ("llama", "bloom", "gpt2", *TINY))]
pytestmark = pytest.mark.ppo


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """name -> model in evaluation mode, made when first asked for."""
    models = {}

    def build(name: str):
        family, prefix = name.removesuffix(", prefix"), name.endswith("prefix")
        if family in TINY:
            return tiny(family, pre_seq_len=4 if prefix else None)
        sliding = {"sliding_window": 6} if name == "sliding window" else {}
        folder = tmp_path_factory.mktemp("model")
        tiny_checkpoint(folder, "mistral" if sliding else family, seed=1, **sliding)
        if not prefix:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model = load_causal_lm(folder, dtype=torch.float32, pre_seq_len=5)
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        return model.eval()

    def get(name: str):
        if name not in models:
            models[name] = build(name)
        return models[name]

    return get


def questions(name: str) -> list[list[int]]:
    """Prompts of LENGTHS; ChatGLM's with the marks at their ends."""
    family = name.removesuffix(", prefix")
    if family in TINY:
        return chatglm_prompts(family, LENGTHS)
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(8, 400, (length,), generator=generator).tolist() for length in LENGTHS]


def one_by_one(model, prompts, seeds, **settings) -> list[tuple[list[int], list[float], bool]]:
    """Tokens, log-probabilities and end of the answer to each prompt alone."""
    found = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        ids = torch.tensor([prompt])
        made = generate(model, ids, torch.ones_like(ids), row_seeds=[seed], **settings)
        found.append((made.sequences[0].tolist(), made.log_probs[0].tolist(), bool(made.ended[0])))
    return found


def same(found, expected) -> None:
    """The rows of a Generation against one_by_one's."""
    for row, (tokens, log_probs, ended) in enumerate(expected):
        length = int(found.lengths[row])
        assert found.sequences[row, :length].tolist() == tokens, row
        assert found.log_probs[row, :length].tolist() == pytest.approx(log_probs, abs=1e-4)
        assert bool(found.ended[row]) is ended
        assert set(found.sequences[row, length:].tolist()) <= {PAD} and not found.log_probs[row, length:].any()


# --- several answers a prompt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_several_answers_equal_the_prompt_given_several_times(load, name):
    """Item 28: n answers, of which the network reads the prompt once; the answers of one prompt stand together."""
    model, prompts = load(name), questions(name)[:3]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    settings = {"max_new_tokens": 8, "stop_token_ids": STOPS, "pad_token_id": PAD, "row_seeds": range(9)}
    read = []
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = network.register_forward_pre_hook(
        lambda _, args, given: read.append(len(given["input_ids"])), with_kwargs=True
    )
    found = generate(model, ids, mask, num_return_sequences=3, **settings)
    hook.remove()
    assert read[0] == 3 and max(read) <= 9
    repeated = generate(model, ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), **settings)
    assert torch.equal(found.sequences, repeated.sequences) and torch.equal(found.ended, repeated.ended)
    assert torch.equal(found.lengths, repeated.lengths)
    torch.testing.assert_close(found.log_probs, repeated.log_probs, atol=1e-5, rtol=0)
    assert len({tuple(row) for row in found.sequences.tolist()}) > 3


# --- more prompts than fit at once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_a_queue_of_prompts_equals_each_alone(load, name, greedy):
    """Any batch, any order. Rows end at different times, so that prompts of other lengths take their places."""
    model, prompts = load(name), questions(name)
    settings = {"max_new_tokens": 10, "stop_token_ids": STOPS, "pad_token_id": PAD, "greedy": greedy}
    settings["temperature"] = 3.0  # some of these networks are so certain that no answer would end
    expected = one_by_one(model, prompts, range(9), **settings)
    assert len({len(tokens) for tokens, _, _ in expected}) > 2 or greedy
    for max_batch in (1, 2, 4, 100):
        same(generate_many(model, prompts, max_batch=max_batch, row_seeds=range(9), **settings), expected)
    order = random.Random(0).sample(range(9), 9)
    shuffled = generate_many(model, [prompts[place] for place in order], max_batch=3, row_seeds=order, **settings)
    same(shuffled, [expected[place] for place in order])
    several = generate_many(
        model, prompts[:3], max_batch=4, num_return_sequences=3, row_seeds=[0, 9, 8, 1, 9, 8, 2, 9, 8], **settings
    )
    for prompt in range(3):
        assert several.sequences[3 * prompt, : len(expected[prompt][0])].tolist() == expected[prompt][0]


def test_a_finished_row_gives_its_place_away(load, monkeypatch):
    """The same answers in fewer steps than batch after batch, and never more rows than allowed."""
    model = load("llama")
    prompts = [[8 + place, 100, 200] for place in range(9)]
    alone = {"max_new_tokens": 20, "pad_token_id": PAD, "stop_token_ids": STOPS}
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found, counts = [], []
    for share in (0.3, 2.0):  # 2: never
        monkeypatch.setattr(inference.engine, "REPLACE_SHARE", share)
        found.append(generate_many(model, prompts, max_batch=3, row_seeds=range(9), **alone))
        assert max(rows for rows, _ in shapes) == 3
        assert sum(rows for rows, width in shapes if width == 3) == 9  # each prompt is read once
        counts.append(sum(width == 1 for _, width in shapes))
        shapes.clear()
    hook.remove()
    same(found[0], one_by_one(model, prompts, range(9), **alone))
    assert torch.equal(found[0].sequences, found[1].sequences)
    lengths = found[0].lengths.tolist()
    assert counts[1] == sum(max(lengths[place : place + 3]) - 1 for place in (0, 3, 6))
    assert max(lengths) - 1 <= counts[0] < counts[1]


@pytest.mark.parametrize("by_columns", [False, True])
def test_a_row_leaves_nothing_to_the_one_that_takes_its_place(by_columns):
    """An infinity in the keys or values of a finished row does not reach its successor, nor does the column it stood in."""
    cache, other = RowsCache(1, by_columns), RowsCache(1, by_columns)
    for columns, one in ((4, cache), (3, other)):
        state = torch.arange(2.0 * columns).view(2, 1, columns, 1)
        one.update(state, -state, 0)
    cache.update(torch.full((2, 1, 1, 1), torch.inf), torch.full((2, 1, 1, 1), torch.nan), 0)
    other.rebuild(torch.tensor([0]))
    cache.replace(torch.tensor([1]), other)
    assert cache.layers[0].keys[1].flatten().tolist() == [0, 0, 0, 1, 2]
    assert cache.layers[0].values[1].flatten().tolist() == [0, 0, 0, -1, -2]
    cache.rebuild(torch.tensor([1, 1]), drop=2)
    assert cache.layers[0].keys.flatten().tolist() == [0, 1, 2] * 2 and cache.get_seq_length() == 3


@pytest.mark.parametrize("by_columns", [False, True])
def test_a_layer_grows_as_transformers_own(by_columns):
    """Column by column past its spare ones, and whole blocks: what DynamicLayer holds."""
    mine, theirs = RowsLayer(by_columns), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    for columns in (5, *[1] * (SPARE_COLUMNS + 3), 2 * SPARE_COLUMNS, 1):
        new = torch.randn(2, 3, columns, 4, generator=generator)
        found, expected = mine.update(new, 2 * new), theirs.update(new, 2 * new)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert stands_by_columns(found[0]) == (by_columns and found[0].shape[2] < 100)
    assert mine.get_seq_length() == theirs.get_seq_length()
    assert not stands_by_columns(mine.keys) and mine.keys.shape[2] > MOST_COLUMNS


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("groups", [1, 3])
def test_one_query_a_row_attends_as_in_torch(scale, groups):
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(11, 3, 2, 8, generator=generator).permute(1, 2, 0, 3) for _ in range(2))
    query, mask = torch.randn(3, 2 * groups, 1, 8, generator=generator), torch.zeros(3, 1, 1, 11)
    mask[0, ..., :4], mask[2, ..., :10] = -torch.inf, -torch.inf
    heads = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
    expected = scaled_dot_product_attention(query, *heads, mask, scale=scale)
    assert_close(attend_once(query, keys, values, mask, scale), expected.flatten(1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"prompts": [[5], []]}, "empty"),
        ({"prompts": []}, "no prompt"),
        ({"row_seeds": [1]}, "row_seeds"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"stop_strings": ["a"]}, "tokenizer"),
    ],
)
def test_calls_that_cannot_be_meant(load, changes, words):
    call = {"prompts": [[5], [6]], "max_batch": 2, "max_new_tokens": 2, "stop_token_ids": [], "pad_token_id": PAD}
    with pytest.raises(ValueError, match=words):
        generate_many(load("llama"), **(call | changes))
