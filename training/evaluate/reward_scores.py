"""Score good and bad answers with a reward model, and count how often the good one wins.

    python -m training.evaluate.reward_scores --model_name_or_path output/reward-models/350m
    python -m training.evaluate.reward_scores --model_name_or_path output/reward-models/350m --data_path pairs.jsonl

Scores have no unit of their own; only their differences on the same prompt mean something.
"""

from training.evaluate.inputs import check_inputs, check_reward_model
from training.utils.flags.steps import RewardEvalArguments
from training.utils.run.entry import parse_or_exit, run_main

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help and wrong input are answered at once
    ARGS = parse_or_exit(RewardEvalArguments, check=check_inputs)

import logging
import statistics
from typing import Any

import torch

from errors import UserError
from models.load import load_scalar_model
from models.quiet import quiet_libraries
from training.evaluate.common import BUILT_IN, LoadedModel, held_out, in_batches, load_for_evaluation, write_json
from training.evaluate.intervals import wilson
from training.utils.loss import pair_accuracy

logger = logging.getLogger("sanbu")

SHOWN = 6  # pairs that are printed


def main(args: RewardEvalArguments) -> None:
    """Score the pairs, print some and the metrics over all, write them where --output says."""
    quiet_libraries()
    checkpoint = check_reward_model(args.model_name_or_path)
    pairs = read_pairs(args)
    loaded = load_for_evaluation(checkpoint, args.dtype, args.attn_implementation, load_scalar_model)
    rows = encode_pairs(pairs, loaded, args.max_seq_len)
    scores = score_pairs(loaded, rows, 2 * args.per_device_eval_batch_size)
    metrics = summary(scores)
    for pair, (chosen, rejected) in list(zip(pairs, scores, strict=True))[:SHOWN]:
        print(f"\n{pair['messages'][-1]['content']}")
        print(f"  {chosen:8.3f}  {pair['chosen']}\n  {rejected:8.3f}  {pair['rejected']}")
    print(
        f"\naccuracy {metrics['accuracy']:.4f} over {metrics['pairs']} pairs (95 % interval {metrics['accuracy_low']:.2f} to "
        f"{metrics['accuracy_high']:.2f}); scores {metrics['chosen_mean']:.3f} "
        f"(good) and {metrics['rejected_mean']:.3f} (bad), their difference {metrics['margin_mean']:.3f} +- "
        f"{metrics['margin_std']:.3f}"
    )
    if args.output:
        rows = [pair | {"chosen_score": a, "rejected_score": b} for pair, (a, b) in zip(pairs, scores, strict=True)]
        write_json(args.output, {"model": args.model_name_or_path, "summary": metrics, "pairs": rows})


def read_pairs(args: RewardEvalArguments) -> list[dict[str, Any]]:
    """Return records with a chosen and a rejected answer: the held-out ones of --data_path, or the built-in ones."""
    if not args.data_path:
        return [pair | {"messages": [{"role": "user", "content": pair["prompt"]}]} for pair in BUILT_IN["pairs"]]
    pairs: list[dict[str, Any]] = []
    for path in args.data_path:
        records = held_out(path, args.column_map, alone=len(args.data_path) == 1)
        usable = [row for row, rejected in enumerate(records["rejected"]) if rejected is not None]
        if not usable:
            raise UserError(f"--data_path {path}: no record has a rejected answer; rw_eval compares good and bad ones.")
        if len(usable) < len(records):
            logger.warning("%s: %d records without a rejected answer are not scored", path, len(records) - len(usable))
        pairs += records.select(usable[: args.num_pairs or None]).to_list()
    return pairs


def encode_pairs(pairs: list[dict[str, Any]], loaded: LoadedModel, limit: int) -> list[list[int]]:
    """Return token ids of all chosen answers behind their prompts, then of all rejected ones, cut as in training."""
    sides = [loaded.template.encode_answers(loaded.tokenizer, [pair[kind] for pair in pairs]) for kind in ("chosen", "rejected")]
    return answer_by_answer(loaded.behind_prompts([pair["messages"] for pair in pairs], sides, limit))


def answer_by_answer(rows: list[tuple[list[int], ...]]) -> list[list[int]]:
    """Return the first answer of each row (prompt, answer, …) behind its prompt, then all second ones, and so on."""
    return [prompt + answers[place] for place in range(len(rows[0]) - 1) for prompt, *answers in rows]


def score_pairs(loaded: LoadedModel, rows: list[list[int]], batch_size: int) -> list[tuple[float, float]]:
    """Return (chosen, rejected) scores of each pair of encode_pairs."""
    scores = in_batches(lambda batch: loaded.scores([rows[row] for row in batch]), list(map(len, rows)), batch_size)
    half = len(rows) // 2
    return list(zip(scores[:half], scores[half:], strict=True))


def summary(scores: list[tuple[float, float]]) -> dict[str, float]:
    """Return the accuracy (a tie counts one half) with its interval, means and population standard deviations over the pairs."""
    chosen, rejected = zip(*scores, strict=True)
    margins = [good - bad for good, bad in scores]
    accuracy = wilson(float(pair_accuracy(torch.tensor(chosen), torch.tensor(rejected))) / len(scores), len(scores))
    return {
        "pairs": len(scores),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "chosen_mean": statistics.fmean(chosen),
        "rejected_mean": statistics.fmean(rejected),
        "mean": statistics.fmean(chosen + rejected),
        "std": statistics.pstdev(chosen + rejected),
        "margin_mean": statistics.fmean(margins),
        "margin_std": statistics.pstdev(margins),
    }


if __name__ == "__main__":
    run_main(main, ARGS)
