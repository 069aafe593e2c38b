"""The memory that a run finds when it begins, and the check that its step fits into it."""

import math
import os
from typing import Any

import psutil

from models.checkpoint_folder import CheckpointFolder
from models.device import DTYPES, free_memory, has_accelerator
from training.utils.memory.arithmetic import Machine
from training.utils.memory.container import container_free
from training.utils.memory.fit import check_fits
from training.utils.run.process_group import Run


def this_machine(run: Run) -> Machine:
    """Return the machine of a run, by the process that has the least: free memory of a card, and of the host or the container."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or run.world_size)
    host = -run.maximum(-min(float(psutil.virtual_memory().available), container_free()))
    if not has_accelerator():
        return Machine(run.world_size, local, 0.0, host, accelerator=False)
    card = -run.maximum(-float(free_memory() or math.inf))
    return Machine(run.world_size, local, card, host)


def check_run_fits(args: Any, run: Run, models: dict[str, CheckpointFolder]) -> dict[str, int]:
    """Return ``check_fits`` of a run that has begun. All processes call it, and all come to the same end."""
    dtype = next(name for name, one in DTYPES.items() if one == run.dtype)
    return check_fits(args, this_machine(run), models, dtype=dtype, attention=run.attention)
