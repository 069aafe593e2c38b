"""Rows of a rollout: layout, cutting and joining, gathering over processes, minibatches."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from inference.engine import Generation
from tests.launching import FORKS
from training.step3_ppo.experience import Experience, plan_minibatches

pytestmark = pytest.mark.ppo
PAD = 1  # a prompt token below has the same id
GATHERED_BY = 3  # processes
# (prompt, answer)
ROWS = [([5, PAD, 6], [7, 2]), ([8], [9, 9, 9, 2]), ([5, 5], [2])]


def rollout(rows, *, first: int = 0, spare: tuple[int, int] = (0, 0), pad: int = PAD, filled: bool = True) -> Experience:
    """Rows of (prompt, answer), written out by hand. Row i, column t of every field is 100 (first + i) + t, so that a value
    tells where it belongs. spare: extra padding on the left of prompts and on the right of answers.
    """
    prompt, answer = (max(map(len, texts)) + more for texts, more in zip(zip(*rows, strict=True), spare, strict=True))
    index = first + torch.arange(len(rows))
    lengths = torch.tensor([len(a) for _, a in rows])
    names = (100.0 * index[:, None] + torch.arange(answer)).where(torch.arange(answer) < lengths[:, None], 0.0)
    generation = Generation(
        sequences=torch.tensor([a + [pad] * (answer - len(a)) for _, a in rows]),
        lengths=lengths,
        ended=index % 2 == 0,
        log_probs=names.clone(),
    )
    ids = torch.tensor([[pad] * (prompt - len(p)) + p for p, _ in rows])
    mask = torch.tensor([[0] * (prompt - len(p)) + [1] * len(p) for p, _ in rows])
    experience = Experience.from_generation(ids, mask, generation, index, pad)
    if filled:
        for name in ("old_log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns"):
            setattr(experience, name, names.clone())
        experience.scores = index.float()
    return experience


def texts(experience: Experience) -> list[tuple[list[int], list[int], list[float], int, bool]]:
    """Each row without padding: prompt, answer, log-probabilities of the answer's tokens, index, ended."""
    split, rows = experience.prompt_width, []
    for row in range(len(experience)):
        ids, real, actions = experience.input_ids[row], experience.attention_mask[row].bool(), experience.action_mask[row]
        prompt, answer = ids[:split][real[:split]].tolist(), ids[split:][actions].tolist()
        numbers = experience.log_probs[row][actions].tolist()
        rows.append((prompt, answer, numbers, int(experience.index[row]), bool(experience.ended[row])))
    return rows


def assert_equal(one: Experience, other: Experience) -> None:
    """The same tensors, bit for bit."""
    for field in fields(Experience):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert isinstance(a, Tensor) == isinstance(b, Tensor), field.name
        assert not isinstance(a, Tensor) or (a.dtype == b.dtype and torch.equal(a, b)), field.name


@pytest.mark.detail(1, 4)
def test_layout():
    """Masks come from lengths: a prompt token with the pad's id is real, the end token is an action, what follows it is not;
    with pad == eos (2) only ids under the padding differ.
    """
    experience = rollout(ROWS)
    assert experience.input_ids.tolist() == [
        [5, PAD, 6, 7, 2, PAD, PAD],
        [PAD, PAD, 8, 9, 9, 9, 2],
        [PAD, 5, 5, 2, PAD, PAD, PAD],
    ]
    assert experience.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]
    assert experience.action_mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert experience.prompt_width == 3 and len(experience) == 3
    other = rollout(ROWS, pad=2)
    assert torch.equal(experience.attention_mask, other.attention_mask) and texts(experience) == texts(other)


@pytest.mark.detail(3)
def test_rows_are_selected_and_trimmed():
    """In the order asked for, also twice, in memory of their own; padding is all that trimming takes."""
    experience = rollout(ROWS, spare=(4, 3))
    whole, picked = texts(experience), experience.select([2, 0, 2])
    assert texts(picked) == [whole[2], whole[0], whole[2]] and picked.scores.tolist() == [2.0, 0.0, 2.0]
    assert picked.action_mask.shape == experience.action_mask.shape == (3, 7)
    picked.log_probs.zero_()
    assert texts(experience) == whole
    assert_equal(experience.select(torch.tensor([0, 1, 2])), experience)
    assert_equal(experience.trimmed(), rollout(ROWS))
    short = experience.select([2]).trimmed()
    assert short.input_ids.tolist() == [[5, 5, 2]] and texts(short) == whole[2:]
    # Nothing to train on, yet a shape that every model accepts.
    empty = rollout([([4], []), ([4, 5], [])], spare=(0, 2)).trimmed()
    assert empty.action_mask.tolist() == [[False], [False]] and empty.attention_mask.tolist() == [[0, 1, 0], [1, 1, 0]]


def test_joined_rows_have_no_padding_in_the_middle():
    """Written out by hand; values before each answer token are found where they were."""
    experience = rollout(ROWS, spare=(2, 3))
    joined = experience.joined()
    assert joined.input_ids.tolist() == [[5, PAD, 6, 7, 2], [8, 9, 9, 9, 2], [5, 5, 2, PAD, PAD]]
    assert joined.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert joined.answer_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0]]
    before = joined.before_answers(torch.arange(5).expand(3, 5))
    assert [row[real].tolist() for row, real in zip(before, experience.action_mask, strict=True)] == [[2, 3], [0, 1, 2, 3], [1]]
    assert rollout([([4], [])], spare=(0, 2)).joined().input_ids.tolist() == [[4]]


@pytest.mark.parametrize("filled", [True, False])
def test_concat_pads_to_the_widest(filled):
    """The same as if all rows had been generated together; what is not known stays unknown."""
    pieces = [rollout(ROWS[:1], filled=filled), rollout(ROWS[1:], first=1, filled=filled)]
    assert_equal(Experience.concat(pieces), rollout(ROWS, filled=filled))
    assert pieces[0].all_gather() is pieces[0], "without torch.distributed the rollout is the process's own"


@pytest.mark.detail(27)
def test_all_gather_of_ragged_processes(tmp_path):
    """Every process ends with all rows in the order of ranks, though their number and widths differ."""
    ranks = [FORKS.Process(target=gather, args=(rank, tmp_path)) for rank in range(GATHERED_BY)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * GATHERED_BY
    expected = Experience.concat([share(rank) for rank in range(GATHERED_BY)])
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(GATHERED_BY)]
    for gathered in found:
        assert texts(gathered) == texts(expected)
        assert_equal(gathered, found[0])
    assert found[0].input_ids.shape == (6, 3 + 4)  # the widest prompt and the widest answer, without spare columns


def gather(rank: int, folder: Path) -> None:
    """Do the work of one process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=GATHERED_BY)
    torch.save(share(rank).all_gather(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def share(rank: int) -> Experience:
    """What one process has generated: rank + 1 rows, wider on some ranks than on others."""
    return rollout((ROWS * 2)[rank : 2 * rank + 1], first=10 * rank, spare=(rank, 2 - rank))


@pytest.mark.detail(48)
@pytest.mark.parametrize(("count", "size"), [(8, 4), (10, 4), (3, 8), (1, 1)])
def test_every_row_is_in_one_minibatch(count, size):
    """Nothing is dropped; only the last minibatch may be short."""
    plan = plan_minibatches(count, size, seed=1, rollout=2, epoch=0)
    assert sorted(row for rows in plan for row in rows) == list(range(count))
    assert [len(rows) for rows in plan[:-1]] == [size] * (len(plan) - 1) and 0 < len(plan[-1]) <= size


@pytest.mark.detail(48)
def test_minibatches_follow_from_seed_rollout_and_epoch():
    """The same on every process and after a resume, whatever torch has drawn; another order in each epoch and rollout."""
    plans = []
    for seed, number, epoch in ((1, 2, 0), (1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0), (12, 0, 0)):
        torch.manual_seed(len(plans))
        plans.append(plan_minibatches(64, 16, seed=seed, rollout=number, epoch=epoch))
    assert plans[1] == plans[0] and all(other != plans[0] for other in plans[2:])
