"""A PPO trainer of tiny models in this process, for tests of what happens around the loop."""

from __future__ import annotations

from pathlib import Path

import torch

from models.load import load_scalar_model, load_tokenizer
from models.save import save_model
from models.templates import load_template
from tests.tiny import tiny_checkpoint
from training.step3_ppo.ppo_trainer import DeepSpeedPPOTrainer
from training.step3_ppo.pretraining_mix import PretrainingMix
from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine, check_models
from training.step3_ppo.scoring import Rewards
from training.utils.data.batching import collate_prompts
from training.utils.flags.parse import parse
from training.utils.flags.steps import PPOArguments
from training.utils.run.process_group import Run


def write_models(folder: Path) -> tuple[Path, Path]:
    """An actor and a reward model, saved."""
    actor = tiny_checkpoint(folder / "actor", "llama")
    tokenizer = load_tokenizer(actor)
    reward = load_scalar_model(actor, dtype=torch.float32, seed=5)
    reward.config.update({"reward_mean": 0.3, "reward_std": 1.7})
    save_model(reward, tokenizer, load_template(actor, tokenizer), folder / "reward")
    return actor, folder / "reward"


def build(models: tuple[Path, Path], output: Path, *flags: str) -> DeepSpeedPPOTrainer:
    """A trainer; each of its rollouts is one optimizer step unless the flags say otherwise."""
    args = parse(PPOArguments, [
        "--actor_model_name_or_path", str(models[0]), "--critic_model_name_or_path", str(models[1]), "--dtype", "fp32",
        "--data_path", "unused.jsonl", "--output_dir", str(output), "--max_prompt_seq_len", "9", "--max_answer_seq_len", "7",
        "--num_warmup_steps", "0", "--per_device_generation_batch_size", "4", "--per_device_training_batch_size", "4",
        "--actor_learning_rate", "1e-3", "--critic_learning_rate", "1e-3", *flags,
    ])  # fmt: skip
    tokenizer = load_tokenizer(models[0])
    run = Run.start(args)
    size = args.per_device_training_batch_size * args.gradient_accumulation_steps
    mixture = PretrainingMix.of(args, run, tokenizer, load_template(models[0], tokenizer), size)
    check_models(args, Rewards(args), tokenizer)
    engine = DeepSpeedRLHFEngine(str(models[0]), str(models[1]), tokenizer, 10, args, run=run)
    return DeepSpeedPPOTrainer(engine, args, mixture)


def rollout(trainer: DeepSpeedPPOTrainer, number: int):
    """Experience from four ragged prompts."""
    generator = torch.Generator().manual_seed(2)
    rows = [
        {"prompt_ids": torch.randint(5, 300, (2 + row,), generator=generator).tolist(), "index": row} for row in range(4)
    ]
    batch = collate_prompts(rows, pad_id=trainer.engine.tokenizer.pad_token_id)
    return trainer.generate_experience(batch, number)
