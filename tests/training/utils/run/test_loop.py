"""Which examples make which step: independent of the number of processes, continued where a run stopped."""

import itertools
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from errors import UserError
from training.utils.data.batching import Epochs
from training.utils.run.loop import GlobalBatches, due, evaluation_batches, global_batch_size, token_budget

pytestmark = pytest.mark.fast

LENGTHS = [3, 9, 4, 7, 5, 8, 6, 3, 9, 4, 11]


class Rows(list):
    """A collated batch that keeps its rows; fillers are left out."""

    def to(self, device):
        return self


def collate(rows, real):
    return Rows(row["number"] for row, is_real in zip(rows, real, strict=True) if is_real)


def one_of(world_size: int, rank: int = 0, **sizes: int) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"), sizes=sizes)


def batches(rank: int = 0, world_size: int = 1, kept: dict | None = None, **changes) -> GlobalBatches:
    settings = {"seed": 1, "max_steps": 0, "num_train_epochs": 2, "gradient_accumulation_steps": 1, "global_batch_size": 4}
    dataset = Dataset.from_dict({"number": list(range(len(LENGTHS))), "length": LENGTHS})
    settings |= {"per_device_train_batch_size": 2, "max_tokens_per_device": 0, "eval_interval": 0, "save_steps": 0}
    settings |= {"allowed": []} | changes
    args = SimpleNamespace(**settings)
    return GlobalBatches(dataset, [1.0] * len(LENGTHS), collate, one_of(world_size, rank, **kept or {}), args)


def numbers(*found) -> list[int]:
    """The examples of batches, sorted."""
    return sorted(number for batch in found for micro in batch.micro_batches for number in micro)


def test_an_epoch_holds_every_example_once_and_the_last_batch_is_short():
    found = list(batches().after(0))
    assert len(found) == batches().total_steps == 6  # 11 examples, 4 a step: 3 steps an epoch, 2 epochs
    for epoch in (0, 1):
        assert numbers(*(batch for batch in found if batch.epoch == epoch)) == list(range(11))
    assert [batch.denominator for batch in found if batch.epoch == 0] == [4.0, 4.0, 3.0]
    assert [batch.evaluates for batch in found] == [False, False, True] * 2
    assert [batch.saves for batch in found] == [False, False, True, False, False, False] and found[-1].last
    assert sum(batch.tokens for batch in found) == 2 * sum(LENGTHS)
    more = list(batches(max_steps=8, num_train_epochs=1).after(0))
    assert [batch.step for batch in more] == list(range(1, 9)) and more[-1].epoch == 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_very_same_global_batches(world_size):
    ranks = [list(batches(rank, world_size).after(0)) for rank in range(world_size)]
    for alone, together in zip(batches().after(0), zip(*ranks, strict=True), strict=True):
        assert numbers(*together) == numbers(alone)
        assert len({len(batch.micro_batches) for batch in together}) == 1, "or the processes would wait for ever"
        assert {batch.denominator for batch in together} == {alone.denominator}


def test_a_resumed_run_sees_what_the_first_would_have_seen():
    whole = [batch.micro_batches for batch in batches().after(0)]
    for stop in range(6):
        assert [batch.micro_batches for batch in batches().after(stop)] == whole[stop:]


def test_token_budget_bounds_every_micro_batch():
    for batch in batches(max_tokens_per_device=18, global_batch_size=6).after(0):
        for micro in batch.micro_batches:
            assert len(micro) * max(LENGTHS[n] for n in micro) <= 18


@pytest.mark.parametrize(
    ("device", "per_device", "longest", "budget"),
    [("cuda", 8, 512, 4096), ("cpu", 8, 512, 1024), ("cpu", 2, 64, 128), ("cpu", 2, 2048, 2048)],
)
def test_the_budget_without_the_flag_is_what_the_batch_size_allows(device, per_device, longest, budget):
    args = SimpleNamespace(max_tokens_per_device=None)
    assert token_budget(args, per_device, longest, torch.device(device)) == budget
    args.max_tokens_per_device = 0
    assert token_budget(args, per_device, longest, torch.device(device)) is None


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_run_keeps_its_global_batch_whatever_the_processes(world_size):
    """Of 4, which three processes cannot share evenly."""
    changes = {"global_batch_size": 0, "per_device_train_batch_size": 3}
    whole = list(batches().after(0))
    shares = [list(batches(rank, world_size, kept={"global_batch": 4}, **changes).after(0)) for rank in range(world_size)]
    for step, expected in enumerate(whole):
        assert numbers(*(share[step] for share in shares)) == numbers(expected)
        assert all(share[step].denominator == expected.denominator for share in shares)
    with pytest.raises(UserError, match="--global_batch_size 8: the run that is resumed takes 4 examples a step"):
        batches(kept={"global_batch": 4}, global_batch_size=8)


@pytest.mark.parametrize("stops", itertools.product(range(7), (0, 1, 2, 5), (8, 3)))
def test_an_epoch_whose_batch_changes_twice_trains_every_example_once(stops):
    """Batches of 4, then of another size, then of 2; --allow names a flag that the size is made of."""
    first, more, second = stops
    done, kept = list(batches().after(0))[:first], {"step": first, "global_batch": 4}
    for stop, size in ((more, second), (99, 2)):
        run = batches(kept=kept, global_batch_size=size, allowed=["gradient_accumulation_steps"])
        done += list(run.after(len(done)))[:stop]
        kept = {"step": len(done), **run.sizes}
        assert list(batches(kept=kept, global_batch_size=size).after(len(done)))[:1] == list(run.after(len(done)))[:1], "kept"
    assert [batch.step for batch in done] == list(range(1, run.total_steps + 1)) and done[-1].last
    for epoch in (0, 1):
        assert numbers(*(batch for batch in done if batch.epoch == epoch)) == list(range(11))
    assert run.schedule_steps == 12, "two epochs of 6 batches of 2"


def test_the_last_batch_of_an_epoch_is_filled_up_also_behind_another_size():
    lengths = [1] * 11
    whole = list(islice(Epochs(4).after(0, lengths, seed=1, fill=True), 6))
    order = [example for _, epoch, examples, _ in whole for example in examples if epoch == 0][:11]
    number, epoch, examples, ends = list(islice(Epochs(4).changed(1, 5, 11).after(1, lengths, seed=1, fill=True), 2))[1]
    assert (number, epoch, examples, ends) == (3, 0, order[9:] + order[:3], True)


def test_an_example_beyond_the_token_budget_is_told_before_the_first_step():
    batches(max_tokens_per_device=max(LENGTHS))
    with pytest.raises(UserError, match="--max_tokens_per_device 10 cannot hold the longest example, of 11 tokens"):
        batches(max_tokens_per_device=10)


def test_global_batch_size():
    args = SimpleNamespace(global_batch_size=0, gradient_accumulation_steps=3)
    assert global_batch_size(args, world_size=2, per_device=4) == 24
    args.global_batch_size = 24
    assert global_batch_size(args, world_size=2, per_device=4) == 24
    args.global_batch_size = 48
    with pytest.raises(UserError, match="--gradient_accumulation_steps 3 makes a batch of 24 over 2 processes"):
        global_batch_size(args, world_size=2, per_device=4)
    args.global_batch_size, args.gradient_accumulation_steps = 10, 1
    assert global_batch_size(args, world_size=5, per_device=4) == 10
    with pytest.raises(UserError, match=r"--global_batch_size 10 .* 4 processes; take a multiple of 4, such as 12"):
        global_batch_size(args, world_size=4, per_device=4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_takes_every_example_once(world_size):
    dataset = batches().dataset
    shares = [list(evaluation_batches(dataset, collate, one_of(world_size, rank), 2)) for rank in range(world_size)]
    assert sorted(number for share in shares for micro in share for number in micro) == list(range(11))
    assert len({len(share) for share in shares}) == 1


def test_a_limited_evaluation_takes_a_fair_sample():
    """Of 400 examples the mean length of 40 lies near that of all; longest first, it was the longest that were taken."""
    lengths = [10 + number % 100 for number in range(400)]
    dataset, samples = Dataset.from_dict({"number": list(range(400)), "length": lengths}), []
    for world_size in (1, 2, 4):
        ranks = [one_of(world_size, rank) for rank in range(world_size)]
        shares = [list(evaluation_batches(dataset, collate, rank, 20, limit=2)) for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        samples.append(sorted(number for share in shares for micro in share for number in micro))
    assert len(set(samples[0])) == 40 and samples[0] == samples[1] == samples[2], "however many processes share them"
    mean = sum(lengths[number] for number in samples[0]) / 40
    assert abs(mean - sum(lengths) / 400) < 3 * 29 / 40**0.5  # three standard errors of a mean of 40


def test_due():
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not any(due(step, 0) for step in range(10))
