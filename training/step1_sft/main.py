"""Step 1: supervised fine-tuning - a pretrained model learns to answer from prompts and good answers.

python -m training.step1_sft.main --model_name_or_path facebook/opt-1.3b --data_path sft.jsonl --output_dir output/sft
deepspeed --module training.step1_sft.main --config configs/cpu/demo.yaml
"""

from __future__ import annotations

import math
from functools import partial

import torch

from models.adapters import add_lora
from models.factory import check_context_length, check_quantized_base, gets_prefix, load_causal_lm, load_tokenizer
from models.heads import TokenLogProbs
from models.templates import load_template
from training.utils.arguments import SFTArguments
from training.utils.checkpoint import Checkpoint, export, fingerprint
from training.utils.data.batching import SFTBatch, collate_sft
from training.utils.data.tokenize import prepare_phase
from training.utils.loop import GlobalBatches, Progress, due, evaluation_batches
from training.utils.loss import sft_loss
from training.utils.parsing import main_entry
from training.utils.run import Run
from training.utils.zero import EngineOptions, build_engine, optimizer_figures, optimizer_step


def main(args: SFTArguments) -> None:
    """Train, evaluate, save. Raises UserError for wrong input, before a model is loaded where that can be known."""
    run = Run.start(args)
    prefix = args.prefix_options()
    check_context_length(args.model_name_or_path, args.max_seq_len, "--max_seq_len", **prefix)
    frozen = bool(args.lora_dim) or gets_prefix(args.model_name_or_path, args.output_dir, **prefix)
    check_quantized_base(args.model_name_or_path, args.quantization_bit, adapters=frozen)
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = load_template(args.model_name_or_path, tokenizer)
    data = prepare_phase(args, 1, tokenizer, template)
    collate = partial(collate_sft, pad_id=tokenizer.pad_token_id, loss_on=args.loss_on)
    targets = target_counts(data.train, args.loss_on)
    batches = GlobalBatches(data.train, targets, collate, run, args, per_device=args.per_device_train_batch_size)

    options = EngineOptions.of(args)
    model = load_causal_lm(
        args.model_name_or_path,
        dtype=run.dtype,
        attn=run.attention,
        dropout=args.dropout,
        gradient_checkpointing=args.gradient_checkpointing,
        zero3_config=options.loading_config(run.dtype, run.world_size),
        tokenizer=tokenizer,
        quantization_bit=args.quantization_bit,
        seed=args.seed,
        **prefix,
    )
    if args.lora_dim:
        model = add_lora(
            model,
            dim=args.lora_dim,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            module_name=args.lora_module_name,
        )
    engine = build_engine(
        TokenLogProbs(model), options, dtype=run.dtype, total_steps=batches.total_steps, world_size=run.world_size
    )
    checkpoint = Checkpoint(run, {"model": engine}, fingerprint(args, run, data.fingerprint))
    start, _ = checkpoint.resume()
    progress = Progress(run, batches.total_steps, start)

    def evaluate(step: int) -> None:
        if len(data.eval) == 0:
            return
        figures = perplexity(
            engine, evaluation_batches(data.eval, collate, run, args.per_device_eval_batch_size, args.eval_iters), run
        )
        run.metrics.log(step, figures, prefix="eval")
        if run.is_main:
            print(
                f"step {step}: held-out perplexity {figures['perplexity']:.3f} over {figures['tokens']:.0f} tokens",
                flush=True,
            )

    if start == 0:
        evaluate(0)
    for batch in batches.after(start):

        def loss_of(micro: SFTBatch, denominator=batch.denominator):
            log_probs = engine(micro.input_ids, micro.attention_mask, target_mask=micro.loss_mask[:, 1:])
            return sft_loss(log_probs, micro.loss_mask[:, 1:], denominator)

        loss = optimizer_step(engine, batch.micro_batches, loss_of, run)
        progress.count(batch.tokens)
        progress.report(
            batch.step, {"loss": loss, "epoch": batch.epoch} | optimizer_figures(engine), args.logging_steps
        )
        last = batch.step == batches.total_steps
        if last or due(batch.step, args.eval_interval) or (batch.ends_epoch and not args.eval_interval):
            evaluate(batch.step)
        if run.stopping or due(batch.step, args.save_steps) or (batch.ends_epoch and not args.save_steps and not last):
            checkpoint.save(batch.step)
        if run.stopping:
            run.leave(batch.step)

    export(engine, tokenizer, template, args.output_dir, run)
    run.finish()


def target_counts(dataset, loss_on: str) -> list[int]:
    """How many tokens of each example are targets: the answer, end token included, or all but the very first."""
    if loss_on == "all":
        return [length - 1 for length in dataset["length"]]
    return [length - max(prompt, 1) for length, prompt in zip(dataset["length"], dataset["prompt_length"], strict=True)]


@torch.no_grad()
def perplexity(engine, micro_batches, run: Run) -> dict[str, float]:
    """exp of the mean negative log-probability over all held-out target tokens, each token counted once on all processes."""
    engine.eval()
    nll = tokens = 0.0
    for micro in micro_batches:
        mask = micro.loss_mask[:, 1:]
        log_probs = engine(micro.input_ids, micro.attention_mask, target_mask=mask)
        nll += float(sft_loss(log_probs, mask, 1.0))
        tokens += float(mask.sum())
    engine.train()
    nll, tokens = run.sum(nll, tokens)
    mean = nll / max(tokens, 1.0)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": tokens}


if __name__ == "__main__":
    main_entry(main, SFTArguments)
