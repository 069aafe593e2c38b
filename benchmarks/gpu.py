"""Measure the steps on one card: OPT-1.3B with a reward model of 350M, and ChatGLM2-6B with LoRA in shared mode.

    python -m benchmarks.gpu --output output/gpu                    # about 60 GB of disk; --parts matmul sft reward ppo for 10
    python -m benchmarks.gpu --smoke                                # the whole script with tiny networks on a CPU

Nothing is downloaded: weights and texts are random and made first. Prompts and answers have 256 tokens each. A figure is the
median of the steps behind two of warm-up; each run is a process of its own. Share of the matmul peak = arithmetic of the weights'
products (2 operations a weight and token forward, 4 backward; attention's scores are not counted) / seconds / the peak, which one
large product of matrices gives first. There is no row with a static cache or CUDA graphs: decoding has no such switch.
The table goes into benchmarks/RESULTS.md.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.runs import as_flags, byte_tokenizer, opt_config, print_table, read_records
from steps import step_of

PARTS = ("matmul", "sft", "reward", "ppo", "chatglm")
SHAPES = {"actor": (2048, 24, 32), "critic": (1024, 24, 16)}  # of OPT-1.3B and OPT-350M: width, layers, heads
TINY = {"hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 16, "num_layers": 2, "num_attention_heads": 4}
HEAD = ("run", "tokens/s", "share of the matmul peak", "peak memory, GB")
WARM_UP = 2
MATMUL = """
import sys, time, torch
from models.device import detect_platform, set_device, synchronize
size, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
device = set_device(detect_platform(), 0)
one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
best = float("inf")
for _ in range(20):
    synchronize()
    started = time.perf_counter()
    one @ other
    synchronize()
    best = min(best, time.perf_counter() - started)
print(2 * size**3 / best / 1e12)
"""


def write_opt(folder: Path, sizes: tuple[int, int, int], vocabulary: int) -> None:
    """Write a random OPT with a tokenizer of a byte a token."""
    import torch
    from transformers import OPTForCausalLM

    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    OPTForCausalLM(opt_config(*sizes, vocab_size=vocabulary, **ids)).bfloat16().save_pretrained(folder)
    byte_tokenizer(vocabulary).save_pretrained(folder)


def write_chatglm(folder: Path, small: bool) -> None:
    """Write a random ChatGLM2-6B in float16, with a small vocabulary in the place of the published one."""
    import sentencepiece
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import models  # noqa: F401  (registers the networks)
    from scripts.plan.known import known_models

    folder.mkdir(parents=True, exist_ok=True)
    config = known_models()["chatglm2-6b"]["config"] | (TINY | {"padded_vocab_size": 400} if small else {})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer"}))
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text(random.Random(0), 4000)]),
        model_writer=vocabulary,
        **{"vocab_size": 320, "hard_vocab_limit": False, "byte_fallback": True, "model_type": "bpe", "pad_id": -1},
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(vocabulary.getvalue())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float16)
    model.save_pretrained(folder)


def text(generator: random.Random, length: int) -> str:
    """Return random letters and spaces."""
    return "".join(generator.choice("abcdefghij klmnop") for _ in range(length))


def write_inputs(args: argparse.Namespace) -> None:
    """Write the networks that the parts start from, and pairs of full length."""
    from models.quiet import quiet_libraries

    quiet_libraries()
    if {"sft", "reward", "ppo"} & set(args.parts):
        for role, sizes in SHAPES.items():
            write_opt(args.output / role, (64, 2, 4) if args.smoke else sizes, 600 if args.smoke else 50272)
    if "chatglm" in args.parts:
        write_chatglm(args.output / "chatglm", args.smoke)
    generator, length = random.Random(0), args.length - 24  # the template's marks take the rest
    with (args.output / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(6 * args.steps * args.batch):
            lengths = {"prompt": length, "chosen": args.length, "rejected": args.length}
            file.write(json.dumps({name: text(generator, long) for name, long in lengths.items()}) + "\n")


def run(name: str, args: argparse.Namespace, **flags: Any) -> list[dict[str, Any]]:
    """Run a step into the folder of this name; return its metrics behind the warm-up. Raise RuntimeError with its last words."""
    step, output = name.split("-")[-1], args.output / name
    given = {"data_path": args.output / "pairs.jsonl", "data_split": "1,1,1", "eval_fraction": 0, "logging_steps": 1}
    given |= {"max_steps": args.steps, "dtype": args.dtype, "output_dir": output, "cache_dir": args.output / "cache"}
    words, log = as_flags(given | flags), output.with_suffix(".log")
    # On a CPU a fork of a process with the imports; a card's driver, once asked, does not work in forks.
    processes = multiprocessing.get_context("forkserver" if args.smoke else "spawn")
    if args.smoke:
        os.environ["DS_ACCELERATOR"] = "cpu"
        processes.set_forkserver_preload(["training.step3_ppo.main", "peft"])
    process = processes.Process(target=run_module, args=(step_of(step).module, words, log))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{name}: {(log.read_text(encoding='utf-8').strip().splitlines() or ['no output'])[-1]} ({log})")
    return [record for record in read_records(output) if "train/tokens_per_second" in record][WARM_UP:]


def run_module(module: str, words: list[str], log: Path) -> None:
    """Run a module as a command of its own; what it prints goes to the log."""
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def supervised(name: str, model: str, args: argparse.Namespace, **flags: Any) -> list[dict[str, Any]]:
    """Run step 1 or 2."""
    batch = {"per_device_train_batch_size": args.batch, "max_seq_len": 2 * args.length}
    return run(name, args, model_name_or_path=args.output / model, learning_rate=1e-5, **batch, **flags)


def ppo(name: str, actor: str, critic: str, args: argparse.Namespace, **flags: Any) -> list[dict[str, Any]]:
    """Run step 3, all answers at once."""
    models = {"actor_model_name_or_path": args.output / actor, "critic_model_name_or_path": args.output / critic}
    lengths = {"max_prompt_seq_len": args.length, "max_answer_seq_len": args.length, "eval_prompts": 0}
    batches = {"per_device_generation_batch_size": args.batch, "per_device_training_batch_size": args.batch}
    return run(name, args, **models, **lengths, **batches, **flags)


def weights(folder: Path) -> int:
    """Return the number of weights in the matrices of a checkpoint that states are multiplied by, from the headers of its files.

    The embedding is a table of rows. It counts where it is the output layer too: where no head is stored.
    """
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as content:
            shapes |= {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118  (no mapping)
    head = any(re.search("lm_head|output_layer|score|classifier_head", name) for name in shapes)
    return sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and not (head and "embed" in name))


def memory(args: argparse.Namespace, name: str) -> str:
    """Return the peak of a run in GB."""
    return f"{json.loads((args.output / name / 'sanbu_done.json').read_text(encoding='utf-8'))['peak_memory_gb']:.2f}"


def row(words: str, tokens: list[float], seconds: list[float], operations: float, peak: float, held: str) -> list[str]:
    """Return a row of the table. tokens, seconds: of each step. operations: a token. peak: TFLOP/s, 0 if unknown. held: GB."""
    speed = statistics.median(count / time for count, time in zip(tokens, seconds, strict=True))
    return [words, f"{speed:.0f}", f"{operations * speed / peak / 1e12:.1%}" if peak and operations else "-", held]


def rows(args: argparse.Namespace) -> Iterator[list[str]]:
    """Measure the parts; yield the rows of the table."""
    peak = 0.0
    if "matmul" in args.parts:
        size, dtype = (256, "float32") if args.smoke else (16384, {"bf16": "bfloat16", "fp16": "float16"}[args.dtype])
        command = [sys.executable, "-c", MATMUL, str(size), dtype]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        yield [f"matmul of {size} x {size}: {peak:.3g} TFLOP/s", "-", "100 %", "-"]
    for words, name, model, flags, needed in (
        ("step 1, OPT-1.3B", "sft", "actor", {}, "sft"),
        ("step 2, OPT-350M", "reward", "critic", {}, "reward"),
        ("step 2, ChatGLM2-6B, LoRA 16", "chatglm-reward", "chatglm", {"lora_dim": 16}, "chatglm"),
    ):
        if needed in args.parts or (needed == "reward" and "ppo" in args.parts):
            speeds = [record["train/tokens_per_second"] for record in supervised(name, model, args, **flags)]
            # Step 2 counts the tokens of a prompt for both answers and computes them once: no share is told of it.
            operations = 6 * weights(args.output / model) if name == "sft" else 0
            yield row(words, speeds, [1.0] * len(speeds), operations, peak, memory(args, name))
    shared = {"memory_mode": "shared", "actor_lora_dim": 16, "critic_lora_dim": 16}
    for words, name, actor, critic, flags in (
        ("step 3, OPT-1.3B and 350M", "ppo", "actor", "reward", {}),
        ("step 3, ChatGLM2-6B, LoRA 16, shared", "chatglm-ppo", "chatglm", "chatglm-reward", shared),
    ):
        if name.split("-")[0] in args.parts:
            yield from phases(words, name, (actor, critic), flags, peak, args)


def phases(
    words: str, name: str, models: tuple[str, str], flags: dict[str, Any], peak: float, args: argparse.Namespace
) -> Iterator[list[str]]:
    """Run step 3; yield a row for the whole step, for the rollout (sampling and scoring) and for the update.

    Operations a token and weight. Actor: sampling 2, its own and the reference's log-probabilities 2 each, update 6 (LoRA: 4).
    Critic: scores and values 2 each, update as the actor.
    """
    records = ppo(name, *models, args, **flags)
    actor, critic = (weights(args.output / model) for model in models)
    rollout, update = 6 * actor + 4 * critic, (4 if flags else 6) * (actor + critic)
    both = [[record[f"train/{phase}_seconds"] for record in records] for phase in ("rollout", "update")]
    tokens = [args.batch * (args.length + record["train/length"]) for record in records]
    whole = [sum(one) for one in zip(*both, strict=True)]
    yield row(words, tokens, whole, rollout + update, peak, memory(args, name))
    for phase, seconds, operations in zip(("rollout", "update"), both, (rollout, update), strict=True):
        yield row(f"- its {phase}, {statistics.median(seconds):.2f} s", tokens, seconds, operations, peak, "")


def parse() -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="tiny networks and short texts on a CPU")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--batch", type=int, default=16, help="examples in a micro-batch, answers in a rollout")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt, and of an answer")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps or rollouts of a run, two of them warm-up")
    parser.add_argument("--output", type=Path, default=Path("output/gpu"))
    args = parser.parse_args()
    if args.smoke:
        args.dtype, args.batch, args.length, args.steps = "fp32", 2, 48, 3
    return args


def main() -> None:
    """Make the inputs, run the parts, print and write the table."""
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    write_inputs(args)
    (args.output / "table.md").write_text(print_table(HEAD, rows(args)), encoding="utf-8")


if __name__ == "__main__":
    main()
