"""Step 3: PPO - the SFT model learns from its own answers, scored by the reward model.

    python -m training.step3_ppo.main --actor_model_name_or_path output/sft --critic_model_name_or_path output/reward \
        --data_path prompts.jsonl --output_dir output/ppo
    python -m scripts.launch step3_ppo cpu/demo
"""

from __future__ import annotations

from training.utils.flags.steps import PPOArguments
from training.utils.run.entry import parse_or_exit, run_main
from training.utils.run.inputs import check_inputs

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help, wrong flags and paths are answered at once
    ARGS = parse_or_exit(PPOArguments, check=check_inputs)

import logging
import math
import time
from dataclasses import replace
from pathlib import Path

from errors import UserError
from models.checkpoint_folder import open_checkpoint
from models.templates import load_template
from models.tokenizer import load_tokenizer
from training.step3_ppo.evaluation import TRAINING_SAMPLES, HeldOut, reference_answers, sample_table, write_samples
from training.step3_ppo.experience import Experience
from training.step3_ppo.ppo_trainer import DeepSpeedPPOTrainer, minibatch_size
from training.step3_ppo.pretraining_mix import PretrainingMix
from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine, check_models
from training.step3_ppo.rollout import PromptBatches
from training.step3_ppo.scoring import Rewards, kept_on_failure
from training.utils.data.prepare import prepare_phase
from training.utils.engine.checkpoint import Checkpoint, export
from training.utils.engine.same_run import fingerprint
from training.utils.run.loop import Progress, due
from training.utils.run.memory import check_run_fits
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")

# On the progress line; all metrics go to metrics.jsonl.
SHOWN = ("score", "kl", "length", "eos_rate", "actor_loss", "critic_loss")


def main(args: PPOArguments) -> None:
    """Train, evaluate, save. Raises UserError for wrong input, before a model is loaded where that can be known."""
    run = Run.start(args)
    rewards = Rewards(args)
    models = {role: open_checkpoint(path) for role, path in args.models.items()}
    tokenizer = load_tokenizer(models["actor"])
    check_models(args, models, tokenizer)
    args = run.args = replace(args, **check_run_fits(args, run, models))  # --zero_stage auto becomes a number
    template = load_template(models["actor"], tokenizer)
    data = prepare_phase(args, 3, tokenizer, template, args.output_dir)
    prompts = PromptBatches(data.train, run, args, tokenizer.pad_token_id)
    sizes = prompts.sizes | {"minibatch": minibatch_size(args, run)}
    minibatches = math.ceil(sizes["rollout"] * args.num_return_sequences / sizes["minibatch"])
    steps = {"critic": prompts.schedule * args.ppo_epochs * minibatches}
    steps["actor"] = (prompts.schedule - args.critic_warmup_rollouts) * args.ppo_epochs * minibatches
    if steps["actor"] < 1:
        raise UserError(
            f"--critic_warmup_rollouts {args.critic_warmup_rollouts}: the whole run has {prompts.schedule} rollouts, and the "
            "actor would never learn; lower it."
        )
    mixture = PretrainingMix.of(args, run, tokenizer, template, sizes["minibatch"])

    paths = models["actor"], models.get("critic")
    engine = DeepSpeedRLHFEngine(*paths, tokenizer, steps["critic"], args, run, rewards, steps["actor"])
    trainer = DeepSpeedPPOTrainer(engine, args, mixture)
    content = data.fingerprint + (mixture.fingerprint if mixture else "")
    averages = {"actor_ema": engine.actor_ema} if engine.actor_ema else {}
    checkpoint = Checkpoint(run, engine.trained, fingerprint(args, run, content), sizes, {"trainer": trainer}, averages)
    start = checkpoint.resume()
    held_out = HeldOut(engine, data.eval, args, trainer.sampler)
    progress = Progress(run, prompts.total, start)
    if held_out.count == 0:
        logger.warning("No prompt is held out (see --eval_fraction, --eval_prompts): nothing is measured on new prompts.")
    if start == 0:
        held_out.evaluate(step=0)

    for rollout, batch in prompts.after(start):
        clock = time.monotonic()
        with kept_on_failure(checkpoint.save, rollout - 1):
            experience = trainer.generate_experience(batch, rollout)
        generated = time.monotonic()
        metrics = trainer.train_rlhf(experience, rollout)
        seconds = {"rollout_seconds": generated - clock, "update_seconds": time.monotonic() - generated}
        progress.count(int(experience.attention_mask.sum()))
        metrics = experience.metrics | metrics | seconds
        shown = [name for name in SHOWN if name in metrics]   # without a critic, or while it warms up, some are not there
        progress.report(rollout, metrics, args.logging_steps, shown=shown)
        last, beside = rollout == prompts.total, []
        if last:  # for the report; each rollout's would cost time and calls of the sources of reward
            with kept_on_failure(checkpoint.save, rollout):
                beside = reference_answers(engine, batch, args, rollout, trainer.sampler)
        if run.is_main and (last or due(rollout, args.logging_steps)):
            show_answers(experience, engine, args, rollout, beside)
        if last or due(rollout, args.eval_interval):
            with kept_on_failure(checkpoint.save, rollout):
                held_out.evaluate(step=rollout)
        if run.stopping or due(rollout, args.save_steps):
            checkpoint.save(rollout)
        if run.stopping:
            run.leave(rollout)

    for role, trained in engine.trained.items():
        export(trained, tokenizer, template, Path(args.output_dir) / role, run)
    if engine.actor_ema:
        export(engine.actor, tokenizer, template, Path(args.output_dir) / "actor_ema", run, engine.actor_ema.weights())
    run.finish()


def show_answers(experience: Experience, engine: DeepSpeedRLHFEngine, args, rollout: int, beside: list[dict]) -> None:
    """Keep a few answers of the rollout in samples.jsonl, beside the reference's; print them with --print_answers."""
    write_samples(experience, engine, rollout, "train", TRAINING_SAMPLES, beside)
    if args.print_answers:
        for row in sample_table(experience, engine, TRAINING_SAMPLES):
            print(f"  {row['prompt']!r} -> {row['answer']!r}  score {row['score']:.3f}", flush=True)


if __name__ == "__main__":
    run_main(main, ARGS)
