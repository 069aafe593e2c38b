"""Step 1: supervised fine-tuning - a pretrained model learns to answer from prompts and good answers.

python -m training.step1_sft.main --model_name_or_path facebook/opt-1.3b --data_path sft.jsonl --output_dir output/sft
python -m scripts.launch step1_sft cpu/demo
"""

from __future__ import annotations

from training.utils.flags.steps import SFTArguments
from training.utils.run.entry import parse_or_exit, run_main
from training.utils.run.inputs import check_inputs

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help, wrong flags and paths are answered at once
    ARGS = parse_or_exit(SFTArguments, check=check_inputs)

import logging
import math
from dataclasses import replace
from functools import partial

import torch

from models.checkpoint_folder import open_checkpoint
from models.templates import load_template
from models.tokenizer import load_tokenizer
from training.utils.data.batching import SFTBatch, collate_sft, target_counts
from training.utils.data.prepare import prepare_phase
from training.utils.engine.build import check_trained_model, trained_engine
from training.utils.engine.checkpoint import Checkpoint, export
from training.utils.engine.same_run import fingerprint
from training.utils.engine.step import optimizer_metrics, optimizer_step
from training.utils.loss import sft_loss
from training.utils.run.loop import GlobalBatches, Progress, evaluation_batches
from training.utils.run.memory import check_run_fits
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")


def main(args: SFTArguments) -> None:
    """Train, evaluate, save. Raises UserError for wrong input, before a model is loaded where that can be known."""
    run = Run.start(args)
    model = open_checkpoint(args.model_name_or_path)
    tokenizer = load_tokenizer(model)
    check_trained_model(args, model, tokenizer)
    args = run.args = replace(args, **check_run_fits(args, run, {"model": model}))  # --zero_stage auto becomes a number
    template = load_template(model, tokenizer)
    data = prepare_phase(args, 1, tokenizer, template, args.output_dir)
    ids = {"pad_id": tokenizer.pad_token_id, "end_id": template.end_token_id}
    collate = partial(collate_sft, **ids, loss_on=args.loss_on)
    targets = target_counts(data.train, args.loss_on)
    batches = GlobalBatches(data.train, targets, collate, run, args)

    engine = trained_engine(model, args, run, tokenizer, batches.schedule_steps)
    checkpoint = Checkpoint(run, {"model": engine}, fingerprint(args, run, data.fingerprint), batches.sizes)
    start = checkpoint.resume()
    progress = Progress(run, batches.total_steps, start)
    if len(data.eval) == 0:
        logger.warning("No answer was held out (see --eval_fraction): perplexity is not measured.")

    def evaluate(step: int) -> None:
        if len(data.eval) == 0:
            return
        micro_batches = evaluation_batches(data.eval, collate, run, args.per_device_eval_batch_size, args.eval_iters)
        metrics = perplexity(engine, micro_batches, run)
        run.metrics.log(step, metrics | {"measured_on": "held-out"}, prefix="eval")
        if run.is_main:
            tokens = f"{metrics['tokens']:.0f} tokens"
            print(f"step {step}: held-out perplexity {metrics['perplexity']:.3f} over {tokens}", flush=True)

    if start == 0:
        evaluate(0)
    for batch in batches.after(start):

        def loss_of(micro: SFTBatch, denominator=batch.denominator):
            return sft_loss(target_log_probs(engine, micro), micro.loss_mask[:, 1:], denominator)

        loss = optimizer_step(engine, batch.micro_batches, loss_of, run)
        progress.count(batch.tokens)
        metrics = {"loss": loss, "epoch": batch.epoch} | optimizer_metrics(engine)
        progress.report(batch.step, metrics, args.logging_steps)
        if batch.last or batch.evaluates:
            evaluate(batch.step)
        if run.stopping or batch.saves:
            checkpoint.save(batch.step)
        if run.stopping:
            run.leave(batch.step)

    export(engine, tokenizer, template, args.output_dir, run)
    run.finish()


def target_log_probs(engine, micro: SFTBatch) -> torch.Tensor:
    """Return the log-probabilities of a micro-batch's targets, [batch, time - 1]."""
    return engine(micro.input_ids, micro.attention_mask, target_mask=micro.loss_mask[:, 1:], labels=micro.labels)


@torch.no_grad()
def perplexity(engine, micro_batches, run: Run) -> dict[str, float]:
    """Return exp of the mean negative log-probability over all held-out target tokens, each token counted once on all processes."""
    engine.eval()
    nll = tokens = 0.0
    for micro in micro_batches:
        mask = micro.loss_mask[:, 1:]
        nll += float(sft_loss(target_log_probs(engine, micro), mask, 1.0))
        tokens += float(mask.sum())
    engine.train()
    nll, tokens = run.sum(nll, tokens)
    mean = nll / max(tokens, 1.0)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": tokens}


if __name__ == "__main__":
    run_main(main, ARGS)
