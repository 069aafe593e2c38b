"""Step 2: the reward model - a scalar head on the SFT model, trained on pairs (chosen, rejected).

python -m training.step2_reward.main --model_name_or_path output/sft --data_path pairs.jsonl --output_dir output/reward
python -m scripts.launch step2_reward cpu/demo
"""

from __future__ import annotations

from training.utils.flags.steps import RewardArguments
from training.utils.run.entry import parse_or_exit, run_main
from training.utils.run.inputs import check_inputs

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help, wrong flags and paths are answered at once
    ARGS = parse_or_exit(RewardArguments, check=check_inputs)

import logging
from dataclasses import replace
from functools import partial

import torch

from models.checkpoint_folder import open_checkpoint
from models.heads import at_last_token
from models.shared_prompts import can_share_prompts
from models.templates import load_template
from models.tokenizer import load_tokenizer
from training.utils.data.batching import PairBatch, collate_pairs, pair_widths
from training.utils.data.prepare import prepare_phase
from training.utils.engine.build import check_trained_model, trained_engine
from training.utils.engine.checkpoint import Checkpoint, export
from training.utils.engine.same_run import fingerprint
from training.utils.engine.step import optimizer_metrics, optimizer_step
from training.utils.loss import bradley_terry_loss, pair_accuracy
from training.utils.run.loop import GlobalBatches, Progress, evaluation_batches
from training.utils.run.memory import check_run_fits
from training.utils.run.metrics import rounded
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")


def main(args: RewardArguments) -> None:
    """Train, evaluate, save. Raises UserError for wrong input, before a model is loaded where that can be known."""
    run = Run.start(args)
    model = open_checkpoint(args.model_name_or_path)
    tokenizer = load_tokenizer(model)
    check_trained_model(args, model, tokenizer)
    args = run.args = replace(args, **check_run_fits(args, run, {"model": model}))  # --zero_stage auto becomes a number
    template = load_template(model, tokenizer)
    data = prepare_phase(args, 2, tokenizer, template, args.output_dir)
    share = can_share_prompts(model, run.attention, **args.prefix_options())
    collate = partial(collate_pairs, pad_id=tokenizer.pad_token_id, share=share)
    batches = GlobalBatches(data.train, [1.0] * len(data.train), collate, run, args, pair_widths(data.train, share))
    engine = trained_engine(model, args, run, tokenizer, batches.schedule_steps, scalar=True)
    checkpoint = Checkpoint(run, {"model": engine}, fingerprint(args, run, data.fingerprint), batches.sizes)
    start = checkpoint.resume()
    progress = Progress(run, batches.total_steps, start)
    evaluated, measured_on = data.eval, "held-out"
    if len(data.eval) == 0:
        logger.warning("No pair was held out (see --eval_fraction): accuracy and score statistics are those of training pairs.")
        evaluated, measured_on = data.train, "training"

    def evaluated_statistics() -> dict[str, float]:
        micro_batches = evaluation_batches(evaluated, collate, run, args.per_device_eval_batch_size, args.eval_iters)
        return score_statistics(engine, micro_batches, run)

    def evaluate(step: int) -> dict[str, float]:
        metrics = evaluated_statistics()
        run.metrics.log(step, metrics | {"measured_on": measured_on}, prefix="eval")
        if run.is_main:
            print(evaluation_line(step, metrics, measured_on), flush=True)
        return metrics

    if start == 0:
        evaluate(0)
    for batch in batches.after(start):

        def loss_of(micro: PairBatch, denominator=batch.denominator):
            chosen, rejected = pair_scores(engine, micro)
            return bradley_terry_loss(
                chosen, rejected, micro.weight, denominator, margin=micro.margin, center_coef=args.center_rewards_coefficient
            )

        loss = optimizer_step(engine, batch.micro_batches, loss_of, run)
        progress.count(batch.tokens)
        metrics = {"loss": loss, "epoch": batch.epoch} | optimizer_metrics(engine)
        progress.report(batch.step, metrics, args.logging_steps)
        if batch.last or batch.evaluates:
            metrics = evaluate(batch.step)
        if run.stopping or batch.saves:
            checkpoint.save(batch.step)
        if run.stopping:
            run.leave(batch.step)

    if start >= batches.total_steps:  # resumed after the last step: its evaluation is in the curves already
        metrics = evaluated_statistics()
    # Step 3 subtracts and divides by these statistics: scores of a reward model have no unit of their own.
    statistics = {f"reward_{name}": metrics[name] for name in ("mean", "std", "accuracy")}
    export(engine, tokenizer, template, args.output_dir, run, **statistics)
    run.finish()


def pair_scores(engine, micro: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores [pairs] of the chosen and of the rejected answers, on their last real token, from one forward."""
    scores = at_last_token(engine(micro.input_ids, micro.attention_mask, micro.shared), micro.attention_mask)
    chosen, rejected = scores.chunk(2)
    return chosen, rejected


def evaluation_line(step: int, metrics: dict[str, float], measured_on: str) -> str:
    """Write an evaluation as a line, with the kind of its pairs: accuracy on training pairs says nothing about others."""
    return (
        f"step {step}: {measured_on} accuracy {metrics['accuracy']:.4f} over "
        f"{metrics['pairs']:.0f} pairs, chosen {rounded(metrics['chosen'], 3)}, rejected {rounded(metrics['rejected'], 3)}"
    )


@torch.no_grad()
def score_statistics(engine, micro_batches, run: Run) -> dict[str, float]:
    """Return accuracy (a tie counts one half), mean scores, and mean and standard deviation over all answers of the pairs."""
    engine.eval()
    right = pairs = chosen_sum = rejected_sum = squares = 0.0
    for micro in micro_batches:
        chosen, rejected = pair_scores(engine, micro)
        right += float(pair_accuracy(chosen, rejected, micro.weight))
        real = micro.weight.bool()
        pairs += float(real.sum())
        chosen_sum += float(chosen[real].double().sum())
        rejected_sum += float(rejected[real].double().sum())
        squares += float((chosen[real].double() ** 2).sum() + (rejected[real].double() ** 2).sum())
    engine.train()
    right, pairs, chosen_sum, rejected_sum, squares = run.sum(right, pairs, chosen_sum, rejected_sum, squares)
    count = max(pairs, 1.0)
    mean = (chosen_sum + rejected_sum) / (2 * count)
    variance = max(squares / (2 * count) - mean**2, 0.0)
    spread = max(variance**0.5, 1e-3)  # a spread of 0 (one pair, a dead head) must not become a divisor
    metrics = {"accuracy": right / count, "pairs": pairs, "mean": mean, "std": spread}
    return metrics | {"chosen": chosen_sum / count, "rejected": rejected_sum / count}


if __name__ == "__main__":
    run_main(main, ARGS)
