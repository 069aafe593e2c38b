"""DPO: the SFT model learns from pairs (chosen, rejected) directly - no reward model, no rollouts; in place of steps 2 and 3.

python -m training.step2_dpo.main --model_name_or_path output/sft --data_path pairs.jsonl --output_dir output/dpo
python -m scripts.launch step2_dpo cpu/demo
"""

from __future__ import annotations

from training.utils.flags.steps import DPOArguments
from training.utils.run.entry import parse_or_exit, run_main
from training.utils.run.inputs import check_inputs

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help, wrong flags and paths are answered at once
    ARGS = parse_or_exit(DPOArguments, check=check_inputs)

import logging
from dataclasses import replace
from functools import partial

from torch import Tensor

from models.checkpoint_folder import CheckpointFolder, check_context_length, check_quantized_base, open_checkpoint
from models.shared_prompts import can_share_prompts
from models.templates import load_template
from models.tokenizer import check_same_tokenizer, load_tokenizer
from training.step2_dpo.evaluation import evaluate_pairs, evaluation_line, pair_metrics, pair_sums
from training.step2_dpo.reference import answer_log_probs, load_reference, reference_log_probs
from training.utils.data.batching import AnswerPairBatch, collate_answer_pairs, pair_widths
from training.utils.data.prepare import prepare_phase
from training.utils.engine.build import check_trained_model, trained_engine
from training.utils.engine.checkpoint import Checkpoint, export
from training.utils.engine.same_run import fingerprint
from training.utils.engine.step import optimizer_metrics, optimizer_step
from training.utils.loss import dpo_loss, implicit_rewards
from training.utils.run.loop import GlobalBatches, Progress, evaluation_batches
from training.utils.run.memory import check_run_fits
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")

# On the progress line; all metrics go to metrics.jsonl.
SHOWN = ("loss", "accuracy", "margin", "chosen", "rejected", "lr")


def main(args: DPOArguments) -> None:
    """Train, evaluate, save. Raises UserError for wrong input, before a model is loaded where that can be known."""
    run = Run.start(args)
    models = {role: open_checkpoint(path) for role, path in args.models.items()}
    tokenizer = load_tokenizer(models["model"])
    check_models(args, models, tokenizer)
    args = run.args = replace(args, **check_run_fits(args, run, models))  # --zero_stage auto becomes a number
    template = load_template(models["model"], tokenizer)
    data = prepare_phase(args, 2, tokenizer, template, args.output_dir)
    share = all(can_share_prompts(one, run.attention, **args.prefix_options()) for one in models.values())
    collate = partial(collate_answer_pairs, pad_id=tokenizer.pad_token_id, share=share)
    batches = GlobalBatches(data.train, [1.0] * len(data.train), collate, run, args, pair_widths(data.train, share))
    reference = load_reference(args, models, tokenizer, run)
    engine = trained_engine(models["model"], args, run, tokenizer, batches.schedule_steps)
    checkpoint = Checkpoint(run, {"model": engine}, fingerprint(args, run, data.fingerprint), batches.sizes)
    start = checkpoint.resume()
    progress = Progress(run, batches.total_steps, start)
    evaluated, measured_on = data.eval, "held-out"
    if len(data.eval) == 0:
        logger.warning("No pair was held out (see --eval_fraction): the metrics of evaluation are those of training pairs.")
        evaluated, measured_on = data.train, "training"

    def compare(micro: AnswerPairBatch) -> tuple[Tensor, Tensor]:
        """Return implicit rewards of the answers, and the policy's log-probabilities of them, [2 x pairs], chosen first."""
        ref_log_probs = reference_log_probs(engine, reference, micro)
        log_probs = answer_log_probs(engine, micro)
        return implicit_rewards(log_probs, ref_log_probs, args.beta), log_probs

    def evaluate(step: int) -> None:
        micro_batches = evaluation_batches(evaluated, collate, run, args.per_device_eval_batch_size, args.eval_iters)
        metrics = evaluate_pairs(engine, micro_batches, compare, args.label_smoothing, run)
        run.metrics.log(step, metrics | {"measured_on": measured_on}, prefix="eval")
        if run.is_main:
            print(evaluation_line(step, metrics, measured_on), flush=True)

    if start == 0:
        evaluate(0)
    for batch in batches.after(start):
        sums: list[list[float]] = []

        def loss_of(micro: AnswerPairBatch, denominator=batch.denominator, sums=sums):
            rewards, log_probs = compare(micro)
            sums.append(pair_sums(rewards, log_probs, micro, args.label_smoothing))
            return dpo_loss(*rewards.chunk(2), micro.weight, denominator, args.label_smoothing)

        loss = optimizer_step(engine, batch.micro_batches, loss_of, run)
        progress.count(batch.tokens)
        metrics = pair_metrics(sums, run) | {"loss": loss, "epoch": batch.epoch} | optimizer_metrics(engine)
        progress.report(batch.step, metrics, args.logging_steps, shown=SHOWN)
        if batch.last or batch.evaluates:
            evaluate(batch.step)
        if run.stopping or batch.saves:
            checkpoint.save(batch.step)
        if run.stopping:
            run.leave(batch.step)

    export(engine, tokenizer, template, args.output_dir, run)
    run.finish()


def check_models(args: DPOArguments, models: dict[str, CheckpointFolder], tokenizer) -> None:
    """Raise UserError if the model or the reference cannot be what the flags ask for; no weight is read."""
    check_trained_model(args, models["model"], tokenizer)
    if args.ref_model_name_or_path:
        reference = models["reference"]
        check_context_length(reference, args.max_seq_len, "--max_seq_len")
        check_quantized_base(reference, args.quantization_bit, adapters=True)
        advice = "give a --ref_model_name_or_path with the tokenizer of the trained model"
        check_same_tokenizer(tokenizer, load_tokenizer(reference), (args.model_name_or_path, reference.path), advice)


if __name__ == "__main__":
    run_main(main, ARGS)
