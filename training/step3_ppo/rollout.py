"""Choose the prompts of a rollout, sample answers, and let the four models judge them."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from errors import UserError
from inference.engine import check_finite, generate_many
from models.heads import at_last_token
from training.step3_ppo.experience import Experience
from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine
from training.utils.data.batching import Epochs, PromptBatch, collate_prompts
from training.utils.engine.weights import generation_model
from training.utils.run.loop import epochs_of, kept_size
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")

# Largest |log p(sampler) - log p(training forward)| of a rollout, in nats, that rounding explains.
SAMPLER_GAP, SAMPLER_GAP_HALF = 1e-3, 5e-2
TRUSTED_GAP = 1e-4  # up to here one may stand for the other


@dataclass
class SamplerState:
    """A run's knowledge of its sampler; the trainer owns it and keeps ``trusted`` in its checkpoints.

    trusted: at the start of the run the sampler's log-probabilities were those of the training forward; None: not known yet.
    checked: this process has compared them. warned_of_filter: it has told that top-p or top-k leaves tokens out.
    """

    trusted: bool | None = None
    checked: bool = False
    warned_of_filter: bool = False


class PromptBatches:
    """The prompts of each rollout. All processes get equally many; the order does not depend on their number.

    The last rollout of an epoch is filled up with prompts from the epoch's start, so that no process runs short. schedule: the
    rollouts of a run of this size from its start, which the learning rates go by.
    """

    def __init__(self, dataset, run: Run, args, pad_id: int) -> None:
        self.dataset, self.run, self.seed, self.pad_id = dataset, run, args.seed, pad_id
        self.lengths = list(dataset["length"])
        flags = args.per_device_generation_batch_size * args.generation_batches * run.world_size
        size = kept_size("rollout", args, run) or flags
        if size % run.world_size:
            raise UserError(
                f"The run that is resumed has {size} prompts a rollout, which {run.world_size} processes cannot share "
                "evenly; take a number of processes that divides it, or --allow generation_batches."
            )
        self.epochs, self.sizes = epochs_of("rollout", size, len(self.lengths), run)
        self.total = args.max_steps or self.epochs.total(len(self.lengths), args.num_train_epochs)
        self.schedule = args.max_steps or Epochs(size).total(len(self.lengths), args.num_train_epochs)

    def after(self, rollout: int) -> Iterator[tuple[int, PromptBatch]]:
        """Yield (number of the rollout from 1, this process's prompts) for the rollouts that follow the given one."""
        mixed = {"bucket": False, "fill": True}  # a rollout mixes all lengths
        for number, _, examples, _ in self.epochs.after(rollout, self.lengths, self.seed, **mixed):
            if number > self.total:
                return
            yield number, self.batch(examples)

    def batch(self, examples: list[int]) -> PromptBatch:
        """Return this process's share of the given examples, every n-th of them so that lengths are even."""
        earlier = times_before(examples)
        mine = range(self.run.rank, len(examples), self.run.world_size)
        rows = [self.dataset[examples[i]] | {"index": examples[i], "earlier": earlier[i]} for i in mine]
        return collate_prompts(rows, pad_id=self.pad_id).to(self.run.device)


def times_before(examples: Sequence[int]) -> list[int]:
    """Count for each example how often it stands in the list before."""
    seen: dict[int, itertools.count] = defaultdict(itertools.count)
    return [next(seen[example]) for example in examples]


def row_seed(seed: int, rollout: int, example: int, occurrence: int) -> int:
    """Return the seed that one answer is sampled with: the same whatever process or batch the prompt falls into."""
    digest = hashlib.sha256(f"{seed}/{rollout}/{example}/{occurrence}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def row_seeds(seed: int, rollout: int, prompts: PromptBatch, answers: int) -> list[int]:
    """Return one seed an answer, those to a prompt together. A prompt that stands in a rollout again, with this process or with
    another, goes on where its earlier answers stopped counting.
    """
    return [
        row_seed(seed, rollout, example, earlier * answers + answer)
        for example, earlier in zip(prompts.index.tolist(), prompts.earlier.tolist(), strict=True)
        for answer in range(answers)
    ]


def roll_out(
    engine: DeepSpeedRLHFEngine,
    prompts: PromptBatch,
    args,
    rollout: int,
    answers: int = 1,
    *,
    sampler: SamplerState,
    policy=None,
) -> Experience:
    """Sample so many answers to each of this process's prompts; returns the rows of all processes, not scored yet. The
    answers to one prompt stand together and have one number in ``group``.

    policy: the model that answers, the actor if not given. Under ZeRO-3 its weights are gathered once for all of them, or
    fetched layer by layer where they do not fit (--generation_weights).
    """
    engine.eval()
    seeds = row_seeds(args.seed, rollout, prompts, answers)
    # Groups are numbered over all processes, in the order in which the prompts were dealt.
    group = torch.arange(len(prompts.index), device=prompts.index.device) * engine.run.world_size + engine.run.rank
    mask = prompts.attention_mask
    left = int((mask.cumsum(1) > 0).int().argmax(1).min())  # columns that are padding in every row
    ids, mask = prompts.input_ids[:, left:], mask[:, left:]
    at_once = args.answers_at_once
    # The most that any batch of this run takes: the choice is made once, and the first batch may be a small one.
    largest = {"rows": at_once, "columns": args.max_prompt_seq_len + args.max_answer_seq_len}
    settings = {
        "max_new_tokens": args.max_answer_seq_len,
        "stop_token_ids": engine.template.stop_token_ids,
        "pad_token_id": engine.tokenizer.pad_token_id,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "stop_strings": args.stop_strings,
        "tokenizer": engine.tokenizer,
    }
    token_ids = [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]
    with generation_model(engine.actor if policy is None else policy, args, engine.run, **largest) as actor:
        generation = generate_many(
            actor.model, token_ids, max_batch=at_once, num_return_sequences=answers, row_seeds=seeds, **settings
        )
    if generation.filtered and not sampler.warned_of_filter:
        sampler.warned_of_filter = True
        logger.warning(
            "--top_p or --top_k leaves tokens out: answers are not drawn from the distribution that PPO's ratios are "
            "about; take them off for training."
        )
    ids, mask, index, numbers = (x.repeat_interleave(answers, dim=0) for x in (ids, mask, prompts.index, group))
    rows = Experience.from_generation(ids, mask, generation, index, engine.tokenizer.pad_token_id, numbers)
    gathered = rows.all_gather()
    check_finite(  # of all processes' rows, so that all of them stop
        gathered.log_probs,
        "its weights are broken, or --dtype fp16 overflows: --resume from an earlier checkpoint with lower learning rates, or "
        "take --dtype bf16 or fp32.",
    )
    # Gathered process by process; by group it is the order of the prompts, the same for any number of processes.
    return gathered.select(torch.argsort(gathered.group, stable=True))


def warn_of_sampler(gap: float, dtype: torch.dtype) -> None:
    """Warn if the sampler's log-probabilities are further from the training forward's than rounding explains (nats)."""
    limit = SAMPLER_GAP if dtype == torch.float32 else SAMPLER_GAP_HALF
    if not gap <= limit:
        logger.warning(
            f"the sampler's log-probabilities differ from the training forward's by up to {gap:.2g} nats, expected at most "
            f"{limit:g} with {str(dtype).removeprefix('torch.')}: answers are not drawn from the policy that is trained. "
            "Compare --attn_implementation eager and --dtype fp32; if it stays with both, report it."
        )


@torch.no_grad()
def complete_experience(
    engine: DeepSpeedRLHFEngine,
    experience: Experience,
    args,
    sampler: SamplerState,
    rollout: int = 1,
    *,
    with_values: bool = True,
) -> None:
    """Fill in old_log_probs, ref_log_probs, values (normalised; None without a critic or where nobody needs them yet),
    source_scores and scores (score_answers) of every row.

    Each process scores its share and the shares are added up, so all of them end with the same whole rollout. The actor runs
    through the engine that will train it - same kernels, same dtype - so that the first ratio is 1. From the second rollout
    on the sampler's log-probabilities take the place of that forward where the first look showed that they are the same
    (--old_log_probs). A resumed run looks again, only to warn, and keeps to what was found at first.
    """
    engine.eval()
    critic = engine.critic if with_values else None
    may_reuse = rollout > 1 and args.old_log_probs == "auto" and engine.run.dtype == torch.float32
    if may_reuse and sampler.trusted and sampler.checked:
        forward_policies(engine, experience, args, {"ref_log_probs": engine.ref}, critic)
        experience.old_log_probs = experience.log_probs
    else:
        forward_policies(engine, experience, args, {"old_log_probs": engine.actor, "ref_log_probs": engine.ref}, critic)
        # The weights changed nowhere in between: only rounding may separate the sampler from the training forward.
        gap = float((experience.old_log_probs - experience.log_probs).abs().where(experience.action_mask.bool(), 0.0).max())
        if not sampler.checked:
            sampler.checked = True
            warn_of_sampler(gap, engine.run.dtype)
        if sampler.trusted is None:
            sampler.trusted = gap <= TRUSTED_GAP and engine.run.dtype == torch.float32
        if may_reuse and sampler.trusted:
            experience.old_log_probs = experience.log_probs
        else:
            experience.sampler_gap = gap
    score_answers(engine, experience, args)


def forward_policies(
    engine: DeepSpeedRLHFEngine, experience: Experience, args, policies: dict[str, Any], critic: Any | None
) -> None:
    """Fill in the log-probabilities of policies (field -> model), and the critic's values if it is given."""
    count, width = experience.action_mask.shape
    fields = [*policies, *(["values"] if critic is not None else [])]
    token_fields = torch.zeros(len(fields), count, width, device=engine.run.device)
    for real, rows in experience.micro_batches(engine.run, args):
        joined, answer = rows.joined(), rows.action_mask.shape[1]
        outputs = [engine.answer_log_probs(model, joined) for model in policies.values()]
        if critic is not None:
            outputs.append(engine.answer_values(critic, joined))
        if real:
            mask = rows.action_mask[: len(real)]
            token_fields[:, real, :answer] = torch.stack(outputs)[:, : len(real)].where(mask, 0.0)
    if engine.run.world_size > 1:
        dist.all_reduce(token_fields)
    for name, values in zip(fields, token_fields, strict=True):
        setattr(experience, name, values)


@torch.no_grad()
def score_answers(engine: DeepSpeedRLHFEngine, experience: Experience, args) -> None:
    """Fill in source_scores [rows, sources] and scores [rows] of a rollout, the same on all processes.

    Raises RewardError, on all processes together, if a function or an endpoint fails on one of them.
    """
    rewards, run = engine.rewards, engine.run
    scores = torch.zeros(len(experience), len(rewards.names), device=run.device)
    mine: list[int] = []
    for real, rows in experience.micro_batches(run, args):
        mine += real
        if rewards.with_model:
            joined = rows.joined()
            mask = joined.attention_mask
            ends = mask.bool() & ~F.pad(mask[:, 1:], (0, 1)).bool()
            last = at_last_token(engine.reward(joined.input_ids, mask, read=ends), mask)
            scores[real, 0] = last[: len(real)].float()
    if rewards.outside:
        rows = experience.select(mine)
        outside = rewards.ask_outside(*engine.texts(rows), rows.ended.tolist(), run.world_size)
        scores[mine, len(rewards.names) - len(rewards.outside) :] = outside.to(run.device)
    if run.world_size > 1:
        dist.all_reduce(scores)
    experience.source_scores = scores
    experience.scores = rewards.total(scores, engine.reward_mean, engine.reward_std)
