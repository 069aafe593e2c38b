"""Generation: right tokens, right probabilities, and an answer that depends on its prompt and its seed alone."""

from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from inference.engine import Generation, generate
from inference.few_rows import packed_weights
from inference.sampling import draw, invert, uniform_numbers
from models.heads import TokenLogProbs
from tests.tiny import FAMILIES, tiny_checkpoint

PAD = 3
STOP = 7


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """family -> model in evaluation mode, made when first asked for."""
    models = {}

    def load(family: str):
        if family not in models:
            folder = tiny_checkpoint(tmp_path_factory.mktemp(family), family, seed=1)
            models[family] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return models[family]

    return load


def prompts(vocab: int, lengths=(5, 2, 9, 1)) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of these lengths, padded on the left with a token that also occurs inside."""
    random = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids = torch.randint(8, vocab, (len(lengths), width), generator=random)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def answers(generation) -> list[list[int]]:
    """The tokens of each row, without padding."""
    return [row[:length].tolist() for row, length in zip(generation.sequences, generation.lengths, strict=True)]


class Markov(nn.Module):
    """A toy language model: the next token depends on the last one through a table of logits [vocab, vocab]."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.batches: list[int] = []  # how many rows each call had

    def forward(self, input_ids, attention_mask, past_key_values=None, use_cache=True, return_dict=True):
        self.batches.append(len(input_ids))
        cache = past_key_values or DynamicCache()
        state = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
        cache.update(state, state, 0)
        assert attention_mask.shape == (len(input_ids), cache.get_seq_length())
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=cache)


def chain(*tokens: int, vocab: int = 8) -> torch.Tensor:
    """A table that leads with certainty from each token to the following one."""
    table = torch.zeros(vocab, vocab)
    for now, then in pairwise(tokens):
        table[now, then] = 1000.0
    return table


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(checkpoints, family):
    model = checkpoints(family)
    ids, mask = prompts(model.config.vocab_size)

    def both(stop: int | None) -> tuple[list[list[int]], Generation]:
        settings = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=PAD, eos_token_id=stop)
        expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :]
        stops = [] if stop is None else [stop]
        found = generate(model, ids, mask, max_new_tokens=12, stop_token_ids=stops, pad_token_id=PAD, greedy=True)
        expected = expected[:, : found.sequences.shape[1]].tolist()
        assert found.sequences.tolist() == expected
        return expected, found

    expected, found = both(None)
    assert found.lengths.tolist() == [12] * 4 and not found.ended.any()
    stop = expected[0][5]  # a stop token, which rows meet at different times or never
    expected, found = both(stop)
    assert found.ended.tolist() == [stop in row for row in expected]


@pytest.mark.ppo
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_a_plain_forward(checkpoints, family):
    """The sampler's log-probabilities are those of one forward over the row without any padding, at the
    same temperature, and those of the training forward."""
    model = checkpoints(family)
    ids, mask = prompts(model.config.vocab_size)
    stops = list(range(8, 40))  # rows end at different times and leave the batch
    settings = {"max_new_tokens": 10, "stop_token_ids": stops, "pad_token_id": PAD, "temperature": 0.7}
    found = generate(model, ids, mask, row_seeds=[1, 2, 3, 4], **settings)
    assert len(set(found.lengths.tolist())) > 1
    for row, answer in enumerate(answers(found)):
        whole = torch.cat([ids[row][mask[row].bool()], torch.tensor(answer)])
        with torch.no_grad():
            logits = model(whole[None]).logits[0, -len(answer) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)[range(len(answer)), answer]
        torch.testing.assert_close(found.log_probs[row, : len(answer)], expected, atol=1e-4, rtol=0)
        assert not found.log_probs[row, len(answer) :].any()
    whole = torch.cat([ids, found.sequences], 1)
    real = torch.cat([mask, (torch.arange(found.sequences.shape[1]) < found.lengths[:, None]).long()], 1)
    with torch.no_grad():
        trained = TokenLogProbs(model)(whole, real, keep=found.sequences.shape[1], temperature=0.7)
    gap = (trained - found.log_probs)[real[:, ids.shape[1] :].bool()]
    assert gap.abs().max() < 1e-4


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.ppo
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_match_the_softmax(temperature):
    """Rollouts really sample. Chi-square over the first and the second token of 4,000 rows."""
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    count = 4000
    ids = torch.full((count, 1), 2)
    settings = {"max_new_tokens": 2, "stop_token_ids": [], "pad_token_id": 0, "temperature": temperature}
    found = generate(Markov(table), ids, torch.ones_like(ids), row_seeds=range(count), **settings)
    transition = (table / temperature).softmax(-1)
    for column, expected in ((0, transition[2]), (1, transition[2] @ transition)):
        counts = torch.bincount(found.sequences[:, column], minlength=6)
        statistic = ((counts - count * expected) ** 2 / (count * expected)).sum()
        assert statistic < 20.5  # chi-square with 5 degrees of freedom exceeds it once in a thousand
    assert not found.filtered


def test_a_seed_gives_the_same_numbers_however_many_are_asked_for():
    long, short = uniform_numbers([5, 6], 2, 100), uniform_numbers([6], 1, 7)
    assert torch.equal(long[1, :7], short[0])
    assert not torch.equal(long[0], long[1])
    assert long.min() >= 0.0 and long.max() < 1.0


def test_without_seeds_the_global_generator_decides():
    model = Markov(torch.zeros(8, 8))
    ids = torch.full((4, 1), 2)

    def sample() -> list[list[int]]:
        found = generate(model, ids, torch.ones_like(ids), max_new_tokens=20, stop_token_ids=[], pad_token_id=0)
        return found.sequences.tolist()

    torch.manual_seed(0)
    first, second = sample(), sample()
    torch.manual_seed(0)
    assert sample() == first != second
    assert len({tuple(row) for row in first}) == 4


def test_inverse_distribution_by_hand():
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for uniform, place in ((0.0, 1), (0.249, 1), (0.25, 3), (0.749, 3), (0.75, 4), (1.0 - 2.0**-24, 4)):
        assert invert(weights, torch.tensor([uniform])).item() == place


def test_the_largest_uniform_number_never_draws_what_has_no_weight():
    """The float32 total of many weights is rarely 1; uniform · total must not round up to it."""
    weights = torch.rand(500, 1000, generator=torch.Generator().manual_seed(0)) ** 4
    weights = weights / weights.sum(1, keepdim=True)
    weights[:, -1] = 0.0
    places = invert(weights, torch.full((500,), 1.0 - 2.0**-24))
    assert places.max() < 999
    assert weights.gather(1, places[:, None]).min() > 0


@pytest.mark.ppo
def test_top_k_and_top_p():
    """With top-p or top-k the sampled distribution is another one than the scored one, and that is reported."""
    probs = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05])
    uniform = (torch.arange(1000) + 0.5) / 1000

    two = [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]
    cases = [
        ({}, probs.tolist(), False),
        ({"top_k": 5}, probs.tolist(), False),
        ({"top_k": 2}, two, True),
        ({"top_p": 0.6}, two, True),  # 0.4 is too little, with 0.25 it is enough
        ({"top_p": 0.9}, [0.1 / 0.95, 0.4 / 0.95, 0.2 / 0.95, 0.25 / 0.95, 0.0], True),  # 0.85 is too little
        ({"top_p": 1e-6}, [0.0, 1.0, 0.0, 0.0, 0.0], True),
        ({"top_k": 3, "top_p": 0.5}, two, True),  # 0.4 of 0.85 is below one half
        ({"top_k": 3, "top_p": 0.4}, [0.0, 1.0, 0.0, 0.0, 0.0], True),
    ]
    for settings, expected, filtered in cases:
        tokens, reported = draw(probs.log().expand(1000, 5), uniform, **settings)
        assert (torch.bincount(tokens, minlength=5) / 1000).tolist() == pytest.approx(expected, abs=2e-3), settings
        assert bool(reported) is filtered, settings


@pytest.mark.detail(36)
def test_log_probs_are_of_the_whole_softmax_with_top_k(checkpoints):
    model = checkpoints("llama")
    ids, mask = prompts(model.config.vocab_size)
    settings = {"max_new_tokens": 6, "stop_token_ids": [], "pad_token_id": PAD}
    greedy = generate(model, ids, mask, greedy=True, **settings)
    top_1 = generate(model, ids, mask, top_k=1, row_seeds=[0, 1, 2, 3], **settings)
    assert torch.equal(greedy.sequences, top_1.sequences)
    assert torch.equal(greedy.log_probs, top_1.log_probs) and (top_1.log_probs < -1e-3).any()
    assert top_1.filtered and not greedy.filtered


# --- nothing but prompt and seed matters ------------------------------------------------------------------------------


@pytest.mark.detail(2)
@pytest.mark.ppo
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_its_batch_nor_on_padding(checkpoints, family):
    """Alone, in a batch in which others end earlier, and with extra padding, the answer is the same."""
    model = checkpoints(family)
    ids, mask = prompts(model.config.vocab_size, (5, 2, 9, 1, 4, 4))
    settings = {"max_new_tokens": 10, "stop_token_ids": list(range(8, 40)), "pad_token_id": PAD}
    together = generate(model, ids, mask, row_seeds=range(6), **settings)
    assert len(set(together.lengths.tolist())) > 1
    spare = torch.full((6, 5), PAD)
    padded = generate(
        model, torch.cat([spare, ids], 1), torch.cat([0 * spare, mask], 1), row_seeds=range(6), **settings
    )
    assert answers(padded) == answers(together)
    torch.testing.assert_close(padded.log_probs, together.log_probs, atol=1e-4, rtol=0)
    for row, answer in enumerate(answers(together)):
        assert set(together.sequences[row, len(answer) :].tolist()) <= {PAD}
        assert not together.log_probs[row, len(answer) :].any()
        alone = ids[row][mask[row].bool()][None]
        found = generate(model, alone, torch.ones_like(alone), row_seeds=[row], **settings)
        assert answers(found) == [answer]
        torch.testing.assert_close(found.log_probs[0], together.log_probs[row, : len(answer)], atol=1e-4, rtol=0)


@pytest.mark.ppo
def test_pad_may_be_the_stop_token(checkpoints):
    """Lengths and ended come from what was drawn, not from the pad id."""
    model = checkpoints("gpt2")
    ids, mask = prompts(model.config.vocab_size, (5, 2, 9, 1, 4, 4))
    settings = {"max_new_tokens": 10, "row_seeds": range(6)}
    stop = int(generate(model, ids, mask, stop_token_ids=[], pad_token_id=PAD, **settings).sequences[0, 2])
    settings["stop_token_ids"] = [stop]
    other = generate(model, ids, mask, pad_token_id=PAD, **settings)
    same = generate(model, ids.masked_fill(mask == 0, stop), mask, pad_token_id=stop, **settings)
    assert other.lengths[0] == 3 and other.ended[0]
    assert answers(same) == answers(other)
    assert torch.equal(same.lengths, other.lengths) and torch.equal(same.ended, other.ended)
    torch.testing.assert_close(same.log_probs, other.log_probs)


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.detail(20)
@pytest.mark.ppo
def test_ends_and_padding():
    """Row 0 stops at once, row 1 after three tokens, row 2 never."""
    model = Markov(chain(1, STOP) + chain(2, 4, 5, STOP) + chain(6, 6))
    ids = torch.tensor([[1], [2], [6]])
    settings = {"max_new_tokens": 5, "pad_token_id": 0, "row_seeds": [0, 1, 2]}
    found = generate(model, ids, torch.ones_like(ids), stop_token_ids=[STOP, 3], **settings)
    assert found.sequences.tolist() == [[STOP, 0, 0, 0, 0], [4, 5, STOP, 0, 0], [6, 6, 6, 6, 6]]
    assert found.lengths.tolist() == [1, 3, 5]
    assert found.ended.tolist() == [True, True, False]
    assert found.log_probs.tolist() == [[0.0] * 5] * 3  # each token was certain; zeros after the end
    assert found.sequences.dtype == torch.long and found.log_probs.dtype == torch.float32


@pytest.mark.detail(19)
@pytest.mark.ppo
@pytest.mark.parametrize("longest, ended", [(3, True), (2, False)])
def test_a_stop_token_in_the_last_place_is_an_end(longest, ended):
    """A response of maximal length that ends in the stop token has ended."""
    ids, model = torch.tensor([[2]]), Markov(chain(2, 4, 5, STOP))
    found = generate(model, ids, torch.ones_like(ids), max_new_tokens=longest, stop_token_ids=[STOP], pad_token_id=0)
    assert found.lengths.tolist() == [longest] and found.ended.tolist() == [ended]


def test_it_stops_when_all_rows_have_ended_and_finished_rows_leave():
    model = Markov(chain(1, STOP) + chain(2, 4, 5, STOP))
    ids = torch.tensor([[1], [1], [2], [1]])
    found = generate(model, ids, torch.ones_like(ids), max_new_tokens=50, stop_token_ids=[STOP], pad_token_id=0)
    assert model.batches == [4, 1, 1]
    assert found.sequences.tolist() == [[STOP, 0, 0], [STOP, 0, 0], [4, 5, STOP], [STOP, 0, 0]]


# --- the model is left as it was --------------------------------------------------------------------------------------


def test_modes_are_restored_and_results_can_be_trained_on(checkpoints):
    model = deepcopy(checkpoints("opt"))
    ids, mask = prompts(model.config.vocab_size)
    settings = {"max_new_tokens": 4, "stop_token_ids": [], "pad_token_id": PAD, "row_seeds": [1, 2, 3, 4]}
    expected = generate(model, ids, mask, **settings)
    model.train()
    frozen = model.get_input_embeddings().eval()
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    found = generate(model, ids, mask, **settings)
    assert model.training and not frozen.training
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.log_probs, expected.log_probs)
    log_probs = TokenLogProbs(model)(torch.cat([ids, found.sequences], 1), torch.ones(4, 13), keep=4)
    (log_probs - found.log_probs).square().sum().backward()  # would raise if they were inference tensors


@pytest.mark.parametrize("rows", [1, 2, 16, 64, 65])
def test_layers_of_few_rows_compute_the_same_and_leave_no_trace(rows):
    """A layer whose weight is small, one of many outputs, one of many inputs and one between."""
    layers = nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 4000), nn.Linear(4000, 300, bias=False), nn.Linear(300, 300))
    hidden = torch.randn(rows, 1, 16)
    for _ in range(2):  # the second time with other weights
        expected = layers.double()(hidden.double())
        layers.float()
        with torch.inference_mode(), packed_weights(layers):
            torch.testing.assert_close(layers(hidden).double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layers(hidden).double(), expected, atol=1e-5, rtol=1e-5)
        assert not any("forward" in vars(layer) for layer in layers)
        with torch.no_grad():
            layers[0].weight.mul_(2.0)


def test_weights_of_large_networks_and_of_adapters_are_not_laid_out_again(monkeypatch):
    for most, layer, packed in ((680, nn.Linear(16, 40), True), (679, nn.Linear(16, 40), False), (680, nn.Linear(40, 16), False)):
        monkeypatch.setattr("inference.few_rows.MOST_PACKED", most)
        with packed_weights(layer):
            assert ("forward" in vars(layer)) is packed


def test_two_may_lay_out_the_weights_of_one_network():
    """As two servers of one model; the first to end takes the layout along, and the other goes on without."""
    network = nn.Sequential(nn.Linear(16, 40), LlamaRMSNorm(40))
    first, second = packed_weights(network), packed_weights(network)
    for one in (first, second):
        one.__enter__()
    assert "forward" in vars(network[0]) and "scaled" in vars(network[1])
    for one in (first, second):
        one.__exit__(None, None, None)
        assert "forward" not in vars(network[0]) and "scaled" not in vars(network[1])


@pytest.mark.detail(47)
@pytest.mark.ppo
def test_the_generation_config_of_the_checkpoint_has_no_say(checkpoints):
    """A repetition penalty, top-k or stop token saved with the checkpoint would change what is sampled."""
    model = checkpoints("qwen2")
    ids, mask = prompts(model.config.vocab_size)
    settings = {"max_new_tokens": 6, "stop_token_ids": [], "pad_token_id": PAD, "row_seeds": [1, 2, 3, 4]}
    expected = generate(model, ids, mask, **settings).sequences
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, temperature=0.1, eos_token_id=int(expected[0, 0]), max_length=3
    )
    assert torch.equal(generate(model, ids, mask, **settings).sequences, expected)
    model.generation_config = before


def test_prompts_are_padded_on_the_left():
    ids, mask = torch.ones(2, 2, dtype=torch.long), torch.tensor([[1, 1], [1, 0]])
    with pytest.raises(ValueError, match="left"):
        generate(Markov(torch.zeros(8, 8)), ids, mask, max_new_tokens=1, stop_token_ids=[], pad_token_id=0)
