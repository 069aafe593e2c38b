"""Schedules of the learning rate, as in transformers, whose module imports its Trainer and peft (0.4 s)."""

import math


def rate_share(schedule: str, step: int, warmup: int, total: int) -> float:
    """Return the learning rate after so many steps as a share of the flag's: 0 to 1 over the warm-up, then as the schedule says.

    Formulas and values are those of transformers.get_scheduler. polynomial falls to 1e-4, the others to 0.
    """
    if schedule == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "constant_with_warmup":
        return 1.0
    if schedule == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    if schedule == "cosine_with_restarts":
        return 0.0 if done >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * (done % 1.0))))
    return 1e-4 + (1.0 - 1e-4) * (1.0 - min(done, 1.0))
