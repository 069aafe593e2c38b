"""Evaluate the actor on held-out prompts: score, length, KL, and how often it beats the SFT model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from training.step3_ppo.experience import Experience
from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine
from training.step3_ppo.rollout import SamplerState, complete_experience, roll_out, score_answers
from training.utils.data.batching import PromptBatch, collate_prompts
from training.utils.loss import outcomes
from training.utils.run.metrics import rounded

HELD_OUT = 0  # the rollout number that seeds evaluation: every evaluation samples with the same random numbers
SAMPLES, TRAINING_SAMPLES = 8, 4  # answers of an evaluation and of a rollout that are kept as text


class HeldOut:
    """The first --eval_prompts held-out prompts, and what the reference (the SFT model) answers to them.

    The reference answers once, at the first evaluation of the process, with the same random numbers as the actor always: an
    actor that has learned nothing gives the same answers. After --resume they come out as before.
    """

    def __init__(self, engine: DeepSpeedRLHFEngine, dataset, args, sampler: SamplerState) -> None:
        self.engine, self.args, self.sampler = engine, args, sampler
        self.count = min(args.eval_prompts, len(dataset))
        self.reference: tuple[Tensor, list[str]] | None = None  # scores of all its answers, and the first ones as text
        if self.count:
            run = engine.run
            width = math.ceil(self.count / run.world_size) * run.world_size
            mine = [position % self.count for position in range(width)][run.rank :: run.world_size]
            rows = [dataset[position] | {"index": position} for position in mine]
            self.prompts = collate_prompts(rows, pad_id=engine.tokenizer.pad_token_id).to(run.device)

    def evaluate(self, step: int) -> dict[str, float]:
        """Sample answers, score and log them; {} without prompts. All processes call it.

        Returns means over prompts: score, each source's own where there are several, reference_score, win_rate, kl (nats a
        answer), length (tokens), eos_rate. Raises RewardError if a source of reward fails.
        """
        if self.count == 0:
            return {}
        engine, run = self.engine, self.engine.run
        if self.reference is None:
            answers = self._answers(engine.ref)
            score_answers(engine, answers, self.args)
            self.reference = answers.scores, engine.texts(answers.select(range(min(SAMPLES, self.count))))[1]
        experience = self._answers()
        complete_experience(engine, experience, self.args, self.sampler, with_values=False)
        reference_scores, reference_answers = self.reference
        kl = (experience.old_log_probs - experience.ref_log_probs).where(experience.action_mask.bool(), 0.0).sum(1)
        metrics = {
            "score": float(experience.scores.mean()),
            **engine.rewards.metrics(experience),
            "reference_score": float(reference_scores.mean()),
            "win_rate": win_rate(experience.scores, reference_scores),
            "kl": float(kl.mean()),
            "length": float(experience.answer_lengths.float().mean()),
            "eos_rate": float(experience.ended.float().mean()),
            "prompts": self.count,
        }
        run.metrics.log(step, metrics | {"measured_on": "held-out"}, prefix="eval")
        if run.is_main:
            line = f"held-out score {rounded(metrics['score'], 3)}, win rate {metrics['win_rate']:.2f} against the SFT model"
            line += f", KL {rounded(metrics['kl'], 2)} nats, length {metrics['length']:.1f}, ended {metrics['eos_rate']:.2f}"
            print(f"step {step}: {line} over {self.count} prompts", flush=True)
            write_samples(experience, engine, step, "eval", beside=beside_rows(reference_answers, reference_scores))
        return metrics

    def _answers(self, policy=None) -> Experience:
        """Return each prompt with one answer, once, in the order of the data; not scored yet."""
        rows = roll_out(self.engine, self.prompts, self.args, HELD_OUT, sampler=self.sampler, policy=policy)
        first = {int(example): row for row, example in reversed(list(enumerate(rows.index.tolist())))}
        return rows.select([first[example] for example in sorted(first)])


def reference_answers(
    engine: DeepSpeedRLHFEngine, prompts: PromptBatch, args, rollout: int, sampler: SamplerState
) -> list[dict[str, Any]]:
    """Return what the reference (the SFT model) answers to the first prompts of a rollout, as beside_rows. All processes call it.

    prompts: this process's of the rollout. The random numbers are those of the actor's answers, the scores those of all sources.
    Raises RewardError if a source of reward fails.
    """
    answers = args.num_return_sequences
    share = math.ceil(TRAINING_SAMPLES / answers / engine.run.world_size)
    first = PromptBatch(*(getattr(prompts, one.name)[:share] for one in fields(prompts)))
    rows = roll_out(engine, first, args, rollout, answers, sampler=sampler, policy=engine.ref)
    rows = rows.select(range(min(TRAINING_SAMPLES, len(rows))))
    score_answers(engine, rows, args)
    return beside_rows(engine.texts(rows)[1], rows.scores)


def beside_rows(answers: Sequence[str], scores: Tensor) -> list[dict[str, Any]]:
    """Return answers of the reference with their scores [rows] for write_samples; of the scores without an answer none."""
    scored = zip(answers, scores.tolist(), strict=False)
    return [{"reference": answer, "reference_score": round(score, 4)} for answer, score in scored]


def win_rate(scores: Tensor, reference_scores: Tensor) -> float:
    """Return the share of prompts whose answer scores higher than the reference's, a tie counting one half.

    scores, reference_scores: [prompts].
    """
    return float(outcomes(scores, reference_scores).mean())


def sample_table(experience: Experience, engine: DeepSpeedRLHFEngine, rows: int) -> list[dict[str, Any]]:
    """Return the first rows of a rollout as text: prompt, answer, score, length, ended; and the scores of several sources."""
    shown = experience.select(range(min(rows, len(experience))))
    table = []
    for row, (prompt, answer) in enumerate(zip(*engine.texts(shown), strict=True)):
        scores = {"score": float(shown.scores[row])} | engine.rewards.metrics(shown.select([row]))
        rounded = {name: round(value, 4) for name, value in scores.items()}
        ending = {"length": int(shown.answer_lengths[row]), "ended": bool(shown.ended[row])}
        table.append({"prompt": prompt, "answer": answer} | rounded | ending)
    return table


def write_samples(
    experience: Experience,
    engine: DeepSpeedRLHFEngine,
    step: int,
    part: str,
    rows: int = SAMPLES,
    beside: Sequence[dict[str, Any]] = (),
) -> None:
    """Append a few answers to samples.jsonl and show them as a table in TensorBoard.

    beside: for the first rows, the "reference" answer to the same prompt and its "reference_score".
    """
    table = sample_table(experience, engine, rows)
    for row, more in zip(table, beside, strict=False):
        row.update(more)
    with (Path(engine.args.output_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
        for row in table:
            file.write(json.dumps({"step": step, "part": part} | row, ensure_ascii=False) + "\n")
    columns = ["prompt", "answer", "score", *(name for name in ("reference", "reference_score") if beside)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cell(row[name]) for name in columns)} |" for row in table]
    engine.run.metrics.text(step, f"{part}/samples", "\n".join(lines))


def cell(value: str | float) -> str:
    """Write a text or a score inside a Markdown table."""
    text = value if isinstance(value, str) else f"{value:.3f}"
    return text.strip().replace("|", "\\|").replace("\n", "<br>")
