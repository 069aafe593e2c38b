"""PPO on whole rollouts: experience with advantages, then epochs of minibatches over it."""

from __future__ import annotations

from collections import defaultdict

import torch

from training.step3_ppo.experience import Experience, plan_minibatches
from training.step3_ppo.objectives import (
    explained_variance,
    gae,
    masked_mean,
    missing_end_penalty,
    normalize_scores,
    policy_loss,
    shaped_rewards,
    value_loss,
    whiten,
)
from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine
from training.step3_ppo.rollout import roll_out, score_rollout
from training.utils.data.batching import PromptBatch, plan_micro_batches
from training.utils.zero import optimizer_figures, optimizer_step


class DeepSpeedPPOTrainer:
    """Two calls a rollout: ``generate_experience(batch)`` and ``train_rlhf(experience)``.

    Every process holds the whole rollout after the first call: advantages are whitened over all of it and the minibatches
    are the same for any number of processes.
    """

    def __init__(self, rlhf_engine: DeepSpeedRLHFEngine, args) -> None:
        self.engine = rlhf_engine
        self.args = args
        self.run = rlhf_engine.run

    def generate_experience(self, batch: PromptBatch, rollout: int = 1) -> Experience:
        """Sample answers to this process's prompts, score them with all four models, and assign advantages.

        rollout counts from 1 and seeds the sampling.
        """
        experience = roll_out(self.engine, batch, self.args, rollout)
        score_rollout(self.engine, experience, self.args)
        assign_advantages(experience, self.engine, self.args)
        return experience

    def train_rlhf(self, experience: Experience, rollout: int = 1) -> dict[str, float]:
        """Train actor and critic for --ppo_epochs over the rollout. Returns the figures of the update."""
        args, run = self.args, self.run
        self.engine.actor.train()
        self.engine.critic.train()
        size = minibatch_size(args, run.world_size)
        sums: dict[str, float] = defaultdict(float)
        first_ratio = None
        for epoch in range(args.ppo_epochs):
            for rows in plan_minibatches(len(experience), size, seed=args.seed, rollout=rollout, epoch=epoch):
                minibatch = experience.select(rows)
                denominator = float(minibatch.action_mask.sum())
                micro_batches = self._micro_batches(minibatch)
                found: list[dict[str, float]] = []

                def actor_loss(micro: Experience, denominator=denominator, found=found):
                    log_probs = self.engine.actor(
                        micro.input_ids,
                        micro.attention_mask,
                        keep=micro.action_mask.shape[1],
                        temperature=args.temperature,
                    )
                    loss, figures = policy_loss(
                        log_probs,
                        micro.old_log_probs,
                        micro.advantages,
                        micro.action_mask,
                        denominator,
                        clip_low=args.cliprange,
                        clip_high=args.cliprange,
                    )
                    found.append(figures)
                    return loss

                def critic_loss(micro: Experience, denominator=denominator):
                    answer = micro.action_mask.shape[1]
                    prompt = micro.input_ids.shape[1] - answer
                    values = self.engine.values(self.engine.critic, micro.input_ids, micro.attention_mask)
                    return value_loss(
                        values[:, prompt - 1 : prompt + answer - 1],
                        micro.values,
                        micro.returns,
                        micro.action_mask,
                        denominator,
                        clip=args.cliprange_value,
                    )

                sums["actor_loss"] += optimizer_step(self.engine.actor, micro_batches, actor_loss, run)
                sums["critic_loss"] += optimizer_step(self.engine.critic, micro_batches, critic_loss, run)
                for role, trained in (("actor", self.engine.actor), ("critic", self.engine.critic)):
                    for name, value in optimizer_figures(trained).items():
                        sums[f"{role}_{name}"] += value
                sums["minibatches"] += 1
                names = ("clip_share", "approx_kl", "ratio")
                for name, value in zip(names, run.sum(*(sum(f[name] for f in found) for name in names)), strict=True):
                    sums[name] += value / max(denominator, 1.0)
                if first_ratio is None:
                    first_ratio = run.maximum(max(f["ratio_deviation"] for f in found))
        count = sums.pop("minibatches")
        return {name: value / count for name, value in sums.items()} | {"first_ratio_deviation": first_ratio}

    def _micro_batches(self, minibatch: Experience) -> list[Experience]:
        """This process's share of a minibatch, cut by rows or by tokens; a filler row has an empty action mask."""
        budget = self.args.max_tokens_per_device or None
        per_device = None if budget else self.args.per_device_training_batch_size
        plan = plan_micro_batches(minibatch.total_lengths(), self.run.world_size, per_device, budget)[self.run.rank]
        micro_batches = []
        for positions in plan:
            micro = minibatch.select([max(position, 0) for position in positions]).trimmed()
            real = torch.tensor([position >= 0 for position in positions], device=micro.action_mask.device)
            micro.action_mask = micro.action_mask & real[:, None]
            micro_batches.append(micro)
        return micro_batches


def minibatch_size(args, world_size: int) -> int:
    """Rows of one optimizer step over all processes."""
    return args.per_device_training_batch_size * args.gradient_accumulation_steps * world_size


def assign_advantages(experience: Experience, engine: DeepSpeedRLHFEngine, args) -> None:
    """Rewards (normalised score at the end, KL penalty on every token), GAE, whitening over the whole rollout.

    Sets rewards, advantages and returns, and the figures that the log shows.
    """
    mask = experience.action_mask
    scores, _ = normalize_scores(experience.scores, engine.reward_mean, engine.reward_std, clip=0.0)
    scores = missing_end_penalty(scores, experience.ended, args.missing_eos_penalty)
    scores, clipped = normalize_scores(scores, 0.0, 1.0, args.clip_reward_value)
    experience.rewards = shaped_rewards(scores, experience.old_log_probs, experience.ref_log_probs, mask, args.kl_coef)
    advantages, experience.returns = gae(experience.rewards, experience.values, mask, args.gamma, args.lam)
    experience.advantages = whiten(advantages, mask) if args.whiten_advantages else advantages
    kl = (experience.old_log_probs - experience.ref_log_probs).where(mask.bool(), 0.0).sum(1)
    experience.figures = {
        "score": float(experience.scores.mean()),
        "reward": float(experience.rewards.sum(1).mean()),
        "score_clipped_share": float(clipped),
        "kl": float(kl.mean()),
        "length": float(experience.response_lengths.float().mean()),
        "eos_rate": float(experience.ended.float().mean()),
        "value": float(masked_mean(experience.values, mask)),
        "advantage": float(masked_mean(advantages, mask)),
        "explained_variance": float(explained_variance(experience.values, experience.returns, mask)),
        "sampler_gap": experience.sampler_gap,
    }
