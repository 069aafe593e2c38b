"""One training of benchmarks/ppo_learning.py by TRL 1.12.0's PPOTrainer, for an interpreter that has trl and nothing of ours.

    path/to/python -m benchmarks.ppo_learning_trl settings.json

settings.json: sft, reward (folders), reward_mean, reward_std, prompts (prompts.json of ours), output, snapshots, seed and
the hyperparameters of benchmarks.ppo_learning.Budget. What is set other than by TRL's defaults, and why:

- float32, no gradient checkpointing, fused AdamW, one forward for the whole rollout: the fastest that TRL has on a CPU;
- gradient_accumulation_steps 1, for with more of them TRL takes fewer optimizer steps than num_mini_batches says;
- an optimizer with two groups, so that policy and critic learn with the same rates as ours, on the same straight line down;
- our prompts in our order, in place of TRL's own shuffle;
- scores (and values) in units of the reward model's spread, which ours subtracts and divides by: TRL has no such option.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.ppo_learning_clock import Clock

LOGGED = {"score": "objective/scores", "kl": "objective/kl", "clip_share": "policy/clipfrac_avg"}


class Normalised(nn.Module):
    """A score head whose scores have mean 0 and spread 1, the statistics being those that step 2 stored."""

    def __init__(self, head: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.head, self.mean, self.std = head, mean, std

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., 1]."""
        return (self.head(hidden) - self.mean) / self.std


class ClockCallback(TrainerCallback):
    """Counts from the first rollout on, and keeps copies of the policy."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.trainer: PPOTrainer | None = None

    def on_train_begin(self, args, state, control, **more) -> None:
        """All models are loaded."""
        self.clock.start()

    def on_step_end(self, args, state, control, **more) -> None:
        """A rollout and its update are done."""
        history = state.log_history[-1] if state.log_history else {}
        figures = {name: history[key] for name, key in LOGGED.items() if key in history}
        self.clock.rollout_done(state.global_step, self.trainer.model.policy.save_pretrained, figures)


def read_prompts(file: Path, patience: float = 900.0) -> list[list[list[int]]]:
    """[rollout][row] -> token ids; ours, which runs beside, may not have written them yet. Seconds of patience."""
    until = time.monotonic() + patience
    while not file.is_file() and time.monotonic() < until:
        time.sleep(0.5)
    return json.loads(file.read_text(encoding="utf-8"))


def main(file: Path) -> None:
    """Train."""
    given = json.loads(file.read_text(encoding="utf-8"))
    rollouts = read_prompts(Path(given["prompts"]))
    rows = [row for rollout in rollouts for row in rollout]
    size, epochs = given["rollout_size"], given["epochs"]
    minibatches = size // given["minibatch"]

    tokenizer = AutoTokenizer.from_pretrained(given["sft"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(given["sft"], dtype=torch.float32) for _ in range(2))
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(given["reward"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    for model in (reward, critic):
        model.score = Normalised(model.score, given["reward_mean"], given["reward_std"])

    optimizer = torch.optim.AdamW(
        [
            {"params": list(policy.parameters()), "lr": given["actor_learning_rate"]},
            {"params": list(critic.parameters()), "lr": given["critic_learning_rate"]},
        ],
        betas=(0.9, given["adam_beta2"]), eps=1e-8, weight_decay=0.0, fused=True,
    )  # fmt: skip
    # TRL moves the rates once a rollout, ours at every optimizer step: the mean of ours over the rollout.
    steps = epochs * minibatches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: max(0.0, 1 - (update * steps + (steps - 1) / 2) / (given["rollouts"] * steps))
    )
    config = PPOConfig(
        output_dir=given["output"], use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False, seed=given["seed"],
        per_device_train_batch_size=size, gradient_accumulation_steps=1, num_mini_batches=minibatches,
        num_ppo_epochs=epochs, total_episodes=size * given["rollouts"], response_length=given["max_answer_seq_len"],
        local_rollout_forward_batch_size=size, temperature=1.0, kl_coef=given["kl_coef"], kl_estimator="k1",
        cliprange=0.2, cliprange_value=0.2, vf_coef=given["vf_coef"], gamma=1.0, lam=0.95, whiten_rewards=False,
        missing_eos_penalty=1.0, stop_token="eos", num_sample_generations=0,
    )  # fmt: skip
    callback = ClockCallback(Clock(Path(given["output"]), given["snapshots"]))
    dataset = Dataset.from_dict({"input_ids": rows})
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=critic, train_dataset=dataset, eval_dataset=dataset.select(range(min(8, len(dataset)))),
        optimizers=(optimizer, schedule), callbacks=[callback],
    )  # fmt: skip
    callback.trainer = trainer
    trainer.dataloader = DataLoader(dataset, batch_size=size, shuffle=False, collate_fn=trainer.data_collator)
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
