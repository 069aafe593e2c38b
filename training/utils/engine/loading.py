"""Reading a network with no more copies of it on a host than there must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.checkpoint_folder import CheckpointFolder, open_checkpoint
from training.utils.run.process_group import Run


def read_in_turn(
    load: Callable[..., nn.Module], path: str | Path | CheckpointFolder, run: Run, settings: dict[str, Any]
) -> nn.Module:
    """load(path, **settings), on the run's device where that is a card.

    Files of the wanted dtype are mapped: the processes of a node share their pages. In another dtype each process makes a
    copy, which a card takes over; they do so one after the other. On a CPU the copy is the model, and split weights
    (zero3_config) are read by all processes together.
    """
    copies = run.device.type != "cpu" and not settings["zero3_config"]
    copies = copies and makes_copy(path, settings["dtype"], settings["quantization_bit"])
    with run.in_turn(copies):
        model = load(path, **settings)
        return model.to(run.device) if copies else model


def makes_copy(path: str | Path | CheckpointFolder, dtype: torch.dtype, quantization_bit: int) -> bool:
    """Whether the weights of a checkpoint are computed anew while they are read, not mapped as they are."""
    return bool(quantization_bit) or open_checkpoint(path).stored_dtype != str(dtype).removeprefix("torch.")
