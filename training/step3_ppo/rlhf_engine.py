"""The four models of PPO: actor and critic, which learn; reference and reward model, which do not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from models.adapters.lora import add_lora
from models.adapters.shared_trunk import SharedTrunk, check_scorer
from models.checkpoint_folder import (
    CheckpointFolder,
    check_context_length,
    check_new_tokens,
    check_quantized_base,
    first_new_row,
    gets_prefix,
    open_checkpoint,
)
from models.heads import TokenLogProbs, TokenScores
from models.load import load_causal_lm, load_scalar_model
from models.templates import load_template
from models.tokenizer import check_same_tokenizer, load_tokenizer
from training.step3_ppo.ema import MovingAverage
from training.step3_ppo.experience import Experience, JoinedRows
from training.step3_ppo.scoring import Rewards
from training.utils.engine.build import build_engine, build_frozen, read_in_turn
from training.utils.engine.configs import EngineOptions, frozen_config
from training.utils.run.inputs import check_roles
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")


class DeepSpeedRLHFEngine:
    """Builds and holds the models of step 3.

    actor        learns to answer; starts from the SFT model
    ref          the SFT model, frozen: the actor must not stray far from it. Without the new prefix of
                 --actor_pre_seq_len; with the prefix that the SFT model itself has
    critic       learns to predict the reward; starts from the reward model, head included. None with an --advantage that
                 has none
    reward       the reward model, frozen; None with --reward_model false

    With --memory_mode shared the weights are in memory once, in ref; the others use them (models/adapters/shared_trunk.py).

    actor_ema is the moving average of the actor's weights; None without --enable_ema.
    rewards is what scores the answers: the reward model, and functions and endpoints beside it or in its place.
    actor and critic are DeepSpeed engines; ref and reward are plain modules, or engines when their trained twin is under ZeRO-3.
    num_total_iters is the number of optimizer steps of the whole run, for the learning-rate schedules; actor_total_iters
    the actor's, where the critic's warm-up leaves it fewer.
    """

    def __init__(
        self,
        actor_model_name_or_path: str | CheckpointFolder,
        critic_model_name_or_path: str | CheckpointFolder | None,
        tokenizer,
        num_total_iters: int,
        args,
        run: Run | None = None,
        rewards: Rewards | None = None,
        actor_total_iters: int | None = None,
    ) -> None:
        self.args = args
        self.rewards = rewards or Rewards(args)
        self.run = run or Run.start(args)
        self.tokenizer = tokenizer
        paths = {"actor": actor_model_name_or_path, "critic": critic_model_name_or_path}
        self.checkpoints = {role: open_checkpoint(paths[role]) for role in args.models}
        self.template = load_template(self.checkpoints["actor"], tokenizer)
        self.trunk: SharedTrunk | None = None
        reference = self._causal_lm(**self._on_host(args.offload_reference_model))
        self.ref = self._frozen(TokenLogProbs(reference), "actor", args.offload_reference_model)
        if args.memory_mode == "shared":
            self.trunk = SharedTrunk(reference, self.checkpoints["actor"].path)
        self.reward, self.reward_mean, self.reward_std = None, 0.0, 1.0
        if self.rewards.with_model:
            reward = self._scalar_model(**self._on_host(args.offload_reward_model))
            self.reward_mean, self.reward_std = score_unit(reward.config, args.normalize_reward)
            self.reward = self._frozen(TokenScores(reward), "critic", args.offload_reward_model)
        actor = self._causal_lm(gradient_checkpointing=args.actor_gradient_checkpointing, **args.prefix_options("actor"))
        self.actor = self._trained(actor, TokenLogProbs, "actor", actor_total_iters or num_total_iters)
        self.actor_ema = MovingAverage(self.actor, args.ema_decay, self.run) if args.enable_ema else None
        self.critic = None
        if args.has_critic:
            checkpointing = args.critic_gradient_checkpointing
            critic = self._scalar_model(gradient_checkpointing=checkpointing, **args.prefix_options("critic"))
            if self.reward is None and getattr(critic.config, "reward_std", None):  # its head has the unit it was trained in
                self.reward_mean, self.reward_std = score_unit(critic.config, args.normalize_reward)
            self.critic = self._trained(critic, TokenScores, "critic", num_total_iters)

    def _causal_lm(self, **options):
        """Load reference or actor; under --memory_mode shared only the first one has weights of its own."""
        if self.trunk is not None:
            return self.trunk.causal_lm(gradient_checkpointing=options["gradient_checkpointing"])
        return read_in_turn(load_causal_lm, self.checkpoints["actor"], self.run, self._loading("actor") | options)

    def _scalar_model(self, **options):
        """Load reward model or critic."""
        if self.trunk is not None:
            checkpointing = options.get("gradient_checkpointing", False)
            fresh = {"dropout": self.args.critic_dropout, "seed": self.args.seed}
            return self.trunk.scalar_model(self.checkpoints["critic"].path, gradient_checkpointing=checkpointing, **fresh)
        return read_in_turn(load_scalar_model, self.checkpoints["critic"], self.run, self._loading("critic") | options)

    def _loading(self, role: str) -> dict[str, Any]:
        """Return how both models of a role are read. They have the same base, so the penalty starts at zero."""
        return {
            "dtype": self.run.dtype,
            "attn": self.run.attention,
            "dropout": getattr(self.args, f"{role}_dropout"),
            "tokenizer": self.tokenizer,
            "quantization_bit": self.args.quantization_bit if is_adapted(self.args, role, self.checkpoints[role]) else 0,
            "ptuning_checkpoint": getattr(self.args, f"{role}_ptuning_checkpoint"),
            "seed": self.args.seed,
            "zero3_config": EngineOptions.of(self.args, role).loading_config(self.run),
        }

    def _on_host(self, offload: bool) -> dict[str, Any]:
        """Split a frozen model that stays in host memory while it is read, not once all processes have it whole."""
        return {"zero3_config": frozen_config(self.run, offload=True)} if offload else {}

    def _trained(self, model, head, role: str, steps: int):
        if dim := getattr(self.args, f"{role}_lora_dim"):
            alpha, names = getattr(self.args, f"{role}_lora_alpha"), getattr(self.args, f"{role}_lora_module_name")
            new = first_new_row(self.checkpoints[role], self.tokenizer)
            model = add_lora(model, dim=dim, alpha=alpha, module_name=names, first_new_row=new)
        return build_engine(head(model), EngineOptions.of(self.args, role), self.run, steps)

    def _frozen(self, model, role: str, offload: bool):
        return build_frozen(model, self.run, stage=getattr(self.args, f"{role}_zero_stage"), offload=offload)

    def values(self, model, input_ids: Tensor, attention_mask: Tensor, read: Tensor | None = None) -> Tensor:
        """Return scores [batch, time] of reward model or critic in units of the reward model's own spread, mean zero. read
        [batch, time] bool: only these are asked for.
        """
        return (model(input_ids, attention_mask, read=read) - self.reward_mean) / self.reward_std

    def answer_values(self, model, rows: JoinedRows) -> Tensor:
        """Return [rows, answer]: the values before each answer token; of padding anything."""
        before = F.pad(rows.answer_mask[:, 1:], (0, 1))
        return rows.before_answers(self.values(model, rows.input_ids, rows.attention_mask, before))

    def answer_log_probs(self, model, rows: JoinedRows, with_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return [rows, answer]: log-probabilities of the answer tokens at the sampling temperature, of padding anything.
        with_entropy: also the entropies of the distributions that they were drawn from.
        """
        options = {"target_mask": rows.answer_mask, "temperature": self.args.temperature, "with_entropy": with_entropy}
        outputs = model(rows.input_ids, rows.attention_mask, **options)
        # Column j of what the model returns is about token j + 1.
        return tuple(map(rows.before_answers, outputs)) if with_entropy else rows.before_answers(outputs)

    def texts(self, experience: Experience) -> tuple[list[str], list[str]]:
        """Return prompts (as the template wrote them, without special tokens) and answers (Template.decode_answer) of all rows."""
        width, actions = experience.prompt_width, experience.action_mask.bool()
        prompts, answers = [], []
        for ids, real, acts in zip(experience.input_ids, experience.attention_mask.bool(), actions, strict=True):
            prompts.append(self.tokenizer.decode(ids[:width][real[:width]].tolist(), skip_special_tokens=True))
            answers.append(self.template.decode_answer(self.tokenizer, ids[width:][acts].tolist()))
        return prompts, answers

    @property
    def trained(self) -> dict[str, Any]:
        """The engines that learn, by role: actor and, where there is one, critic."""
        return {"actor": self.actor} | ({} if self.critic is None else {"critic": self.critic})

    @property
    def score_unit(self) -> tuple[float, float]:
        """Mean and standard deviation that Experience.scores are still to be normalised with."""
        return (self.reward_mean, self.reward_std) if self.rewards.model_alone else (0.0, 1.0)

    def eval(self) -> None:
        """Put all models into evaluation mode: whatever is compared with something else is computed without dropout."""
        for model in (self.actor, self.critic, self.ref, self.reward):
            if model is not None:
                model.eval()


def has_prefix(args, role: str, checkpoint: CheckpointFolder) -> bool:
    """Tell whether the trained model of a role gets a prefix (P-Tuning), new or saved."""
    return gets_prefix(checkpoint, Path(args.output_dir) / role, **args.prefix_options(role))


def is_adapted(args, role: str, checkpoint: CheckpointFolder) -> bool:
    """Tell whether the trained model of a role is a frozen base and something small over it: LoRA or a prefix."""
    return bool(getattr(args, f"{role}_lora_dim")) or has_prefix(args, role, checkpoint)


def check_models(args, models: dict[str, CheckpointFolder], tokenizer) -> None:
    """Raise UserError if the models cannot play the parts that the flags give them. Reads no weights of 16 or 32 bits.

    models: those of args.models.
    """
    actor, critic = models["actor"], models.get("critic")
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    for role, checkpoint in models.items():
        flags = "--max_prompt_seq_len + --max_answer_seq_len ="
        check_context_length(checkpoint, longest, flags, **args.prefix_options(role))
    if critic is not None:
        check_same_tokenizer(tokenizer, load_tokenizer(critic), (actor.path, critic.path))
    check_roles(args, models)
    for role, checkpoint in models.items():
        if args.memory_mode == "shared" and has_prefix(args, role, checkpoint):
            raise UserError(
                f"--memory_mode shared: {checkpoint.path} has a prefix (P-Tuning), which cannot be shared; take --memory_mode "
                "separate."
            )
        if args.memory_mode == "shared" and role == "critic" and checkpoint.adapters:
            raise UserError(
                f"--memory_mode shared: {checkpoint.path} is an adapter alone; name the folder of the merged reward model, in "
                "which step 2 wrote it, or take --memory_mode separate."
            )
        adapted = is_adapted(args, role, checkpoint)
        check_quantized_base(checkpoint, args.quantization_bit if adapted else 0, adapters=adapted)
        if has_prefix(args, role, checkpoint):
            check_new_tokens(checkpoint, tokenizer)
    if args.memory_mode == "shared" and critic is not None:
        check_scorer(critic, actor)


def score_unit(config, normalize: bool) -> tuple[float, float]:
    """Return mean and standard deviation of the reward model's scores as step 2 stored them; (0, 1) if there are none."""
    mean, std = getattr(config, "reward_mean", None), getattr(config, "reward_std", None)
    if not normalize:
        return 0.0, 1.0
    if mean is None or std is None:
        logger.warning(
            "The reward model stores no reward_mean and reward_std (step 2 writes them); its raw scores are used."
        )
        return 0.0, 1.0
    return float(mean), max(float(std), 1e-6)
