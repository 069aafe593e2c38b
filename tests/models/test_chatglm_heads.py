"""ChatGLM where the three steps use it: log-probabilities, scores, rollouts, LoRA, a prefix."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from inference.engine import generate
from models.adapters.lora import add_lora, merged_state_dict
from models.heads import TokenLogProbs, TokenScores, at_last_token
from models.load import load_causal_lm, load_tokenizer
from models.save import save_model
from models.templates import load_template
from tests.closeness import assert_close
from tests.models.common import shake, trained
from tests.models.test_chatglm import TINY, padded, prompts, tiny


def scalar(family, **changes):
    """A random reward model, in evaluation mode."""
    config = tiny(family, **changes).config
    torch.manual_seed(1)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 and "prefix" not in name else 1.0)
        if family == "chatglm2-6b":
            model.classifier_head.bias.fill_(0.7)
    return model


@pytest.mark.parametrize("prefix", [None, 4])
@pytest.mark.parametrize("family", TINY)
def test_log_probabilities_against_the_plain_forward(family, prefix):
    """Padded on either side, a row alone gives the same; the plain way is log_softmax of the network's logits."""
    model = tiny(family, pre_seq_len=prefix)
    rows = prompts(family, [3, 7], answer=5)
    expected = []
    for row in rows:
        logits = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected.append(torch.stack([logits[place - 1, row[place]] for place in range(1, len(row))]))
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        found = TokenLogProbs(model)(ids, mask)
        for row, log_probs in enumerate(expected):
            real = mask[row, 1:].bool() & mask[row, :-1].bool()
            assert_close(found[row][real], log_probs)


@pytest.mark.parametrize("prefix", [None, 4])
@pytest.mark.parametrize("family", TINY)
def test_scores_at_every_position_and_at_the_last(family, prefix):
    model = scalar(family, pre_seq_len=prefix)
    rows = prompts(family, [3, 7], answer=5)
    pooled = [model(torch.tensor([row])).logits.item() for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        scores = TokenScores(model)(ids, mask)
        assert scores.shape == ids.shape
        assert at_last_token(scores, mask).tolist() == pytest.approx(pooled, rel=1e-4, abs=5e-5)
        assert model(ids, mask).logits.squeeze(-1).tolist() == pytest.approx(pooled, rel=1e-4, abs=5e-5)


@pytest.mark.detail(9)
@pytest.mark.parametrize("prefix", [None, 4])
@pytest.mark.parametrize("family", TINY)
@pytest.mark.ppo
def test_rollouts_equal_transformers_generate_and_the_training_forward(family, prefix):
    """Greedy tokens are generate's; sampled ones have the log-probabilities that TokenLogProbs gives them. Rows that end
    early leave the batch on the way.
    """
    model = tiny(family, pre_seq_len=prefix)
    rows = prompts(family, [3, 9, 6, 4])
    ids, mask = padded(rows, "left")
    plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    stop = int(plain[0, ids.shape[1] + 2])  # the first row ends after three tokens at most
    found = generate(model, ids, mask, max_new_tokens=8, stop_token_ids=[stop], pad_token_id=3, greedy=True)
    for row in range(4):
        expected = plain[row, ids.shape[1] :].tolist()
        expected = expected[: expected.index(stop) + 1] if stop in expected else expected
        assert found.sequences[row, : int(found.lengths[row])].tolist() == expected

    found = generate(model, ids, mask, max_new_tokens=8, stop_token_ids=[stop], pad_token_id=3, row_seeds=range(4))
    width = found.sequences.shape[1]
    behind = (torch.arange(width) < found.lengths[:, None]).long()
    whole, whole_mask = torch.cat([ids, found.sequences], 1), torch.cat([mask, behind], 1)
    expected = TokenLogProbs(model)(whole, whole_mask, keep=width)
    assert_close(found.log_probs, expected.where(behind.bool(), 0.0))


@pytest.mark.parametrize("build", [tiny, scalar])
@pytest.mark.parametrize("family", TINY)
def test_lora(family, build):
    """Adapters on query_key_value alone; nothing changes at the start; merged, the plain network gives the same."""
    model = build(family)
    ids = torch.tensor(prompts(family, [5], answer=4))
    head = TokenScores if build is scalar else TokenLogProbs
    mask = torch.ones_like(ids)
    before = head(model)(ids, mask)
    adapted = add_lora(model, dim=2, alpha=4.0).eval()
    lora = {name for name in trained(adapted) if "query_key_value.lora" in name}
    heads = trained(adapted).keys() - lora
    assert len(lora) == 2 * 3 and bool(heads) == (build is scalar)
    assert all("score" in name or "classifier_head" in name for name in heads)
    assert_close(head(adapted)(ids, mask), before)
    shake(adapted, size=0.3)
    after = head(adapted)(ids, mask)
    assert not torch.allclose(after, before, atol=1e-2)
    again = build(family)
    again.load_state_dict(merged_state_dict(adapted))
    assert_close(head(again)(ids, mask), after)


@pytest.mark.parametrize("family", ["chatglm-6b", "chatglm2-6b"])
def test_saved_again_nothing_of_the_checkpoint_is_lost(family, chatglm_of, tmp_path):
    """config.json keeps its fields (the dropouts that training sets aside), and whoever may read one file may read all."""
    folder = chatglm_of(family)
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder, dtype=torch.float32)
    save_model(model, tokenizer, load_template(folder, tokenizer), tmp_path / "saved")
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "saved"))
    told = {"_name_or_path", "transformers_version", "architectures", "torch_dtype"}
    assert {name: value for name, value in before.items() if after.get(name) != value}.keys() <= told
    assert len({file.stat().st_mode for file in (tmp_path / "saved").iterdir()}) == 1
