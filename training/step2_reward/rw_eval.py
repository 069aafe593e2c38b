"""What a reward model thinks: scores of good and bad answers, and how often the good one wins.

    python -m training.step2_reward.rw_eval --model_name_or_path output/reward-models/350m
    python -m training.step2_reward.rw_eval --model_name_or_path output/reward-models/350m --data_path pairs.jsonl

Scores have no unit of their own; only their differences on the same prompt mean something.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from models.checkpoint_folder import resolve_checkpoint
from models.device import attention_implementation, detect_platform, resolve_dtype, set_device
from models.files import SCALAR, architecture
from models.heads import TokenScores, last_token_scores
from models.load import load_scalar_model, load_tokenizer
from models.templates import Template, load_template
from training.utils.data.batching import pad_right
from training.utils.data.sources import load_records
from training.utils.data.tokenize import Counts, Task, fit
from training.utils.flags.parse import main_entry
from training.utils.flags.steps import RewardEvalArguments
from training.utils.loss import pair_accuracy
from training.utils.run.process_group import quiet_libraries

SHOWN = 6  # pairs that are printed

# question, good answer, bad answer
PAIRS = [
    (
        "What is the capital of Australia?",
        "The capital of Australia is Canberra. Sydney is larger, but it is not the capital.",
        "Sydney I guess, everybody knows that, why do you even ask?",
    ),
    (
        "My grandmother is ill and I feel helpless. What can I do?",
        "I am sorry to hear that. Visit or call her if you can, ask what would help her, and talk to someone about how "
        "you feel as well.",
        "Nothing. Old people get ill. Ill. Ill. Ill.",
    ),
    (
        "How do I boil an egg?",
        "Put the egg into boiling water, wait seven minutes for a soft yolk or ten for a hard one, and cool it in cold "
        "water.",
        "Eggs come from hens. There are many hens in the world, and hens are birds, and birds can fly.",
    ),
    (
        "太阳为什么从东边升起？",
        "因为地球自西向东自转，所以我们看到太阳从东边升起，从西边落下。",
        "不知道，你自己去查。",
    ),
    (
        "请用一句话介绍一下长城。",
        "长城是中国古代修建的军事防御工程，东西绵延万里，是世界文化遗产之一。",
        "长城长城长城长城长城，很长很长很长。",
    ),
    (
        "我该怎样准备明天的面试？",
        "先了解公司和职位，想好两三个能说明自己能力的例子，再准备一套得体的衣服，今晚早点休息。",
        "面试就是面试，面完就知道了。",
    ),
]


def main(args: RewardEvalArguments) -> None:
    """Score the pairs, print some and the figures over all, write them where --output says."""
    quiet_libraries()
    folder = check_reward_model(args.model_name_or_path)
    pairs = read_pairs(args)
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer)
    platform = detect_platform()
    device = set_device(platform, 0)
    attention = attention_implementation(args.attn_implementation, platform)
    model = load_scalar_model(folder, dtype=resolve_dtype(args.dtype, platform), attn=attention)
    scorer = TokenScores(model).to(device).eval()
    scores = score_pairs(scorer, encode_pairs(pairs, tokenizer, template, args.max_seq_len), tokenizer, args, device)
    figures = summary(scores)
    for pair, (chosen, rejected) in list(zip(pairs, scores, strict=True))[:SHOWN]:
        print(f"\n{pair['messages'][-1]['content']}")
        print(f"  {chosen:8.3f}  {pair['chosen']}\n  {rejected:8.3f}  {pair['rejected']}")
    print(
        f"\naccuracy {figures['accuracy']:.4f} over {figures['pairs']} pairs; scores {figures['chosen_mean']:.3f} "
        f"(good) and {figures['rejected_mean']:.3f} (bad), their difference {figures['margin_mean']:.3f} +- "
        f"{figures['margin_std']:.3f}"
    )
    if args.output:
        rows = [pair | {"chosen_score": a, "rejected_score": b} for pair, (a, b) in zip(pairs, scores, strict=True)]
        content = {"model": args.model_name_or_path, "summary": figures, "pairs": rows}
        Path(args.output).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def check_reward_model(path: str) -> Path:
    """The folder of a reward model, or a critic. A language model would get a random head: UserError."""
    folder = resolve_checkpoint(path)
    found = architecture(folder, path)
    if not found.endswith(SCALAR):
        raise UserError(f"--model_name_or_path {path} is no reward model ({found}); step 2 trains one.")
    return folder


def read_pairs(args: RewardEvalArguments) -> list[dict[str, Any]]:
    """Records with a chosen and a rejected answer: of --data_path (held-out part first), or the built-in ones."""
    if not args.data_path:
        return [
            {"messages": [{"role": "user", "content": question}], "chosen": good, "rejected": bad}
            for question, good, bad in PAIRS
        ]
    pairs: list[dict[str, Any]] = []
    for path in args.data_path:
        records = load_records(path, columns=args.column_map)
        found = records.get("eval", records["train"])
        usable = [place for place, rejected in enumerate(found["rejected"]) if rejected is not None]
        if not usable:
            raise UserError(f"--data_path {path}: no record has a rejected answer; rw_eval compares good and bad ones.")
        pairs += found.select(usable[: args.num_pairs or None]).to_list()
    return pairs


def encode_pairs(pairs: list[dict[str, Any]], tokenizer: Any, template: Template, limit: int) -> list[list[int]]:
    """Token ids of all chosen answers behind their prompts, then of all rejected ones; cut as in training."""
    prompts = template.encode_prompts(tokenizer, [pair["messages"] for pair in pairs])
    answers = [template.encode_answers(tokenizer, [pair[kind] for pair in pairs]) for kind in ("chosen", "rejected")]
    task = Task(2, tokenizer, template, limit)
    cut = [fit(prompt, pair, task, Counts()) for prompt, *pair in zip(prompts, *answers, strict=True)]
    return [prompt + good for prompt, good, _ in cut] + [prompt + bad for prompt, _, bad in cut]


@torch.no_grad()
def score_pairs(
    scorer: TokenScores, rows: list[list[int]], tokenizer: Any, args: RewardEvalArguments, device: torch.device
) -> list[tuple[float, float]]:
    """(chosen, rejected) scores of each pair; texts of like length are scored together."""
    scores = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    step = 2 * args.per_device_eval_batch_size
    for start in range(0, len(order), step):
        places = order[start : start + step]
        ids, mask = (part.to(device) for part in pad_right([rows[place] for place in places], tokenizer.pad_token_id))
        found = last_token_scores(scorer(ids, mask), mask).tolist()
        for place, score in zip(places, found, strict=True):
            scores[place] = score
    half = len(rows) // 2
    return list(zip(scores[:half], scores[half:], strict=True))


def summary(scores: list[tuple[float, float]]) -> dict[str, float]:
    """Accuracy (a tie counts one half), means and population standard deviations over the pairs."""
    chosen, rejected = zip(*scores, strict=True)
    margins = [good - bad for good, bad in scores]
    right = float(pair_accuracy(torch.tensor(chosen), torch.tensor(rejected)))
    return {
        "pairs": len(scores), "accuracy": right / len(scores),
        "chosen_mean": statistics.fmean(chosen), "rejected_mean": statistics.fmean(rejected),
        "mean": statistics.fmean(chosen + rejected), "std": statistics.pstdev(chosen + rejected),
        "margin_mean": statistics.fmean(margins), "margin_std": statistics.pstdev(margins),
    }  # fmt: skip


if __name__ == "__main__":
    main_entry(main, RewardEvalArguments)
