"""ADGEN from a random start: a small network of ChatGLM2's form learns to write advertisements, and is scored twice.

    python -m benchmarks.adgen --tokenizer FOLDER --data AdvertiseGen --output output/adgen
    python -m benchmarks.adgen --hidden_size 32 --layers 2 --steps 4 --num_examples 8 --device cpu     # a smoke run

FOLDER holds ChatGLM2's tokenizer.model and tokenizer_config.json. Answers are greedy, so the two evaluations of the
trained model must write the same file. Weights are random: the figures say that training and evaluation work, and are
not to be compared with those of a model of 6B. Prints a Markdown table that belongs into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json")
FIGURES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


def write_checkpoint(folder: Path, args: argparse.Namespace) -> tuple[int, int]:
    """A random checkpoint with the real vocabulary; returns its parameters, and how many of them are not embeddings."""
    import torch
    from transformers import AutoModelForCausalLM

    from models.chatglm2.configuration import ChatGLM2Config

    heads = max(args.hidden_size // 64, 2)
    config = ChatGLM2Config(
        num_layers=args.layers, hidden_size=args.hidden_size, num_attention_heads=heads,
        kv_channels=args.hidden_size // heads, ffn_hidden_size=args.hidden_size * 10 // 3, multi_query_group_num=2,
        seq_length=512,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(args.tokenizer / name, folder / name)
    whole = sum(parameter.numel() for parameter in model.parameters())
    return whole, whole - 2 * config.padded_vocab_size * config.hidden_size


def run(module: str, flags: list[str], args: argparse.Namespace) -> float:
    """Run a module of ours to its end, its lines on the terminal; returns the seconds it took."""
    environment = os.environ | ({"DS_ACCELERATOR": "cpu"} if args.device == "cpu" else {})
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", module, *flags], env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{module} ended with {done.returncode}; what it said stands above.")
    return time.monotonic() - started


def train(args: argparse.Namespace) -> float:
    """Step 1 on all of ADGEN's training file; returns the seconds."""
    flags = [
        "--model_name_or_path", str(args.output / "base"), "--output_dir", str(args.output / "sft"),
        "--data_path", str(args.data), "--data_split", "1,0,0", "--max_source_length", "64", "--max_target_length", "64",
        "--per_device_train_batch_size", str(args.batch), "--learning_rate", str(args.learning_rate),
        "--num_warmup_steps", "20", "--max_steps", str(args.steps), "--eval_interval", str(args.steps),
        "--eval_iters", "8", "--save_steps", str(args.steps + 1), "--seed", str(args.seed),
    ]  # fmt: skip
    return run("training.step1_sft.main", flags, args)


def evaluate(model: str, to: str, args: argparse.Namespace) -> tuple[dict, bytes]:
    """Figures and predictions of a checkpoint under the output folder."""
    folder = args.output / to
    flags = [
        "--model_name_or_path", str(args.output / model), "--output_dir", str(folder), "--data_path", str(args.data),
        "--max_source_length", "64", "--max_target_length", "64", "--num_examples", str(args.num_examples),
        "--per_device_eval_batch_size", str(args.batch),
    ]  # fmt: skip
    run("training.evaluate.bleu_rouge", flags, args)
    figures = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return figures, (folder / "generated_predictions.txt").read_bytes()


def row(name: str, figures: dict) -> str:
    """One line of the table."""
    cells = [f"{figures[key]:.4f}" for key in FIGURES]
    return f"| {name} | {' | '.join(cells)} | {figures['mean_tokens']:.1f} | {figures['ended']:.1%} | {figures['empty']} |"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "golden/chatglm2-6b/tokenizer", metavar="FOLDER")
    parser.add_argument("--data", type=Path, default=SHARED / "data/adgen", help="folder with train.json and dev.json")
    parser.add_argument("--output", type=Path, default=Path("output/adgen"))
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_examples", type=int, default=200, help="held-out records to answer; 0 = all")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the model, train it, score it before and twice after, print and write the table."""
    args = parse(argv)
    parameters, trunk = write_checkpoint(args.output / "base", args)
    before, _ = evaluate("base", "before", args)
    seconds = train(args)
    (first, one), (second, two) = (evaluate("sft", name, args) for name in ("first", "second"))
    records = (args.output / "sft/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    perplexities = [found["eval/perplexity"] for found in map(json.loads, records) if "eval/perplexity" in found]
    same = one == two and all(first[key] == second[key] for key in FIGURES)
    lines = [
        f"{parameters / 1e6:.1f} M parameters, {trunk / 1e6:.1f} M without embeddings; {args.steps} steps of {args.batch} "
        f"examples in {seconds:.0f} s; held-out perplexity {perplexities[0]:.0f} before, {perplexities[-1]:.1f} after; "
        f"{first['examples']} greedy answers.",
        "",
        "| model | BLEU-4 | ROUGE-1 | ROUGE-2 | ROUGE-L | mean tokens | ended | empty |",
        "|---|---|---|---|---|---|---|---|",
        row("random start", before),
        row("trained, first run", first),
        row("trained, second run", second),
        "",
        f"The two runs {'agree in every letter' if same else 'DIFFER'}.",
    ]
    (args.output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
