"""Measure speed, memory and losses of the three steps for one model shape, by dtype and ZeRO stage.

    python -m benchmarks.three_steps --shape opt-1.3b --dtypes fp32 bf16 fp16 --stages 0 2 3 --output output/bench
    python -m benchmarks.three_steps --shape tiny --dtypes fp32 --stages 0 --device cpu      # a smoke run

Weights are random and made once; data are synthetic pairs of log-normal length. Losses of the 16-bit runs are compared
with those of the float32 run of the same stage. Share of the matrix peak = 6 x parameters x tokens/s / peak for a
training step (forward 2, backward 4); give the peak of your card with --peak_tflops. Results go to a Markdown table
that belongs into benchmarks/RESULTS.md.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.runs import as_flags, byte_tokenizer, opt_config, print_table, read_records, speed_and_memory
from steps import step_of

SHAPES = {"tiny": (64, 2, 4), "opt-350m": (1024, 24, 16), "opt-1.3b": (2048, 24, 32)}  # width, layers, heads
LOSSES = {"sft": "train/loss", "reward": "train/loss", "ppo": "train/actor_loss"}
HEAD = ("step", "dtype", "ZeRO", "tokens/s", "share of peak", "peak GB", "last loss", "largest difference to fp32")


def write_checkpoint(folder: Path, shape: str, vocabulary: int) -> int:
    """Write a random OPT checkpoint with a byte-level tokenizer; return its number of parameters."""
    import torch
    from transformers import OPTForCausalLM

    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    model = OPTForCausalLM(opt_config(*SHAPES[shape], vocab_size=vocabulary, **ids))
    model.save_pretrained(folder)
    byte_tokenizer(vocabulary).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_pairs(file: Path, count: int, longest: int) -> None:
    """Write pairs whose texts have log-normal lengths (sigma 0.8), a byte a token."""
    generator = random.Random(0)

    def text(limit: int) -> str:
        length = min(int(generator.lognormvariate(4.5, 0.8)) + 8, limit)
        return "".join(generator.choice("abcdefghij klmnop") for _ in range(length))

    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            # a byte a token: the template's own letters ("Human:", "Assistant:") come on top of the prompt
            prompt = text(max(longest - 32, 8))
            out.write(json.dumps({"prompt": prompt, "chosen": text(longest), "rejected": text(longest)}) + "\n")


def flags(step: str, dtype: str, stage: int, args: argparse.Namespace) -> list[str]:
    """Return the command line of one run. PPO's critic is the reward model of the same dtype and stage, which runs before."""
    folder = args.output
    given = {"data_path": folder / "pairs.jsonl", "data_split": "1,1,1", "dtype": dtype, "max_steps": args.steps}
    given |= {"logging_steps": 1, "output_dir": folder / f"{step}-{dtype}-{stage}"}
    if step != "ppo":
        given |= {"model_name_or_path": folder / "base", "zero_stage": stage, "learning_rate": 1e-5, "eval_iters": 1}
        return as_flags(given | {"per_device_train_batch_size": args.batch, "max_seq_len": 2 * args.length})
    for role, model in {"actor": "base", "critic": f"reward-{dtype}-{stage}"}.items():
        given |= {f"{role}_model_name_or_path": folder / model, f"{role}_zero_stage": stage}
        given[f"{role}_gradient_checkpointing"] = True
    given |= {"per_device_generation_batch_size": args.batch, "per_device_training_batch_size": args.batch}
    return as_flags(given | {"max_prompt_seq_len": args.length, "max_answer_seq_len": args.length, "eval_prompts": 0})


def measure(step: str, dtype: str, stage: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one step; return its losses, median tokens/s after three warm-up steps, and peak memory; or why it failed."""
    environment = os.environ | ({"DS_ACCELERATOR": "cpu"} if args.device == "cpu" else {})
    command = [sys.executable, "-m", step_of(step).module, *flags(step, dtype, stage, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    output = args.output / f"{step}-{dtype}-{stage}"
    losses = [record[LOSSES[step]] for record in read_records(output) if LOSSES[step] in record]
    return {"losses": losses, **speed_and_memory(output, warm_up=3)}


def cells(step: str, row: dict[str, Any], reference: list[float] | None, flops_per_token: float) -> list[str]:
    """Return the measured columns of one row. flops_per_token: as a share of the peak, 0 = not known."""
    if "failed" in row:
        return [f"failed: {row['failed']}", "", "", "", ""]
    losses, speed = row["losses"], row["tokens_per_second"]
    share = f"{flops_per_token * speed:.1%}" if flops_per_token and step != "ppo" else "-"
    gap = f"{max(abs(a - b) for a, b in zip(losses, reference, strict=True)):.4f}" if reference else "-"
    return [f"{speed:.0f}", share, f"{row['peak_memory_gb']:.2f}", f"{losses[-1]:.4f}", gap]


def rows(args: argparse.Namespace, flops_per_token: float) -> Iterator[list[object]]:
    """Run every combination; yield the row of each."""
    for step, stage in itertools.product(args.steps_of, args.stages):
        reference = None
        for dtype in args.dtypes:
            row = measure(step, dtype, stage, args)
            if dtype == "fp32":
                reference = row.get("losses")
            yield [step, dtype, stage, *cells(step, row, reference, flops_per_token)]


def parse() -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="opt-1.3b")
    parser.add_argument("--steps_of", nargs="+", choices=list(LOSSES), default=list(LOSSES), help="which of the three steps")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16", "fp16"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 2, 3])
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (rollouts) a run")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt and of an answer at most")
    parser.add_argument("--vocabulary", type=int, default=50272)
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="dense 16-bit matrix peak of the card; 0 = no share")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--output", type=Path, default=Path("output/bench"))
    return parser.parse_args()


def main() -> None:
    """Make the inputs, run every combination, print and write the table."""
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    parameters = write_checkpoint(args.output / "base", args.shape, args.vocabulary)
    write_pairs(args.output / "pairs.jsonl", 3 * args.steps * args.batch * 2, args.length)
    flops_per_token = 6 * parameters / args.peak_tflops / 1e12 if args.peak_tflops else 0.0
    (args.output / "table.md").write_text(print_table(HEAD, rows(args, flops_per_token)), encoding="utf-8")


if __name__ == "__main__":
    main()
