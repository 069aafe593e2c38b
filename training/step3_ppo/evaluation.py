"""How good is the actor on prompts that it never trained on - by the reward model, in length, and against its reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from training.step3_ppo.experience import Experience
from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine
from training.step3_ppo.rollout import roll_out, score_rollout
from training.utils.data.batching import collate_prompts

HELD_OUT = 0  # the rollout number that seeds evaluation: every evaluation samples with the same random numbers


def evaluate_prompts(engine: DeepSpeedRLHFEngine, dataset, args, *, step: int) -> dict[str, float]:
    """Sample answers to the first --eval_prompts held-out prompts, score and log them. {} if there are none.

    Returns means over prompts: score (the reward model's own unit), kl (nats a response), length (tokens), eos_rate.
    """
    run = engine.run
    count = min(args.eval_prompts, len(dataset))
    if count == 0:
        return {}
    width = math.ceil(count / run.world_size) * run.world_size
    mine = [position % count for position in range(width)][run.rank :: run.world_size]
    rows = [dataset[position] | {"index": position} for position in mine]
    prompts = collate_prompts(rows, pad_id=engine.tokenizer.pad_token_id).to(run.device)
    experience = roll_out(engine, prompts, args, HELD_OUT)
    first = {int(example): row for row, example in reversed(list(enumerate(experience.index.tolist())))}
    experience = experience.select(
        [first[example] for example in sorted(first)]
    )  # each prompt once, in the data's order
    score_rollout(engine, experience, args)
    kl = (experience.old_log_probs - experience.ref_log_probs).where(experience.action_mask.bool(), 0.0).sum(1)
    figures = {
        "score": float(experience.scores.mean()),
        "kl": float(kl.mean()),
        "length": float(experience.response_lengths.float().mean()),
        "eos_rate": float(experience.ended.float().mean()),
        "prompts": count,
    }
    run.metrics.log(step, figures, prefix="eval")
    if run.is_main:
        print(
            f"step {step}: held-out score {figures['score']:.3f}, KL {figures['kl']:.2f} nats, "
            f"length {figures['length']:.1f}, ended {figures['eos_rate']:.2f} over {count} prompts", flush=True
        )  # fmt: skip
        write_samples(experience, engine, step, "eval")
    return figures


def sample_table(experience: Experience, engine: DeepSpeedRLHFEngine, rows: int) -> list[dict[str, Any]]:
    """The first rows of a rollout as text: prompt, answer, score, length, ended."""
    table = []
    answer_width = experience.action_mask.shape[1]
    for row in range(min(rows, len(experience))):
        ids, mask = experience.input_ids[row], experience.attention_mask[row].bool()
        prompt = ids[:-answer_width][mask[:-answer_width]]
        answer = ids[-answer_width:][experience.action_mask[row].bool()]
        table.append({
            "prompt": engine.tokenizer.decode(prompt.tolist(), skip_special_tokens=True),
            "answer": engine.template.decode_answer(engine.tokenizer, answer.tolist()),
            "score": round(float(experience.scores[row]), 4),
            "length": int(experience.response_lengths[row]),
            "ended": bool(experience.ended[row]),
        })  # fmt: skip
    return table


def write_samples(experience: Experience, engine: DeepSpeedRLHFEngine, step: int, part: str, rows: int = 8) -> None:
    """Append a few answers to samples.jsonl and show them as a table in TensorBoard."""
    table = sample_table(experience, engine, rows)
    with (Path(engine.args.output_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
        for row in table:
            file.write(json.dumps({"step": step, "part": part} | row, ensure_ascii=False) + "\n")
    lines = ["| prompt | answer | score |", "|---|---|---|"]
    lines += [f"| {cell(row['prompt'])} | {cell(row['answer'])} | {row['score']:.3f} |" for row in table]
    engine.run.metrics.text(step, f"{part}/samples", "\n".join(lines))


def cell(text: str) -> str:
    """A text inside a Markdown table."""
    return text.strip().replace("|", "\\|").replace("\n", "<br>")
