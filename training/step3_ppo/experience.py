"""The experience of one rollout: prompts, answers, and what the four models say about every answer token.

Layout: the prompt padded on the left, the answer on its right, padded on the right:

    input_ids   [ .  .  p  p  p | a  a  E  .  . ]      time = prompt width + answer width
    action_mask                 [ 1  1  1  0  0 ]      the end token E is an action

The models that score and learn read joined() rows, which have no padding in the middle.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from inference.engine import Generation
from training.step3_ppo.objectives import answer_mask
from training.utils.data.batching import plan_micro_batches
from training.utils.run.loop import token_budget
from training.utils.run.process_group import Run

WHOLE = ("input_ids", "attention_mask")  # [rows, prompt + answer]
ACTIONS = ("action_mask", "log_probs", "old_log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns")


@dataclass(frozen=True)
class JoinedRows:
    """Prompts with their answers right behind them, padded on the right: what a network computes on."""

    input_ids: Tensor  # [rows, longest] int64
    attention_mask: Tensor  # [rows, longest] int64
    answer_mask: Tensor  # [rows, longest] bool
    places: Tensor  # [rows, answer] int64, the column of each answer token; of padding any column

    def before_answers(self, values: Tensor) -> Tensor:
        """Pick from values [rows, longest], one a column, those of the column before each answer token: [rows, answer]."""
        return values.gather(1, self.places - 1)


@dataclass
class Experience:
    """Rows of a rollout. All tensors are on one device; what is not known yet is None.

    log_probs are those that the sampler saw, old_log_probs those of the same weights in the training forward: the ratio of
    PPO is taken against the latter.
    """

    input_ids: Tensor  # [rows, prompt + answer] int64
    attention_mask: Tensor  # [rows, prompt + answer] int64, from lengths
    action_mask: Tensor  # [rows, answer] bool, from lengths, the end token included
    answer_lengths: Tensor  # [rows] int64, the end token included
    ended: Tensor  # [rows] bool: the answer ends in a stop token, it was not cut off
    index: Tensor  # [rows] int64, which example of the data set
    group: Tensor  # [rows] int64, which prompt of the rollout: equal for the answers to be compared with each other
    log_probs: Tensor  # [rows, answer] float32, as all that follow
    old_log_probs: Tensor | None = None  # [rows, answer]
    ref_log_probs: Tensor | None = None  # [rows, answer]
    values: Tensor | None = None  # [rows, answer], before each token, in units of normalised scores
    source_scores: Tensor | None = None  # [rows, sources], what each source of reward says, in its own unit
    scores: Tensor | None = None  # [rows], their weighted sum; of the reward model alone, its own unit
    rewards: Tensor | None = None  # [rows, answer]
    advantages: Tensor | None = None  # [rows, answer]
    returns: Tensor | None = None  # [rows, answer]
    pad_id: int = 0  # fills input_ids where rows of different widths come together; no mask is made from it
    sampler_gap: float | None = None  # largest |old_log_probs - log_probs| of the rollout; None: they are the same
    metrics: dict[str, float] = field(default_factory=dict)  # what the log shows of the rollout

    @classmethod
    def from_generation(
        cls,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        generation: Generation,
        index: Tensor,
        pad_id: int,
        group: Tensor | None = None,
    ) -> Experience:
        """Put answers behind their prompts; the masks of answers come from their lengths.

        prompt_ids, prompt_mask: [rows, prompt], left-padded; index, group [rows]; without a group, the answers to one
        example are one.
        """
        actions = answer_mask(generation.lengths, generation.sequences.shape[1])
        return cls(
            input_ids=torch.cat([prompt_ids, generation.sequences], dim=1),
            attention_mask=torch.cat([prompt_mask.long(), actions.long()], dim=1),
            action_mask=actions,
            answer_lengths=generation.lengths,
            ended=generation.ended,
            index=index,
            group=index.clone() if group is None else group,
            log_probs=generation.log_probs,
            pad_id=pad_id,
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def prompt_width(self) -> int:
        """Columns of input_ids that stand before the answer."""
        return self.input_ids.shape[1] - self.action_mask.shape[1]

    def micro_batches(self, run: Run, args) -> list[tuple[list[int], Experience]]:
        """Return this process's share of the rows, cut by rows or by tokens: which rows, and these rows trimmed.

        All processes get equally many. Fillers, which have an empty action mask, stand behind the real rows, or alone.
        """
        shares = []
        longest = args.max_prompt_seq_len + args.max_answer_seq_len
        for positions in plan_share(self.attention_mask.sum(dim=1).tolist(), longest, run, args):
            real = [position for position in positions if position >= 0]
            rows = self.select([max(position, 0) for position in positions]).trimmed()
            rows.action_mask[len(real) :] = False
            shares.append((real, rows))
        return shares

    def select(self, rows: Sequence[int] | Tensor) -> Experience:
        """Select these rows in this order, in new memory; the widths stay, metrics are dropped."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.input_ids.device)
        return self._map(lambda name, tensor: tensor[rows])

    def trimmed(self) -> Experience:
        """Return the same rows, no wider than their longest prompt and their longest answer (of one column at least)."""
        prompt, answer = self.prompt_width, self.action_mask.shape[1]
        spare_left = prompt - int(self.attention_mask[:, :prompt].sum(dim=1).max())
        spare_right = answer - max(1, int(self.answer_lengths.max()))
        return self._fit(prompt - spare_left, answer - spare_right)

    def joined(self) -> JoinedRows:
        """Return the rows without padding between prompt and answer, no wider than the longest of them."""
        real = self.attention_mask.bool()
        lengths = real.sum(dim=1, keepdim=True)
        longest = int(lengths.max())
        order = (~real).int().argsort(dim=1, stable=True)[:, :longest]  # real tokens first
        columns = torch.arange(longest, device=real.device)
        starts = lengths - self.answer_lengths[:, None]
        places = starts + torch.arange(self.action_mask.shape[1], device=real.device)
        return JoinedRows(
            input_ids=self.input_ids.gather(1, order),
            attention_mask=(columns < lengths).long(),
            answer_mask=(columns >= starts) & (columns < lengths),
            places=places.clamp(1, longest - 1),
        )

    @staticmethod
    def concat(pieces: Sequence[Experience]) -> Experience:
        """Put the rows of all pieces one after another, padded to the widest prompt and answer among them."""
        prompt = max(piece.prompt_width for piece in pieces)
        answer = max(piece.action_mask.shape[1] for piece in pieces)
        fitted = [piece._fit(prompt, answer) for piece in pieces]
        return fitted[0]._map(lambda name, _: torch.cat([getattr(piece, name) for piece in fitted]))

    def all_gather(self) -> Experience:
        """Gather the rows of all processes, in the order of their ranks, the same on each; itself without torch.distributed.

        Processes may differ in rows and widths. All must call it together. With the whole rollout at hand, whitening and
        minibatches are the same for any number of processes.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        device = self.input_ids.device
        pieces: list[Experience | None] = [None] * dist.get_world_size()
        dist.all_gather_object(pieces, self._map(lambda name, tensor: tensor.cpu()))
        return Experience.concat(pieces)._map(lambda name, tensor: tensor.to(device)).trimmed()

    def _map(self, change) -> Experience:
        """Return a copy with change(name, tensor) for every tensor that is there."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self)}
        tensors = {name: change(name, tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        return replace(self, metrics={}, **tensors)

    def _fit(self, prompt: int, answer: int) -> Experience:
        """Cut or pad to these widths; cut columns must be padding."""
        left, right = prompt - self.prompt_width, answer - self.action_mask.shape[1]

        def fit(name: str, tensor: Tensor) -> Tensor:
            if name in WHOLE:
                return F.pad(tensor, (left, right), value=self.pad_id if name == "input_ids" else 0)
            return F.pad(tensor, (0, right), value=0) if name in ACTIONS else tensor

        return self._map(fit)


def plan_share(lengths: Sequence[int], longest: int, run: Run, args) -> list[list[int]]:
    """Return this process's micro-batches as positions into lengths, -1 for a filler (plan_micro_batches). longest: the most
    tokens that a row of this run can have.
    """
    per_device = args.per_device_training_batch_size
    budget = token_budget(args, per_device, longest, run.device)
    return plan_micro_batches(lengths, run.world_size, None if budget else per_device, budget)[run.rank]


def plan_minibatches(count: int, size: int, *, seed: int, rollout: int, epoch: int) -> list[list[int]]:
    """Return the rows of each minibatch of one epoch over a rollout: a shuffle that follows from seed, rollout and epoch alone.

    Every row is in exactly one minibatch; the last one may be short. Minibatches are global: the plan does not know how many
    processes there are.
    """
    rows = list(range(count))
    random.Random(f"minibatches/{seed}/{rollout}/{epoch}").shuffle(rows)
    return [rows[start : start + size] for start in range(0, count, size)]
