"""Detect unhealthy PPO metrics; return one warning per symptom, with what to try."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

WINDOW = 10  # rollouts that a trend is averaged over
SILENCE = 50  # rollouts before the same warning may come again
RATIO = {False: 1e-3, True: 1e-2}  # by half precision: what rounding may do to the first ratio
CLIPPED = 0.3
SATURATED = 0.5


class Health:
    """Remember the last rollouts; ``check`` returns the warnings that are due. half: the models compute in 16 bits."""

    def __init__(self, half: bool = False) -> None:
        self.half = half
        self.warned: dict[str, int] = {}  # rollout of the last warning of each kind
        self.recent: dict[str, list[float]] = {"kl": [], "explained_variance": [], "eos_rate": []}
        self.best_eos_rate = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, as JSON."""
        recent = {name: list(values) for name, values in self.recent.items()}
        return {"warned": dict(self.warned), "recent": recent, "best_eos_rate": self.best_eos_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from state_dict()."""
        self.warned, self.recent, self.best_eos_rate = state["warned"], state["recent"], state["best_eos_rate"]

    def check(self, rollout: int, metrics: dict[str, float]) -> list[str]:
        """Return one sentence per symptom. Repeat each warning at most once per 50 rollouts.

        rollout counts from 1; metrics are those of a rollout and its update, absent ones are not judged.
        """
        for name, values in self.recent.items():
            if name in metrics:
                self.recent[name] = [*values, metrics[name]][-WINDOW:]
        self.best_eos_rate = max(self.best_eos_rate, self._trend("eos_rate"))  # NaN, in second place, is not larger
        sentences = []
        for kind, sentence in self._symptoms(rollout, metrics):
            if rollout - self.warned.get(kind, -SILENCE) >= SILENCE:
                self.warned[kind] = rollout
                sentences.append(sentence)
        return sentences

    def _trend(self, name: str) -> float:
        """Return the mean over the last ten rollouts; NaN, which no comparison is true of, before there are ten."""
        values = self.recent[name]
        return sum(values) / WINDOW if len(values) == WINDOW else math.nan

    def _symptoms(self, rollout: int, metrics: dict[str, float]) -> Iterator[tuple[str, str]]:
        """Yield the name of each symptom that is there, and what is wrong with what to try."""
        deviation, limit = metrics.get("first_ratio_deviation", 0.0), RATIO[self.half]
        if deviation > limit:
            yield "ratio", (
                f"the ratio of probabilities is off 1 by {deviation:.2g} on the first minibatch, before anything was learned "
                f"(rounding explains {limit:g}): the update scores answers differently from the rollout. Is --actor_dropout 0?"
            )
        if (share := metrics.get("clip_share", 0.0)) > CLIPPED:
            yield "clipping", (
                f"{share:.0%} of the tokens were clipped, their answers teach nothing: the update goes too far. Lower "
                "--actor_learning_rate or --ppo_epochs, or set --max_approx_kl."
            )
        mean = self._trend("kl")
        # k1 may be negative by chance; twice the standard error of the ten is more than chance.
        if mean + 2 * (sum((x - mean) ** 2 for x in self.recent["kl"]) / (WINDOW - 1) / WINDOW) ** 0.5 < 0:
            yield "negative_kl", (
                f"the KL against the reference is {mean:.3g} nats over {WINDOW} rollouts, and a true one is never below 0: "
                "answers are not drawn from the probabilities that are compared. Are --top_p, --top_k off, is the reference "
                "right?"
            )
        mean = self._trend("explained_variance")
        if mean < 0 and rollout > WINDOW:
            yield "critic", (
                f"the critic explains {mean:.2f} of the returns' variance over {WINDOW} rollouts, less than a constant would: "
                "raise --critic_learning_rate, or give it a start with --critic_warmup_rollouts."
            )
        rate, best = self._trend("eos_rate"), self.best_eos_rate
        if rate < best / 2:
            yield "endings", (
                f"{rate:.0%} of the answers end by themselves, {best:.0%} did before: longer is being rewarded. Raise "
                "--missing_eos_penalty or --max_answer_seq_len, or look at the samples."
            )
        if (share := metrics.get("score_clipped_share", 0.0)) > SATURATED:
            yield "saturation", (
                f"{share:.0%} of the scores were cut, so better and worse answers look alike: raise --clip_reward_value, or "
                "see in the samples whether the reward is being gamed."
            )
