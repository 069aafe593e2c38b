"""Both answers to a prompt in one row: scores, log-probabilities and gradients are those of two rows."""

import pytest
import torch

from models.heads import TokenLogProbs, TokenScores
from models.load import load_scalar_model
from models.shared_prompts import can_share_prompts
from tests.closeness import assert_close
from tests.models.common import load
from tests.tiny import FAMILIES
from training.utils.data.batching import collate_answer_pairs, collate_pairs, pair_widths

TEXT = torch.randint(20, 300, (60,), generator=torch.Generator().manual_seed(3)).tolist()
PAIRS = [  # prompt length, chosen, rejected: answers of other lengths, one that starts as the other does, no prompt
    (5, TEXT[:9], [*TEXT[:5], *TEXT[20:28]]),
    (3, TEXT[30:37], [*TEXT[30:35], TEXT[50]]),
    (0, TEXT[40:43], TEXT[50:51]),
]
ROWS = [
    {"prompt_length": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "margin": None}
    for prompt, chosen, rejected in PAIRS
]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [one for one in (*FAMILIES, "chatglm2-6b") if one != "bloom"])
def test_one_row_equals_two(folder_of, family, attention):
    folder = folder_of(family)
    assert can_share_prompts(folder, attention)
    scorer = TokenScores(load(folder, load_scalar_model, attn=attention))
    log_probs = TokenLogProbs(load(folder, attn=attention))
    for model, collate in ((scorer, collate_pairs), (log_probs, collate_answer_pairs)):
        batch = collate(ROWS, pad_id=7, share=True)
        assert batch.shared.input_ids.shape == (3, 5 + 4 + 8)
        weights = (
            torch.randn(6, batch.input_ids.shape[1], generator=torch.Generator().manual_seed(1)) * batch.attention_mask
        )
        options = {"target_mask": batch.answer_mask} if model is log_probs else {}
        results = []
        for shared in (None, batch.shared):
            values = model(batch.input_ids, batch.attention_mask, shared=shared, **options)
            values = values * weights[:, -values.shape[1] :]
            values.sum().backward()
            results.append((values.detach(), gradients(model)))
        assert_close(results[1][0], results[0][0])
        assert results[0][1].keys() == results[1][1].keys()
        for name, gradient in results[0][1].items():
            assert_close(results[1][1][name], gradient, 1e-4)


@pytest.mark.parametrize("family", ["bloom", "chatglm-6b"])
def test_networks_that_need_two_rows(folder_of, family):
    assert not can_share_prompts(folder_of(family), "sdpa")


def test_a_prefix_of_peft_and_flash_attention_need_two_rows(folder_of):
    assert not can_share_prompts(folder_of("opt"), "sdpa", pre_seq_len=4)
    assert can_share_prompts(folder_of("chatglm2-6b"), "sdpa", pre_seq_len=4)
    assert not can_share_prompts(folder_of("llama"), "flash_attention_2")


def test_the_width_of_a_pair_is_that_of_its_row():
    from datasets import Dataset

    rows = [row | {"length": len(row["chosen_ids"]) + len(row["rejected_ids"]), "padded_length": 26} for row in ROWS]
    widths = pair_widths(Dataset.from_list(rows), share=True)
    shared = collate_pairs(ROWS, pad_id=7, share=True).shared
    assert widths == (shared.branches >= 0).sum(1).tolist()
    assert pair_widths(Dataset.from_list(rows), share=False) == [26] * 3
