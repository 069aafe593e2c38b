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

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
PAD = 0
patient = settings(deadline=None)  # a busy machine is no failure


def log_normal_lengths(count: int) -> list[int]:
    """Lengths as chat data has them: median 150 tokens, a long tail, at most 1024."""
    drawn = np.random.default_rng(3).lognormal(mean=5.0, sigma=0.9, size=count)
    return np.clip(drawn, 4, 1024).astype(int).tolist()


# --- epochs -----------------------------------------------------------------------------------------------------------


@patient
@given(LENGTHS, st.integers(1, 17), st.integers(0, 5), st.integers(0, 3), st.booleans(), st.booleans())
def test_an_epoch_holds_every_example_once_and_is_deterministic(lengths, size, seed, epoch, shuffle, bucket):
    plan = plan_epoch(lengths, size, seed, epoch, shuffle, bucket)
    assert sorted(example for batch in plan for example in batch) == list(range(len(lengths)))
    assert [len(batch) for batch in plan[:-1]] == [size] * (len(plan) - 1)
    assert len(plan[-1]) == (len(lengths) % size or size)
    assert plan == plan_epoch(lengths, size, seed, epoch, shuffle, bucket)


def test_epochs_and_seeds_differ_in_their_order():
    lengths = log_normal_lengths(200)
    plans = [plan_epoch(lengths, 8, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(one != other for place, one in enumerate(plans) for other in plans[:place])


def test_without_shuffling_and_sorting_the_order_is_that_of_the_data():
    assert plan_epoch([5, 1, 4, 2, 3], 2, 0, 0, shuffle=False, bucket=False) == [[0, 1], [2, 3], [4]]


def test_long_examples_do_not_all_come_at_one_end_of_an_epoch():
    lengths = log_normal_lengths(3200)
    means = [np.mean([lengths[example] for example in batch]) for batch in plan_epoch(lengths, 16, 0, 0)]
    halves = np.mean(means[:100]), np.mean(means[100:])
    assert max(halves) / min(halves) < 1.6  # about 4 where the epoch is sorted as a whole


def padded_share(lengths: list[int], batches: list[list[int]], world_size: int = 2, per_device: int = 8) -> float:
    """Share of padding in the micro-batches of an epoch, counted from the plans."""
    real = padded = 0
    for batch in batches:
        of_batch = [lengths[example] for example in batch]
        for rank in plan_micro_batches(of_batch, world_size, per_device, None):
            for positions in rank:
                sizes = [of_batch[position] for position in positions if position != FILLER]
                real += sum(sizes)
                padded += max(sizes, default=0) * len(positions)
    return 1 - real / padded


def test_bucketing_removes_most_of_the_padding():
    lengths = log_normal_lengths(4000)
    bucketed = padded_share(lengths, plan_epoch(lengths, 16, 0, 0))
    random = padded_share(lengths, plan_epoch(lengths, 16, 0, 0, bucket=False))
    print(f"padding: random {random:.1%}, bucketed {bucketed:.1%}")
    assert random > 0.4
    assert bucketed < 0.15


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
    flat = [position for rank in plan for positions in rank for position in positions]
    assert sorted(position for position in flat if position != FILLER) == list(range(len(lengths)))
    for rank in plan:
        for positions in rank:
            assert positions == [FILLER] or FILLER not in positions
            real = [lengths[position] for position in positions if position != FILLER]
            assert max_examples is None or len(positions) <= max_examples
            assert max_tokens is None or max(real, default=0) * len(positions) <= max_tokens
    assert plan == plan_micro_batches(lengths, world_size, max_examples, max_tokens)


@patient
@given(LENGTHS, st.integers(1, 9), st.none() | st.integers(60, 300))
def test_fillers_come_only_when_there_is_no_example_left_to_share(lengths, world_size, max_tokens):
    for rank in plan_micro_batches(lengths, world_size, 4, max_tokens):
        if [FILLER] in rank:
            assert all(len(positions) == 1 for positions in rank)


@patient
@given(LENGTHS, st.integers(1, 8), st.integers(0, 3))
def test_global_batches_are_the_same_for_any_number_of_processes(lengths, size, epoch):
    for batch in plan_epoch(lengths, size, 0, epoch):
        of_batch = [lengths[example] for example in batch]
        for world_size in (1, 2, 4):
            plan = plan_micro_batches(of_batch, world_size, 3, None)
            trained = [batch[p] for rank in plan for positions in rank for p in positions if p != FILLER]
            assert sorted(trained) == sorted(batch)


@patient
@given(LENGTHS, st.integers(2, 6))
def test_the_work_of_ranks_differs_by_no_more_than_one_example(lengths, world_size):
    plan = plan_micro_batches(lengths, world_size, None, None)
    loads = [sum(lengths[p] for positions in rank for p in positions if p != FILLER) for rank in plan]
    assert max(loads) - min(loads) <= max(lengths)


def test_micro_batches_of_equal_lengths_are_full():
    plan = plan_micro_batches([10] * 16, 2, 4, None)
    assert [[len(positions) for positions in rank] for rank in plan] == [[4, 4], [4, 4]]


def test_the_token_budget_counts_padding():
    plan = plan_micro_batches([9, 1, 1, 1, 1], 1, None, 20)
    # 9 + 1 + 1 real tokens would fit into 20, 3 x 9 padded ones do not
    assert [[len(positions) for positions in rank] for rank in plan] == [[2, 3]]


def test_a_rank_without_work_gets_a_filler():
    assert sorted(plan_micro_batches([5], 3, 4, None)) == [[[FILLER]], [[FILLER]], [[0]]]


def test_an_empty_set_has_no_micro_batches():
    assert plan_micro_batches([], 2, 4, None) == [[], []]


def test_an_example_over_the_budget_is_refused_with_the_flag():
    with pytest.raises(UserError, match=r"--max_tokens_per_device 64.*65 tokens"):
        plan_micro_batches([3, 65], 1, None, 64)


# --- tensors ----------------------------------------------------------------------------------------------------------


@patient
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=6))
def test_masks_come_from_lengths_though_the_pad_id_is_also_a_token(rows):
    for pad, start in ((pad_right, lambda width, row: 0), (pad_left, lambda width, row: width - len(row))):
        ids, mask = pad(rows, PAD)
        width = max(map(len, rows))
        assert ids.shape == mask.shape == (len(rows), width)
        for place, row in enumerate(rows):
            for column in range(width):
                inside = start(width, row) <= column < start(width, row) + len(row)
                assert mask[place, column] == int(inside)
                assert ids[place, column] == (row[column - start(width, row)] if inside else PAD)


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


def test_a_filler_has_no_targets():
    batch = collate_sft(SFT, [True, False, True], pad_id=PAD)
    assert batch.loss_mask.any(1).tolist() == [True, False, True]


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
