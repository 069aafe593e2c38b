"""A PPO trainer of tiny models in this process, for tests of what happens around the loop."""

from pathlib import Path

import torch

from inference.engine import Generation
from models.checkpoint_folder import open_checkpoint
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.tiny import tiny_checkpoint, tiny_reward_model
from training.step3_ppo.experience import Experience
from training.step3_ppo.ppo_trainer import DeepSpeedPPOTrainer, assign_advantages
from training.step3_ppo.pretraining_mix import PretrainingMix
from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine, check_models
from training.step3_ppo.rollout import complete_experience
from training.utils.data.batching import PromptBatch, collate_prompts
from training.utils.flags.parse import parse
from training.utils.flags.steps import PPOArguments
from training.utils.run.process_group import Run

MEAN, STD = 0.3, 1.7  # of the reward model's scores


def write_models(folder: Path) -> tuple[Path, Path]:
    """An actor whose checkpoint asks for greedy answers, which must not matter, and a reward model with statistics."""
    actor = tiny_checkpoint(folder / "actor", "llama")
    reward = tiny_reward_model(actor, folder / "reward", seed=5, reward_mean=MEAN, reward_std=STD)
    (actor / "generation_config.json").write_text('{"do_sample": false, "top_k": 1, "repetition_penalty": 5.0}')
    return actor, reward


FLAGS = (
    "--dtype fp32 --data_path unused.jsonl --max_prompt_seq_len 9 --max_answer_seq_len 7 --num_warmup_steps 0 "
    "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 --actor_learning_rate 1e-3 "
    "--critic_learning_rate 1e-3"
)


def parsed(*flags: str) -> PPOArguments:
    """Arguments of step 3 from flags, of which several may stand in one string."""
    words = [word for flag in flags for word in (flag.split() if flag.startswith("--") else [flag])]
    start = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c", "--output_dir", "o", "--data_path", "d"]
    return parse(PPOArguments, [*start, *words])


def build(models: tuple[Path, Path], output: Path, *flags: str, pad_is_end: bool = False) -> DeepSpeedPPOTrainer:
    """A trainer; each of its rollouts is one optimizer step unless the flags say otherwise."""
    paths = f"--actor_model_name_or_path {models[0]} --critic_model_name_or_path {models[1]} --output_dir {output}"
    args = parsed(paths, FLAGS, *flags)
    tokenizer = load_tokenizer(models[0])
    if pad_is_end:
        tokenizer.pad_token = tokenizer.eos_token
    run = Run.start(args)
    size = args.per_device_training_batch_size * args.gradient_accumulation_steps
    mixture = PretrainingMix.of(args, run, tokenizer, load_template(models[0], tokenizer), size)
    check_models(args, {role: open_checkpoint(path) for role, path in args.models.items()}, tokenizer)
    engine = DeepSpeedRLHFEngine(str(models[0]), str(models[1]), tokenizer, 10, args, run=run)
    return DeepSpeedPPOTrainer(engine, args, mixture)


def prompts(trainer: DeepSpeedPPOTrainer) -> PromptBatch:
    """Four ragged prompts."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(5, 300, (2 + row,), generator=generator).tolist() for row in range(4)]
    rows = [{"prompt_ids": one, "index": row} for row, one in enumerate(ids)]
    return collate_prompts(rows, pad_id=trainer.engine.tokenizer.pad_token_id)


def rollout(trainer: DeepSpeedPPOTrainer, number: int) -> Experience:
    """Experience from these prompts."""
    return trainer.generate_experience(prompts(trainer), number)


def hand_written(trainer: DeepSpeedPPOTrainer, answers, ended, left: int = 0, right: int = 0, scored: bool = True) -> Experience:
    """A rollout with answers written by hand, with padding that nobody needs around it; scored: with all fields.

    An E in an answer is the end token.
    """
    tokenizer, end = trainer.engine.tokenizer, trainer.engine.template.stop_token_ids[0]
    pad, batch = tokenizer.pad_token_id, prompts(trainer)
    answers = [[end if token == "E" else token for token in answer] for answer in answers]
    lengths = torch.tensor([len(answer) for answer in answers])
    width = int(lengths.max()) + right
    sequences = torch.tensor([answer + [pad] * (width - len(answer)) for answer in answers])
    generation = Generation(sequences, lengths, torch.tensor(ended), torch.zeros(len(answers), width))
    rows = slice(0, len(answers))
    ids = torch.nn.functional.pad(batch.input_ids[rows], (left, 0), value=pad)
    mask = torch.nn.functional.pad(batch.attention_mask[rows], (left, 0), value=0)
    experience = Experience.from_generation(ids, mask, generation, batch.index[rows], pad)
    complete_experience(trainer.engine, experience, trainer.args, trainer.sampler)
    if scored:
        assign_advantages(experience, trainer.engine, trainer.args)
    return experience


def weights(engine) -> dict[str, torch.Tensor]:
    """Copies of an engine's parameters."""
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def unchanged(before: dict[str, torch.Tensor], engine) -> bool:
    """Tell whether the parameters are still these, bit for bit."""
    return all(torch.equal(value, before[name]) for name, value in engine.module.named_parameters())
