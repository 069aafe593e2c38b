"""Time the rollout engine beside transformers' generate: shared prompts, replaced rows, batches of like length.

    OMP_NUM_THREADS=1 python -m benchmarks.generation                          # both CPU shapes, about ten minutes
    python -m benchmarks.generation --shape chat --rounds 9 --max_batch 32
    python -m benchmarks.generation --shape opt-1.3b --dtype bf16 --prompts 1024 --max_batch 256       # on a card

Random weights; the stop tokens are so many that an answer goes on at each step with the probability that gives it the mean
length asked for. Ways are timed in turn, --rounds times; printed are medians and extremes, on a CPU of CPU time.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from benchmarks.runs import opt_config, print_table
from inference.engine import generate, generate_many
from models.device import detect_platform, resolve_dtype, set_device, synchronize
from training.utils.data.batching import pad_left

PAD, FIRST_STOP = 0, 8


@dataclass(frozen=True)
class Shape:
    """A network, prompts of log-normal length, answers of geometric length."""

    config: object
    prompt: int  # median length in tokens
    answer: int  # mean length
    longest: int  # max_new_tokens


def shapes() -> dict[str, Shape]:
    """Return shapes by name: about that of the demo, a small chat model, DeepSpeed-Chat's OPT-1.3B."""
    demo = LlamaConfig(
        **{"vocab_size": 1024, "hidden_size": 192, "intermediate_size": 512, "max_position_embeddings": 256},
        **{"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": True},
    )
    chat = opt_config(256, 4, 4, vocab_size=8192, max_position_embeddings=512)
    large = opt_config(2048, 24, 32)
    return {"demo": Shape(demo, 24, 12, 24), "chat": Shape(chat, 60, 24, 64), "opt-1.3b": Shape(large, 128, 128, 256)}


def prompts_of(shape: Shape, count: int, seed: int = 0) -> list[list[int]]:
    """Return random tokens; lengths are log-normal (sigma 0.5) and at most three times the median."""
    random = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(count, generator=random) * 0.5).exp() * shape.prompt
    vocabulary = shape.config.vocab_size
    return [
        torch.randint(FIRST_STOP, vocabulary, (int(length),), generator=random).tolist()
        for length in lengths.clamp(2, 3 * shape.prompt)
    ]


def ways(model: nn.Module, shape: Shape, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Callable]:
    """Return name -> a function that answers all rows and returns the number of tokens."""
    stops = list(range(FIRST_STOP, FIRST_STOP + math.ceil(shape.config.vocab_size / shape.answer)))
    settings = {"max_new_tokens": shape.longest, "stop_token_ids": stops, "pad_token_id": PAD}
    rows = [prompt for prompt in prompts for _ in range(args.answers)]
    config = GenerationConfig(
        do_sample=True, max_new_tokens=shape.longest, pad_token_id=PAD, eos_token_id=stops, top_k=0, top_p=1.0
    )

    def ours(ids: Tensor, mask: Tensor, seeds: list[int]) -> int:
        return int(generate(model, ids, mask, row_seeds=seeds, **settings).lengths.sum())

    def transformers(ids: Tensor, mask: Tensor, seeds: list[int]) -> int:
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return int((made[:, ids.shape[1] :] != PAD).sum())

    def in_batches(answer: Callable[[Tensor, Tensor, list[int]], int], order: list[int]) -> int:
        total = 0
        for start in range(0, len(order), args.max_batch):
            chunk = order[start : start + args.max_batch]
            ids, mask = (tensor.to(model.device) for tensor in pad_left([rows[row] for row in chunk], PAD))
            total += answer(ids, mask, chunk)
        return total

    def many() -> int:
        batching = {"max_batch": args.max_batch, "num_return_sequences": args.answers, "row_seeds": range(len(rows))}
        return int(generate_many(model, prompts, **batching, **settings).lengths.sum())

    in_order = list(range(len(rows)))
    longest_first = sorted(in_order, key=lambda row: -len(rows[row]))
    return {
        "transformers.generate": lambda: in_batches(transformers, in_order),
        "batches in the data's order": lambda: in_batches(ours, in_order),
        "batches of like length": lambda: in_batches(ours, longest_first),
        "generate_many": many,
    }


def main() -> None:
    """Time all ways on all shapes that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(shapes()), default=["demo", "chat"])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--answers", type=int, default=1, help="answers a prompt")
    parser.add_argument("--max_batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args()
    platform = detect_platform()
    device = set_device(platform, 0)
    clock = time.process_time if platform.name == "cpu" else time.perf_counter  # on a CPU other jobs may run beside it
    for name in args.shape:
        shape = shapes()[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape.config).to(device, resolve_dtype(args.dtype, platform)).eval()
        runs = ways(model, shape, prompts_of(shape, args.prompts), args)
        times: dict[str, list[float]] = {way: [] for way in runs}
        made = {}
        for round_number in range(args.rounds + 1):
            for way, run in runs.items():
                synchronize()
                started = clock()
                made[way] = run()
                synchronize()
                if round_number:  # the first one warms up
                    times[way].append(clock() - started)
        print(f"\n{name}: {args.prompts} prompts, {args.answers} answers each, {args.max_batch} at once, {platform.name}")
        rows = []
        for way, seconds in times.items():
            middle = statistics.median(seconds)
            rows.append([way, f"{middle:.2f}", f"{min(seconds):.2f} - {max(seconds):.2f}", f"{made[way] / middle:.0f}"])
        print_table(["way", "seconds", "fastest - slowest", "tokens/s"], rows)


if __name__ == "__main__":
    main()
