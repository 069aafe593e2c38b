"""One row for both answers to a prompt: the prompt is computed once, and neither answer sees the other.

    input_ids  [ p  p  p | a  a  E | b  b  b  E  . ]
    positions  [ 0  1  2 | 3  4  5 | 3  4  5  6  . ]
    branches   [ 0  0  0 | 1  1  1 | 2  2  2  2 -1 ]

A token attends to those before it of its own branch and of the prompt (branch 0). Hidden states are equal to those of two
rows; they are put back into two rows, so that whatever reads them knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.checkpoint_folder import CheckpointFolder, open_checkpoint


@dataclass
class SharedRows:
    """The rows that the network computes, and where the state of each token of the two rows of a pair stands in them."""

    input_ids: Tensor  # [pairs, time] int64
    position_ids: Tensor  # [pairs, time] int64
    branches: Tensor  # [pairs, time] int64: 0 prompt, 1 chosen, 2 rejected answer, -1 padding
    places: Tensor  # [2 x pairs, longest] int64 into [pairs x time], the chosen rows first; of padding any place

    def to(self, device: torch.device | str) -> SharedRows:
        """Return a copy on the device."""
        return SharedRows(*(tensor.to(device) for tensor in vars(self).values()))

    def attention_bias(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to attention scores, [pairs, 1, time, time]: 0 where a token is seen, else the lowest number."""
        query, key = self.branches[:, :, None], self.branches[:, None, :]
        time = torch.arange(self.branches.shape[1], device=self.branches.device)
        seen = ((key == 0) | (key == query)) & (time <= time[:, None])
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return bias.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def share_prompts(
    chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]], prompt_lengths: Sequence[int], pad_id: int
) -> SharedRows:
    """Lay out pairs whose first prompt_lengths tokens are the same in both rows."""
    rows = list(zip(chosen, rejected, prompt_lengths, strict=True))
    time = max(len(first) + len(second) - prompt for first, second, prompt in rows)
    longest = max(map(len, [*chosen, *rejected]))
    input_ids, positions = torch.full((len(rows), time), pad_id), torch.zeros(len(rows), time, dtype=torch.int64)
    branches = torch.full((len(rows), time), -1)
    places = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for index, (first, second, prompt) in enumerate(rows):
        end = len(first) + len(second) - prompt
        input_ids[index, :end] = torch.tensor([*first, *second[prompt:]])
        positions[index, : len(first)] = torch.arange(len(first))
        positions[index, len(first) : end] = torch.arange(prompt, len(second))
        branches[index, :end] = torch.tensor([0] * prompt + [1] * (len(first) - prompt) + [2] * (len(second) - prompt))
        places[0, index, : len(first)] = index * time + torch.arange(len(first))
        places[1, index, :prompt] = index * time + torch.arange(prompt)
        places[1, index, prompt : len(second)] = index * time + torch.arange(len(first), end)
    return SharedRows(input_ids, positions, branches, places.flatten(0, 1))


def shared_length(one: Sequence, other: Sequence) -> int:
    """Return how many elements two sequences have in common at their beginnings."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def can_share_prompts(path: str | CheckpointFolder, attention: str, **prefix: Any) -> bool:
    """Tell whether a network takes positions and a mask of our own, so that two answers fit into a row.

    Not BLOOM (ALiBi counts columns), ChatGLM-6B (a prompt sees all of itself), a sliding window, flash-attention, nor a
    prefix that peft holds. attention: the kernels asked for; prefix: as in CheckpointFolder.prefix.
    """
    checkpoint = open_checkpoint(path)
    config = open_checkpoint(checkpoint.weights).config()
    ours = config.model_type == "chatglm"
    return (
        attention != "flash_attention_2"
        and config.model_type != "bloom"
        and not hasattr(config, "gmask_token_id")
        and getattr(config, "sliding_window", None) is None
        and (ours or checkpoint.prefix(**prefix) is None)
    )
