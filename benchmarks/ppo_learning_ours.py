"""One training of benchmarks/ppo_learning.py by step 3 itself: its main(), with a trainer that looks at the clock.

    python -m benchmarks.ppo_learning_ours settings.json

settings.json: flags (step 3's command line), output, snapshots. With prompts, a file: the prompts of every rollout are written
there as token ids before the first, so that another trainer can be given the same in the same order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.ppo_learning_clock import Clock
from training.step3_ppo import main as step3
from training.step3_ppo.experience import Experience
from training.step3_ppo.ppo_trainer import DeepSpeedPPOTrainer
from training.step3_ppo.rollout import PromptBatches
from training.utils.data.batching import PromptBatch
from training.utils.flags.parse import main_entry
from training.utils.flags.steps import PPOArguments

LOGGED = ("score", "kl", "length", "eos_rate", "first_ratio_deviation", "clip_share", "approx_kl", "explained_variance")


def main(file: Path) -> None:
    """Run step 3; the clock starts with the first rollout, when all models are loaded."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    output = Path(settings["output"])
    clock = Clock(output, settings["snapshots"])

    class TimedTrainer(DeepSpeedPPOTrainer):
        def generate_experience(self, batch: PromptBatch, rollout: int = 1) -> Experience:
            clock.start()
            return super().generate_experience(batch, rollout)

        def train_rlhf(self, experience: Experience, rollout: int = 1) -> dict[str, float]:
            figures = super().train_rlhf(experience, rollout)
            shown = experience.figures | figures
            policy = self.engine.actor.module.model
            clock.rollout_done(rollout, policy.save_pretrained, {name: shown[name] for name in LOGGED if name in shown})
            return figures

    class WrittenPrompts(PromptBatches):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            if settings.get("prompts"):
                write_prompts(self, Path(settings["prompts"]))

    # The loop that users run is the one to measure; it has no hook of its own for a benchmark.
    step3.DeepSpeedPPOTrainer, step3.PromptBatches = TimedTrainer, WrittenPrompts
    main_entry(step3.main, PPOArguments, settings["flags"])


def write_prompts(prompts: PromptBatches, file: Path) -> None:
    """[rollout][row] -> token ids, as JSON; the file is there only once it is whole."""
    rows = [
        [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        for _, batch in prompts.after(0)
    ]
    part = file.with_suffix(".part")
    part.write_text(json.dumps(rows), encoding="utf-8")
    part.rename(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
