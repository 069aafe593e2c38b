"""The one judge of benchmarks/ppo_learning.py: gold score and KL of a saved policy's answers to held-out prompts.

    python -m benchmarks.ppo_learning_evaluate --task demo --sft SFT --prompts prompts_heldout.jsonl --answers 2 FOLDER …

Whoever trained a policy, its answers are sampled here, at temperature 1, with the same random numbers for every policy. Prints a
JSON line for each FOLDER. kl is the mean over answers of sum_t log p_policy(t) - log p_sft(t) over the answer's tokens, in nats.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH = 240  # answers sampled at once
MICRO_BATCH_TOKENS = 1024
SEED = 10**9  # of the first answer


class Sampler:
    """Answers of saved policies, and their KL from the SFT model.

    sft: the SFT model's folder; tokenizer and template are read from there.
    """

    def __init__(self, sft: Path, answer_tokens: int) -> None:
        from models.load import load_tokenizer
        from models.templates import load_template

        self.tokenizer = load_tokenizer(sft)
        self.template = load_template(sft, self.tokenizer)
        self.answer_tokens = answer_tokens
        self.sft = self.load(sft)

    def load(self, folder: Path) -> Any:
        """The policy in a folder, in float32, ready for answers()."""
        import torch

        from models.heads import TokenLogProbs
        from models.load import load_causal_lm

        return TokenLogProbs(load_causal_lm(folder, dtype=torch.float32)).eval()

    def answers(self, policy: Any, dialogues: Sequence[Any], first_seed: int = SEED, kl: bool = False) -> list[dict[str, Any]]:
        """One sampled answer to each dialogue: text, length (tokens, the end token included), ended, kl (0 unless asked)."""
        import torch

        from inference.engine import generate_many
        from training.step3_ppo.experience import Experience
        from training.utils.data.batching import pad_left

        pad_id = self.tokenizer.pad_token_id
        prompts = self.template.encode_prompts(self.tokenizer, dialogues)
        found = generate_many(
            policy.model, prompts, max_batch=BATCH, row_seeds=[first_seed + row for row in range(len(prompts))],
            max_new_tokens=self.answer_tokens, stop_token_ids=self.template.stop_token_ids, pad_token_id=pad_id,
        )  # fmt: skip
        # Of what was drawn, the sampler knows the policy's log-probabilities already.
        spent = found.log_probs.sum(1)
        rows = Experience.from_generation(*pad_left(prompts, pad_id), found, torch.arange(len(prompts)), pad_id)
        gaps = torch.zeros(len(prompts))
        if kl:
            gaps = spent - self._log_probs(rows).sum(1)
        texts = [
            self.template.decode_answer(self.tokenizer, row[:length].tolist())
            for row, length in zip(found.sequences, found.lengths.tolist(), strict=True)
        ]
        columns = (texts, found.lengths.tolist(), found.ended.tolist(), gaps.tolist())
        return [dict(zip(("text", "length", "ended", "kl"), row, strict=True)) for row in zip(*columns, strict=True)]

    def _log_probs(self, rows: Any) -> Any:
        """What the SFT model says of the answers' tokens, [rows, answer], 0 after their ends; like beside like."""
        import torch

        from training.utils.data.batching import plan_micro_batches

        found = torch.zeros(rows.action_mask.shape)
        for places in plan_micro_batches(rows.total_lengths(), 1, None, MICRO_BATCH_TOKENS)[0]:
            part = rows.select(places).trimmed()
            width = part.action_mask.shape[1]
            found[places, :width] = self.sft(part.input_ids, part.attention_mask, keep=width).where(part.action_mask, 0.0)
        return found


def judge(sampler: Sampler, folder: Path, task: Any, dialogues: Sequence[Any], answers: int) -> dict[str, float]:
    """Means over the given number of answers to each dialogue: gold, kl, length, ended; standard errors of the first two."""
    repeated = [dialogue for _ in range(answers) for dialogue in dialogues]
    rows = sampler.answers(sampler.load(folder), repeated, kl=True)
    gold = [task.gold(dialogue, row["text"]) for dialogue, row in zip(repeated, rows, strict=True)]
    kl = [row["kl"] for row in rows]
    return {
        "gold": statistics.fmean(gold), "gold_se": standard_error(gold), "kl": statistics.fmean(kl), "kl_se": standard_error(kl),
        "length": statistics.fmean(row["length"] for row in rows), "ended": statistics.fmean(row["ended"] for row in rows),
        "answers": len(rows), "example": rows[0]["text"],
    }  # fmt: skip


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def read_dialogues(file: Path, limit: int = 0) -> list[Any]:
    """The prompts of a file as messages; limit: so many of them, 0 = all."""
    from training.utils.data.sources import load_records

    return list(load_records(str(file))["train"]["messages"])[: limit or None]


def main() -> None:
    """Command line."""
    from benchmarks.ppo_learning_tasks import TASKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--sft", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="so many prompts; 0 = all")
    parser.add_argument("--answers", type=int, default=2, help="answers to each prompt (%(default)s)")
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args()

    import torch

    torch.set_grad_enabled(False)
    task = TASKS[args.task]
    sampler = Sampler(args.sft, task.answer_tokens)
    dialogues = read_dialogues(args.prompts, args.limit)
    for folder in args.folders:
        print(json.dumps({"folder": str(folder)} | judge(sampler, folder, task, dialogues, args.answers)), flush=True)


if __name__ == "__main__":
    main()
