"""Batches: nothing lost, nothing twice, the same work for every process, little padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from training.utils.data.batching import (
    FILLER,
    collate_pairs,
    collate_prompts,
    collate_sft,
    pad_left,
    pad_right,
    plan_epoch,
    plan_micro_batches,
)

pytestmark = pytest.mark.fast

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
PAD = 0
patient = settings(deadline=None, max_examples=40)  # a busy machine is no failure


def log_normal_lengths(count: int) -> list[int]:
    """Lengths as chat data has them: median 150 tokens, a long tail, at most 1024."""
    drawn = np.random.default_rng(3).lognormal(mean=5.0, sigma=0.9, size=count)
    return np.clip(drawn, 4, 1024).astype(int).tolist()


def real(rank: list[list[int]]) -> list[int]:
    """Positions of a rank's micro-batches, fillers aside."""
    return [position for positions in rank for position in positions if position != FILLER]


# --- epochs -----------------------------------------------------------------------------------------------------------


@patient
@given(LENGTHS, st.integers(1, 17), st.integers(0, 5), st.integers(0, 3), st.booleans(), st.booleans())
def test_an_epoch_holds_every_example_once_and_is_deterministic(lengths, size, seed, epoch, shuffle, bucket):
    plan = plan_epoch(lengths, size, seed, epoch, shuffle, bucket)
    assert sorted(example for batch in plan for example in batch) == list(range(len(lengths)))
    assert [len(batch) for batch in plan[:-1]] == [size] * (len(plan) - 1)
    assert len(plan[-1]) == (len(lengths) % size or size)
    assert plan == plan_epoch(lengths, size, seed, epoch, shuffle, bucket)


def test_the_order_of_an_epoch():
    lengths = log_normal_lengths(3200)
    plans = [plan_epoch(lengths, 16, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(one != other for index, one in enumerate(plans) for other in plans[:index])
    means = [np.mean([lengths[example] for example in batch]) for batch in plans[0]]
    halves = np.mean(means[:100]), np.mean(means[100:])
    assert max(halves) / min(halves) < 1.6  # about 4 where the epoch is sorted as a whole
    assert plan_epoch([5, 1, 4, 2, 3], 2, 0, 0, shuffle=False, bucket=False) == [[0, 1], [2, 3], [4]]


def padded_share(lengths: list[int], batches: list[list[int]]) -> float:
    """Share of padding in the micro-batches of an epoch."""
    tokens = padded = 0
    for batch in batches:
        of_batch = [lengths[example] for example in batch]
        for rank in plan_micro_batches(of_batch, 2, 8, None):
            for positions in rank:
                sizes = [of_batch[position] for position in positions if position != FILLER]
                tokens += sum(sizes)
                padded += max(sizes, default=0) * len(positions)
    return 1 - tokens / padded


def test_bucketing_removes_most_of_the_padding():
    lengths = log_normal_lengths(4000)
    assert padded_share(lengths, plan_epoch(lengths, 16, 0, 0, bucket=False)) > 0.4
    assert padded_share(lengths, plan_epoch(lengths, 16, 0, 0)) < 0.15


# --- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.detail(48)
@patient
@given(LENGTHS, st.integers(1, 9), st.none() | st.integers(1, 12), st.none() | st.integers(60, 300))
@pytest.mark.ppo
def test_micro_batches_hold_every_position_once_within_the_limits(lengths, world_size, max_examples, max_tokens):
    plan = plan_micro_batches(lengths, world_size, max_examples, max_tokens)
    assert len(plan) == world_size
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) >= 1
    assert sorted(position for rank in plan for position in real(rank)) == list(range(len(lengths)))
    for rank in plan:
        for positions in rank:
            if FILLER in positions:  # only where there is no example left to share
                assert positions == [FILLER] and all(len(other) == 1 for other in rank)
                continue
            assert max_examples is None or len(positions) <= max_examples
            assert max_tokens is None or max(lengths[p] for p in positions) * len(positions) <= max_tokens
    loads = [sum(lengths[position] for position in real(rank)) for rank in plan]
    assert max(loads) - min(loads) <= max(lengths)
    assert plan == plan_micro_batches(lengths, world_size, max_examples, max_tokens)


def test_the_sizes_of_micro_batches():
    def sizes(*arguments):
        return [[len(positions) for positions in rank] for rank in plan_micro_batches(*arguments)]

    assert sizes([10] * 16, 2, 4, None) == [[4, 4], [4, 4]]
    # 9 + 1 + 1 real tokens would fit into 20, 3 x 9 padded ones do not
    assert sizes([9, 1, 1, 1, 1], 1, None, 20) == [[2, 3]]
    assert sorted(plan_micro_batches([5], 3, 4, None)) == [[[FILLER]], [[FILLER]], [[0]]]
    assert plan_micro_batches([], 2, 4, None) == [[], []]
    with pytest.raises(UserError, match=r"--max_tokens_per_device 64.*65 tokens"):
        plan_micro_batches([3, 65], 1, None, 64)


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_masks_come_from_lengths_though_the_pad_id_is_also_a_token():
    rows = [[0, 1, 0], [2], [0, 0]]
    ids, mask = pad_right(rows, PAD)
    assert (ids.tolist(), mask.tolist()) == ([[0, 1, 0], [2, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    ids, mask = pad_left(rows, PAD)
    assert (ids.tolist(), mask.tolist()) == ([[0, 1, 0], [0, 0, 2], [0, 0, 0]], [[1, 1, 1], [0, 0, 1], [0, 1, 1]])


SFT = [
    {"input_ids": [7, 8, 9, 0], "prompt_length": 2},
    {"input_ids": [5, 0], "prompt_length": 1},
    {"input_ids": [4, 0], "prompt_length": 0},
]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("answer", [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]), ("all", [[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]])],
)
def test_targets_are_the_answer_with_its_end_token_or_all_but_the_first_token(loss_on, expected):
    batch = collate_sft(SFT, pad_id=PAD, loss_on=loss_on)
    assert batch.loss_mask.int().tolist() == expected
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch.input_ids.tolist() == [[7, 8, 9, 0], [5, 0, 0, 0], [4, 0, 0, 0]]
    with_filler = collate_sft(SFT, [True, False, True], pad_id=PAD, loss_on=loss_on)
    assert with_filler.loss_mask.any(1).tolist() == [True, False, True]


def test_pairs_stand_chosen_first_and_fillers_weigh_nothing():
    rows = [
        {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 4], "margin": None},
        {"chosen_ids": [5, 6], "rejected_ids": [5, 7, 8, 9], "margin": 0.5},
    ]
    batch = collate_pairs(rows, [True, False], pad_id=PAD).to("cpu")
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [5, 6, 0, 0], [1, 4, 0, 0], [5, 7, 8, 9]]
    assert batch.attention_mask.sum(1).tolist() == [3, 2, 2, 4]
    assert batch.margin.tolist() == [0.0, 0.5]
    assert batch.weight.tolist() == [1.0, 0.0]
    assert batch.weight.dtype == batch.margin.dtype == torch.float32


def test_prompts_are_padded_in_front_and_know_where_they_come_from():
    rows = [{"prompt_ids": [1, 2, 3], "index": 12}, {"prompt_ids": [4], "index": 5}]
    batch = collate_prompts(rows, pad_id=PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.index.tolist() == [12, 5]
