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


def rollout(
    rows: list[tuple[list[int], list[int]]],
    *,
    first: int = 0,
    spare: tuple[int, int] = (0, 0),
    pad: int = PAD,
    filled: bool = True,
) -> Experience:
    """Rows of (prompt, answer), written out by hand. Row i, column t of every field is 100 (first + i) + t, so that a value
    tells where it belongs. spare: extra padding on the left of prompts and on the right of answers.
    """
    prompt = max(len(p) for p, _ in rows) + spare[0]
    answer = max(len(a) for _, a in rows) + spare[1]
    count = len(rows)
    ids = torch.tensor([[pad] * (prompt - len(p)) + p for p, _ in rows])
    mask = torch.tensor([[0] * (prompt - len(p)) + [1] * len(p) for p, _ in rows])
    lengths = torch.tensor([len(a) for _, a in rows])
    names = 100.0 * (first + torch.arange(count))[:, None] + torch.arange(answer)
    names = names.where(torch.arange(answer) < lengths[:, None], 0.0)
    generation = Generation(
        sequences=torch.tensor([a + [pad] * (answer - len(a)) for _, a in rows]),
        lengths=lengths,
        ended=torch.arange(count) % 2 == 0,
        log_probs=names.clone(),
    )
    experience = Experience.from_generation(ids, mask, generation, first + torch.arange(count), pad)
    if filled:
        for name in ("old_log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns"):
            setattr(experience, name, names.clone())
        experience.scores = first + torch.arange(count).float()
    return experience


def texts(experience: Experience) -> list[tuple[list[int], list[int], list[float], int, bool]]:
    """Each row without padding: prompt, answer, advantages (of the answer's tokens), index, ended."""
    split, field = experience.prompt_width, experience.log_probs if experience.advantages is None else experience.advantages
    rows = []
    for row in range(len(experience)):
        ids, real, actions = experience.input_ids[row], experience.attention_mask[row].bool(), experience.action_mask[row]
        prompt, answer = ids[:split][real[:split]].tolist(), ids[split:][actions].tolist()
        rows.append((prompt, answer, field[row][actions].tolist(), int(experience.index[row]), bool(experience.ended[row])))
    return rows


def assert_equal(one: Experience, other: Experience) -> None:
    """The same tensors, bit for bit."""
    for field in fields(Experience):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert isinstance(a, Tensor) == isinstance(b, Tensor), field.name
        assert not isinstance(a, Tensor) or (a.dtype == b.dtype and torch.equal(a, b)), field.name


ROWS = [([5, PAD, 6], [7, 2]), ([8], [9, 9, 9, 2]), ([5, 5], [2])]


@pytest.mark.detail(1)
def test_layout():
    """Prompt on the left, answer on the right, masks from lengths: a prompt token with the pad's id is real,
    the end token is an action, what follows it is not."""
    experience = rollout(ROWS)
    assert experience.input_ids.tolist() == [
        [5, PAD, 6, 7, 2, PAD, PAD],
        [PAD, PAD, 8, 9, 9, 9, 2],
        [PAD, 5, 5, 2, PAD, PAD, PAD],
    ]
    assert experience.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]
    assert experience.action_mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert experience.prompt_width == 3 and len(experience) == 3


@pytest.mark.detail(4)
def test_pad_may_be_the_end_token():
    """With pad == eos (2) only ids under the padding differ; masks and lengths are the same."""
    one, other = rollout(ROWS), rollout(ROWS, pad=2)
    assert torch.equal(one.attention_mask, other.attention_mask) and torch.equal(one.action_mask, other.action_mask)
    assert texts(one) == texts(other)


def test_select_keeps_widths_and_order():
    """Rows in the order asked for, also twice; changes do not reach the original."""
    experience = rollout(ROWS)
    picked = experience.select([2, 0, 2])
    whole = texts(experience)
    assert texts(picked) == [whole[2], whole[0], whole[2]]
    assert picked.scores.tolist() == [2.0, 0.0, 2.0]
    assert picked.action_mask.shape == (3, 4)
    picked.advantages.zero_()
    assert texts(experience) == whole
    assert_equal(experience.select(torch.tensor([0, 1, 2])), experience)


@pytest.mark.detail(3)
def test_trimmed_takes_padding_away_and_nothing_else():
    """The longest prompt and the longest answer of the rows decide the width; padding is all that goes."""
    experience = rollout(ROWS, spare=(4, 3))
    assert experience.input_ids.shape == (3, 14)
    assert_equal(experience.trimmed(), rollout(ROWS))
    short = experience.select([2]).trimmed()
    assert short.input_ids.tolist() == [[5, 5, 2]]
    assert texts(short) == texts(experience)[2:]


def test_joined_rows_have_no_padding_in_the_middle():
    """Written out by hand; values before each answer token are found where they were."""
    joined = rollout(ROWS, spare=(2, 3)).joined()
    assert joined.input_ids.tolist() == [[5, PAD, 6, 7, 2], [8, 9, 9, 9, 2], [5, 5, 2, PAD, PAD]]
    assert joined.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert joined.answer_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0]]
    columns = torch.arange(5).expand(3, 5)
    actions = rollout(ROWS, spare=(2, 3)).action_mask
    before = [row[real].tolist() for row, real in zip(joined.before_answers(columns), actions, strict=True)]
    assert before == [[2, 3], [0, 1, 2, 3], [1]]
    assert rollout([([4], [])], spare=(0, 2)).joined().input_ids.tolist() == [[4]]


def test_a_row_without_an_answer_keeps_one_column():
    """Nothing to train on, yet a shape that every model accepts."""
    experience = rollout([([4], []), ([4, 5], [])], spare=(0, 2)).trimmed()
    assert experience.action_mask.tolist() == [[False], [False]]
    assert experience.attention_mask.tolist() == [[0, 1, 0], [1, 1, 0]]


def test_concat_pads_to_the_widest():
    """Pieces of different widths: the same as if all rows had been generated together. What is not known stays unknown."""
    for filled in (True, False):
        pieces = [rollout(ROWS[:1], filled=filled), rollout(ROWS[1:], first=1, filled=filled)]
        for piece in pieces:
            piece.ended = torch.arange(3)[piece.index] % 2 == 0
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
    """The same on every process and after a resume, another order in each epoch and rollout."""

    def plan(seed: int, rollout: int, epoch: int) -> list[list[int]]:
        return plan_minibatches(64, 16, seed=seed, rollout=rollout, epoch=epoch)

    torch.manual_seed(0)
    first = plan(1, 2, 0)
    torch.manual_seed(1)
    assert plan(1, 2, 0) == first
    others = [plan(1, 2, 1), plan(1, 3, 0), plan(2, 2, 0), plan(12, 0, 0)]
    assert all(other != first for other in others)
