"""PPO on whole rollouts: experience with advantages, then epochs of minibatches over it."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.step3_ppo import objectives
from training.step3_ppo.advantages import (
    equal_groups,
    explained_variance,
    gae,
    grpo,
    rewards_to_come,
    rloo,
    whiten,
)
from training.step3_ppo.experience import Experience, plan_minibatches
from training.step3_ppo.health import Health
from training.step3_ppo.pretraining_mix import PretrainingMix
from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine
from training.step3_ppo.rollout import SamplerState, complete_experience, roll_out
from training.utils.data.batching import PromptBatch
from training.utils.engine.step import Accumulation, optimizer_metrics, step_together
from training.utils.run.loop import kept_size
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")


class DeepSpeedPPOTrainer:
    """Two calls a rollout: ``generate_experience(batch)`` and ``train_rlhf(experience)``.

    Every process holds the whole rollout after the first call: advantages are whitened over all of it and the minibatches
    are the same for any number of processes. kl_coef moves with --kl_target; it and what the health warnings remember are
    the trainer's state, which a checkpoint keeps.
    """

    def __init__(self, rlhf_engine: DeepSpeedRLHFEngine, args, mixture: PretrainingMix | None = None) -> None:
        self.engine = rlhf_engine
        self.mixture = mixture
        self.args = args
        self.run = rlhf_engine.run
        self.kl_coef = args.kl_coef
        self.text_read = 0  # blocks of the mixture's text so far
        self.sampler = SamplerState()
        self.health = Health(half=self.run.dtype != torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, as JSON."""
        own = {"kl_coef": self.kl_coef, "kl_coef_flag": self.args.kl_coef, "text_read": self.text_read}
        return own | {"sampler_trusted": self.sampler.trusted, "health": self.health.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from state_dict()."""
        if state.get("kl_coef_flag", self.args.kl_coef) == self.args.kl_coef:  # else --allow kl_coef sets it anew
            self.kl_coef = state["kl_coef"]
        # Older checkpoints have optimizer steps instead.
        self.text_read = state.get("text_read", state.get("actor_steps", 0) * self.run.sizes.get("minibatch", 0))
        self.health.load_state_dict(state["health"])
        self.sampler.trusted = state.get("sampler_trusted")

    def generate_experience(self, batch: PromptBatch, rollout: int = 1) -> Experience:
        """Sample answers to this process's prompts, score them with all models, and assign advantages, unless the values that
        they need come from the update.

        rollout counts from 1 and seeds the sampling.
        """
        answers = self.args.num_return_sequences
        experience = roll_out(self.engine, batch, self.args, rollout, answers, sampler=self.sampler)
        later = self._values_from_update(len(experience))
        complete_experience(self.engine, experience, self.args, self.sampler, rollout, with_values=not later)
        assign_advantages(experience, self.engine, self.args, self.kl_coef)
        return experience

    def _values_from_update(self, rows: int) -> bool:
        """Tell whether the forward pass that the critic learns by also gives the values of the rollout: it does where the whole
        rollout is one optimizer step, whose critic then goes first.
        """
        args = self.args
        one_step = args.ppo_epochs == 1 and rows <= minibatch_size(args, self.run)
        return self.engine.critic is not None and one_step and args.critic_dropout == 0

    def train_rlhf(self, experience: Experience, rollout: int = 1) -> dict[str, float]:
        """Train actor and critic for --ppo_epochs over the rollout, the critic alone during its warm-up.

        Returns the metrics of the update, means over its minibatches, and moves the KL coefficient for the next rollout.
        """
        args, run = self.args, self.run
        actor_learns = rollout > args.critic_warmup_rollouts
        for trained in self.engine.trained.values():
            trained.train()
        size = minibatch_size(args, run)
        plan = [
            rows
            for epoch in range(args.ppo_epochs)
            for rows in plan_minibatches(len(experience), size, seed=args.seed, rollout=rollout, epoch=epoch)
        ]
        sums: dict[str, float] = defaultdict(float)
        update: dict[str, float] = {"optimizer_steps": 0}
        for rows in plan:
            metrics = self._train_minibatch(experience.select(rows), actor_learns)
            deviation = metrics.pop("ratio_deviation", None)
            if update["optimizer_steps"] == 0 and deviation is not None:
                update["first_ratio_deviation"] = run.maximum(deviation)
            update["optimizer_steps"] += 1
            for name, value in metrics.items():
                sums[name] += value
            # The metric is a sum over all processes: all of them leave together.
            if args.max_approx_kl and metrics.get("approx_kl", 0.0) > args.max_approx_kl:
                break
        update |= {name: value / update["optimizer_steps"] for name, value in sums.items()}
        if args.kl_target and actor_learns:
            kl = experience.metrics["kl"]
            self.kl_coef = objectives.adapted_kl_coef(self.kl_coef, kl, args.kl_target, len(experience), args.kl_horizon)
        for warning in self.health.check(rollout, experience.metrics | update):
            logger.warning("rollout %d: %s", rollout, warning)
        return update

    def _train_minibatch(self, minibatch: Experience, actor_learns: bool) -> dict[str, float]:
        """Step the critic once, where there is one, and the actor, where it learns. Returns metrics over all processes, but
        for ratio_deviation, which is this one's.
        """
        actor, critic = self.engine.actor, self.engine.critic
        denominator = objectives.loss_denominator(minibatch.action_mask, self.args.loss_reduction)
        learning = [actor] * actor_learns + [critic] * (critic is not None)
        together = self.args.align_overflow and len(learning) == 2
        metrics: dict[str, float] = {}
        if critic is not None:
            metrics["critic_loss"] = self._critic_gradients(minibatch, denominator)
            metrics |= minibatch.metrics
            if not together:
                critic.step()
        if actor_learns:
            micro_batches = [rows for _, rows in minibatch.micro_batches(self.run, self.args)]
            metrics |= self._actor_gradients(micro_batches, denominator, tokens=float(minibatch.action_mask.sum()))
            if not together:
                actor.step()
        if together:
            step_together(learning)
        for role, engine in self.engine.trained.items():
            if engine in learning:
                metrics |= {f"{role}_{name}": value for name, value in optimizer_metrics(engine).items()}
        if actor_learns and self.engine.actor_ema:
            self.engine.actor_ema.update()
        return metrics

    def _actor_gradients(self, micro_batches: list[Experience], denominator: float, tokens: float) -> dict[str, float]:
        """Accumulate the gradients of the PPO loss and of the text beside it. Returns metrics as _train_minibatch does."""
        run, actor, coef = self.run, self.engine.actor, self.args.unsup_coef
        text = self.mixture.micro_batches(self.text_read) if self.mixture else []
        gradients = Accumulation(actor, len(micro_batches) + len(text), run)
        sums: dict[str, float] = defaultdict(float)
        deviation, text_loss = 0.0, 0.0
        for micro in micro_batches:
            loss, metrics = self._actor_loss(micro, denominator)
            gradients.backward(loss)
            deviation = max(deviation, metrics.pop("ratio_deviation"))
            for name, value in metrics.items():
                sums[name] += value
        for micro in text:
            loss = self.mixture.loss(actor, micro)
            gradients.backward(coef * loss)
            text_loss += loss.detach()
        self.text_read += self.mixture.size if self.mixture else 0
        metrics = {"actor_loss": gradients.total()}
        if self.mixture:
            metrics["text_loss"] = run.sum(float(text_loss))[0]
            metrics["actor_loss"] -= coef * metrics["text_loss"]
        totals = run.sum(*sums.values())
        metrics |= {name: total / max(tokens, 1.0) for name, total in zip(sums, totals, strict=True)}
        return metrics | {"ratio_deviation": deviation}

    def _actor_loss(self, micro: Experience, denominator: float) -> tuple[Tensor, dict[str, float]]:
        """Return the actor's loss on a micro-batch, and the sums over its tokens that the log shows."""
        bonus = self.args.entropy_coef > 0
        outputs = self.engine.answer_log_probs(self.engine.actor, micro.joined(), with_entropy=bonus)
        log_probs, entropy = outputs if bonus else (outputs, None)
        return objectives.actor_loss(log_probs, entropy, micro, denominator, self.kl_coef, self.args)

    def _critic_gradients(self, minibatch: Experience, denominator: float) -> float:
        """Accumulate the gradients of the clipped value loss; returns the loss. Where the rollout has no values yet, they are those
        of this pass, and the advantages follow from them.
        """
        args, run, critic = self.args, self.run, self.engine.critic
        values = torch.zeros_like(minibatch.rewards) if minibatch.values is None else None
        micro_batches = minibatch.micro_batches(run, args)
        gradients = Accumulation(critic, len(micro_batches), run)
        for real, micro in micro_batches:
            mask = micro.action_mask
            now = self.engine.answer_values(critic, micro.joined())
            if values is not None:
                micro.values = now.detach().float().where(mask, 0.0)
                micro.returns = gae(micro.rewards, micro.values, mask, args.gamma, args.lam)[1]
                values[real, : mask.shape[1]] = micro.values[: len(real)]
            gradients.backward(self._critic_loss(now, micro, denominator))
        if values is not None:
            if run.world_size > 1:
                dist.all_reduce(values)
            minibatch.values = values
            estimate_advantages(minibatch, args)
        return gradients.total()

    def _critic_loss(self, values: Tensor, micro: Experience, denominator: float) -> Tensor:
        """Return the clipped value loss of the values [rows, answer] of a micro-batch."""
        limits = {"clip": self.args.cliprange_value, "reduction": self.args.loss_reduction}
        return objectives.value_loss(values, micro.values, micro.returns, micro.action_mask, denominator, **limits)


def minibatch_size(args, run: Run) -> int:
    """Return the rows of one optimizer step over all processes; of a run that is resumed what it began with."""
    flags = args.per_device_training_batch_size * args.gradient_accumulation_steps * run.world_size
    return kept_size("minibatch", args, run) or flags


def assign_advantages(experience: Experience, engine: DeepSpeedRLHFEngine, args, kl_coef: float | None = None) -> None:
    """Assign rewards (score at the end, KL penalty on every token if it belongs there), then advantages over the whole rollout.

    Sets rewards and advantages, with a critic returns too, and the metrics that the log shows; without the critic's values no
    advantages yet. kl_coef: where it is not --kl_coef any more.
    """
    mask = experience.action_mask
    coef = args.kl_coef if kl_coef is None else kl_coef
    scores, _ = objectives.normalize_scores(experience.scores, *engine.score_unit, clip=0.0)
    scores = objectives.missing_end_penalty(scores, experience.ended, args.missing_eos_penalty)
    lengths = experience.answer_lengths
    scores = objectives.overlong_penalty(scores, lengths, args.max_answer_seq_len, args.overlong_tokens, args.overlong_penalty)
    scores, clipped = objectives.normalize_scores(scores, 0.0, 1.0, args.clip_reward_value)
    policies = (experience.old_log_probs, experience.ref_log_probs, mask)
    in_reward = coef if args.kl_in == "reward" else 0.0
    rewards = objectives.shaped_rewards(scores, *policies, in_reward)
    total = rewards.sum(1).mean()
    experience.rewards = whiten(rewards, mask, keep_mean=True) if args.whiten_rewards else rewards
    experience.metrics = {
        "score": float(experience.scores.mean()),
        **engine.rewards.metrics(experience),
        "reward": float(total),
        "score_clipped_share": float(clipped),
        "kl": float(objectives.kl_estimate(*policies).sum(1).mean()),
        "kl_coef": coef,
        "length": float(lengths.float().mean()),
        "eos_rate": float(experience.ended.float().mean()),
    }
    if experience.sampler_gap is not None:
        experience.metrics["sampler_gap"] = experience.sampler_gap
    if experience.values is not None or not args.has_critic:
        estimate_advantages(experience, args)


def estimate_advantages(experience: Experience, args) -> None:
    """Turn rewards into advantages (and returns) by the method of --advantage, with its metrics."""
    rewards, mask, metrics = experience.rewards, experience.action_mask, experience.metrics
    if args.advantage == "gae":
        advantages, experience.returns = gae(rewards, experience.values, mask, args.gamma, args.lam)
        metrics["value"] = float(objectives.masked_mean(experience.values, mask))
        metrics["explained_variance"] = float(explained_variance(experience.values, experience.returns, mask))
    elif args.advantage == "reinforce++":
        advantages = rewards_to_come(rewards, mask, args.gamma)
    else:
        advantages = {"grpo": grpo, "rloo": rloo}[args.advantage](rewards, mask, experience.group)
        metrics["equal_groups"] = float(equal_groups(rewards, mask, experience.group))
    metrics["advantage"] = float(objectives.masked_mean(advantages, mask))
    if args.whiten_advantages and args.advantage in ("gae", "reinforce++"):
        advantages = whiten(advantages, mask)
    experience.advantages = advantages
