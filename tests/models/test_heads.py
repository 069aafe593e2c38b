"""Log-probabilities and scores: equal to the plain form, the same wherever the padding is, for every family."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from models.heads import TokenLogProbs, TokenScores, at_last_token, chunk_log_probs
from models.load import load_scalar_model
from tests.closeness import assert_close
from tests.models.common import load, tokens
from tests.tiny import FAMILIES, tiny_checkpoint

# embeddings narrower than the hidden states, layer norm after attention
OPT_350M = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}


@pytest.fixture(scope="module", params=[*FAMILIES, "chatglm-6b", "chatglm2-6b", "opt-350m"])
def checkpoint(request, folder_of, tmp_path_factory):
    if request.param == "opt-350m":
        return tiny_checkpoint(tmp_path_factory.mktemp("opt-350m"), "opt", **OPT_350M)
    return folder_of(request.param)


@pytest.fixture
def gpt2(folder_of):
    return folder_of("gpt2")


def plain_log_probs(model, ids, temperature=1.0):
    """The textbook form, one row and one position at a time, from transformers' own forward without padding."""
    rows = []
    for row in ids:
        logits = model(row[None], use_cache=False).logits[0].double() / temperature
        rows.append(torch.stack([logits[t - 1].log_softmax(-1)[row[t]] for t in range(1, len(row))]))
    return torch.stack(rows).float()


def test_blocks_of_logits_change_nothing(monkeypatch):
    hidden, weight = torch.randn(7, 8), torch.randn(50, 8)
    targets = torch.randint(0, 50, (7,))
    (whole,) = chunk_log_probs(hidden, targets, weight, None)
    monkeypatch.setattr("models.heads.CPU_BLOCK", 100)
    (blocks,) = chunk_log_probs(hidden, targets, weight, None)
    assert torch.equal(blocks, whole)


@pytest.mark.detail(37)
@pytest.mark.ppo
def test_log_probs_and_gradients_equal_the_plain_form(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    ids, mask = tokens(3, 9, folder=checkpoint)
    weights = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    plain = plain_log_probs(model, ids)
    (plain * weights).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}

    ours = load(checkpoint)
    vocab = ours.get_output_embeddings().weight.shape[0]
    for chunk in (vocab * 5, vocab * 1000):  # five chunks, one chunk
        ours.zero_grad()
        log_probs = TokenLogProbs(ours, chunk_logits=chunk)(ids, mask)
        assert log_probs.dtype == torch.float32
        assert_close(log_probs, plain)
        (log_probs * weights).sum().backward()
        for name, parameter in ours.named_parameters():
            assert_close(parameter.grad, expected[name], 1e-4)


@pytest.mark.detail(2)
@pytest.mark.ppo
def test_rows_of_a_padded_batch_equal_rows_alone(checkpoint):
    """Rows of different lengths, padded on either side or on both, with a token that also occurs in texts."""
    log_probs, network = TokenLogProbs(load(checkpoint)), load(checkpoint, load_scalar_model)
    scores = TokenScores(network)
    ids, mask = tokens(3, 9, folder=checkpoint)
    rows = [ids[row : row + 1, :length] for row, length in enumerate((9, 5, 6))]
    with torch.no_grad():
        alone = [(log_probs(row, torch.ones_like(row))[0], scores(row, torch.ones_like(row))[0]) for row in rows]
        for left in (0, 3, 12):
            spare = [(min(left, 12 - row.shape[1]), max(0, 12 - row.shape[1] - left)) for row in rows]
            padded, mask = (
                torch.cat([F.pad(row, pads, value=value) for row, pads in zip(batch, spare, strict=True)])
                for batch, value in ((rows, 11), ([torch.ones_like(row) for row in rows], 0))
            )
            found, found_scores = log_probs(padded, mask), scores(padded, mask)
            for row, (expected, expected_scores) in enumerate(alone):
                real = slice(spare[row][0], 12 - spare[row][1])
                assert_close(found[row, real.start : real.stop - 1], expected)
                assert_close(found_scores[row, real], expected_scores)
                assert_close(at_last_token(found_scores, mask)[row], expected_scores[-1])
        assert torch.equal(log_probs.eval()(padded, mask), found)  # training is without dropout
    assert {name.removeprefix("model.") for name in scores.state_dict()} == set(network.state_dict())  # each weight once


def test_scores_equal_transformers_own(checkpoint):
    scalar = load(checkpoint, load_scalar_model, attn="eager").eval()
    ids, mask = tokens(1, 9, folder=checkpoint)
    scalar.config.pad_token_id = None  # transformers then reads the last token, of one row only
    with torch.no_grad():
        expected = scalar(ids, attention_mask=mask).logits
        found = at_last_token(TokenScores(scalar)(ids, mask), mask)
    assert_close(found[:, None], expected)


def test_target_mask_gives_the_same_numbers_and_zeros(checkpoint):
    model = TokenLogProbs(load(checkpoint))
    ids, mask = tokens(3, 9, folder=checkpoint)
    targets = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.4
    full = model(ids, mask)
    found = model(ids, mask, target_mask=targets)
    assert_close(found, full.where(targets[:, 1:], 0.0))
    torch.testing.assert_close(model(ids, mask, target_mask=targets[:, 1:]), found)  # without its useless first column
    found.sum().backward()
    masked = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids, mask).where(targets[:, 1:], 0.0).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(masked[name], parameter.grad, 1e-4)
    # A filler micro-batch: every process must run the same backward, also the one that has nothing to learn.
    model.zero_grad()
    model(ids, mask, target_mask=torch.zeros_like(ids, dtype=torch.bool)).sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_scores_that_are_asked_for_are_those_of_all(checkpoint):
    model = TokenScores(load_scalar_model(checkpoint, dtype=torch.float32, seed=1))
    ids, mask = tokens(3, 9, folder=checkpoint)
    mask[1, 7:] = 0
    read = mask.bool() & (torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.4)
    found = []
    for some in (read, None):
        model.zero_grad()
        scores = model(ids, mask, read=some).where(read, 0.0)
        scores.sum().backward()
        found.append([scores, *(p.grad for p in model.parameters() if p.grad is not None)])
    for own, other in zip(*found, strict=True):
        assert_close(own, other)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_the_last_mlp_computes_what_is_read(folder_of, family):
    model, counts = load(folder_of(family)), []
    last = model.transformer.h[-1].mlp if family == "gpt2" else model.model.decoder.layers[-1].fc2
    last.register_forward_hook(lambda module, given, output: counts.append(output.shape[:-1].numel()))
    ids, mask = tokens(3, 9)
    targets = torch.zeros_like(mask)
    targets[:, 6:] = 1
    TokenLogProbs(model)(ids, mask, target_mask=targets)
    TokenLogProbs(model)(ids, mask)
    assert counts == [9, 27]


def test_keep_temperature_and_entropy(gpt2):
    model = load(gpt2)
    ids, mask = tokens(3, 9)
    with torch.no_grad():
        log_probs, entropy = TokenLogProbs(model, 408 * 2)(ids, mask, keep=3, temperature=0.7, with_entropy=True)
        assert_close(log_probs, plain_log_probs(model, ids, 0.7)[:, -3:])
        p = (model(ids).logits[:, -4:-1] / 0.7).softmax(-1)
    assert_close(entropy, -(p * p.log()).sum(-1))
    with pytest.raises(ValueError, match="keep=9"):
        TokenLogProbs(model)(ids, mask, keep=9)


@pytest.mark.detail(1)
@pytest.mark.ppo
def test_logits_that_encode_the_position():
    """Layout by hand: position t of the model wants token t + 1 and no other."""
    hidden = torch.eye(5) * 50
    log_probs, entropy = chunk_log_probs(hidden, torch.tensor([0, 1, 2, 3, 0]), torch.eye(5), None, with_entropy=True)
    assert log_probs.tolist() == pytest.approx([0, 0, 0, 0, -50], abs=1e-4)
    assert entropy.tolist() == pytest.approx([0] * 5, abs=1e-4)


def test_logits_are_never_whole(gpt2):
    """No tensor as large as [batch, time, vocab], nor half of it, is made or kept for the backward."""
    model = TokenLogProbs(load(gpt2), chunk_logits=408 * 4)
    ids, mask = tokens(8, 41)
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == 408:
                sizes.append(out.numel())
            return out

    saved = []
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        loss = model(ids, mask).sum()
        forward_sizes = max(sizes)
        loss.backward()
    assert forward_sizes <= 408 * 4 and max(sizes) <= 408 * 4
    assert not any(len(shape) == 2 and shape[-1] == 408 and shape[0] != 32 for shape in saved)


def test_pad_equal_to_eos_still_teaches_the_end_token(tmp_path):
    """nn.Embedding(padding_idx=eos) would give the end token no gradient; LLaMA reads it from the config."""
    folder = tiny_checkpoint(tmp_path, "llama", pad_token_id=2, eos_token_id=2)
    model = TokenLogProbs(load(folder))
    ids, mask = tokens(3, 9)
    ids[:, 4] = 2
    model(ids, mask).sum().backward()
    assert model.model.get_input_embeddings().weight.grad[2].abs().sum() > 0


@pytest.mark.detail(32, 37)
@pytest.mark.ppo
def test_sixteen_bit_models_give_float32(gpt2):
    ids, mask = tokens(3, 9)
    exact = TokenLogProbs(load(gpt2))(ids, mask)
    rounded = TokenLogProbs(load(gpt2, dtype=torch.bfloat16))(ids, mask)
    scores = TokenScores(load(gpt2, load_scalar_model, dtype=torch.bfloat16))(ids, mask)
    assert rounded.dtype == scores.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.15


def test_packing_and_gradient_checkpointing_change_no_gradient(checkpoint, monkeypatch):
    ids, mask = tokens(3, 9, folder=checkpoint)
    mask[1, 5:] = mask[2, 3:] = 0
    gradients = []
    for share, on in ((0.0, False), (0.9, False), (0.9, True)):
        monkeypatch.setattr("models.packed_rows.MOST_REAL", share)
        model = TokenLogProbs(load(checkpoint, gradient_checkpointing=on))
        model(ids, mask, target_mask=mask).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, *others in zip(*gradients, strict=True):
        for other in others:
            assert_close(other, plain)


def test_networks_compute_on_no_padding(gpt2):
    model, shapes = load(gpt2), []
    model.base_model.ln_f.register_forward_hook(lambda module, given, output: shapes.append(tuple(output.shape[:2])))
    ids, mask = tokens(3, 9)
    TokenLogProbs(model)(ids, mask)
    mask[1, 5:] = mask[2, 3:] = 0
    TokenLogProbs(model)(ids, mask)
    assert shapes == [(3, 9), (1, 17)]


@pytest.mark.detail(21)
@pytest.mark.ppo
def test_last_token_by_mask_not_by_id():
    scores = torch.arange(12.0).view(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert at_last_token(scores, mask).tolist() == [1.0, 7.0, 11.0]


@pytest.mark.detail(21)
@pytest.mark.ppo
def test_text_after_the_end_cannot_change_the_score(gpt2):
    model = TokenScores(load(gpt2, load_scalar_model))
    ids, mask = tokens(3, 9)
    mask[:, 6:] = 0
    changed = ids.clone()
    changed[:, 6:] = 300
    with torch.no_grad():
        torch.testing.assert_close(
            at_last_token(model(ids, mask), mask), at_last_token(model(changed, mask), mask)
        )


@pytest.mark.detail(44)
@pytest.mark.ppo
def test_one_forward_for_pairs_equals_two(gpt2):
    model = TokenScores(load(gpt2, load_scalar_model))
    ids, mask = tokens(4, 9)
    with torch.no_grad():
        both = at_last_token(model(ids, mask), mask)
        halves = [at_last_token(model(i, m), m) for i, m in zip(ids.chunk(2), mask.chunk(2), strict=True)]
    assert_close(both, torch.cat(halves))
