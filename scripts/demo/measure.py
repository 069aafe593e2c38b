"""Measure what PPO changed: sampled answers to held-out prompts, their gold score, length and KL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from inference.engine import generate
from models.device import detect_platform, peak_memory_gb, set_device
from models.heads import TokenLogProbs
from models.load import load_causal_lm, load_tokenizer
from models.templates import Template, load_template
from scripts.demo.pipeline import read_done
from training.step3_ppo.experience import Experience
from training.utils.data.batching import pad_left
from training.utils.data.records import load_records
from training.utils.run.process_group import quiet_libraries

BATCH = 60  # prompts answered at once


def measure(
    output: Path, seed: int, limit: int, prompts: Path, gold: Callable[[Any, str], float]
) -> dict[str, Any]:
    """Sample answers at temperature 1 from the SFT model and from the actor, with the same random numbers; score them.

    limit: number of prompts, 0 = all. prompts: the file they are in. gold: score of (messages, answer). Writes answers.jsonl.
    Returns "metrics" - kl is the mean over the actor's answers of sum_t log p_actor(t) - log p_sft(t), in nats - and
    "peak_memory_gb" of this process.
    """
    quiet_libraries()
    device = set_device(detect_platform(), 0)
    tokenizer = load_tokenizer(output / "sft")
    template = load_template(output / "sft", tokenizer)
    longest = read_done(output, "ppo")["flags"]["max_answer_seq_len"]
    dialogues = load_records(str(prompts), cache_dir=str(output / "cache"))["train"]["messages"]
    dialogues = list(dialogues)[: limit or None]
    sft, actor = (load_policy(folder).to(device) for folder in (output / "sft", output / "ppo" / "actor"))
    before, after = [], []
    for start in range(0, len(dialogues), BATCH):
        chunk = dialogues[start : start + BATCH]
        seeds = [seed + start + row for row in range(len(chunk))]
        before += answer(sft, None, chunk, seeds, tokenizer, template, longest)
        after += answer(actor, sft, chunk, seeds, tokenizer, template, longest)
    for answers in (before, after):
        for messages, row in zip(dialogues, answers, strict=True):
            row["gold"] = gold(messages, row["text"])
    write_answers(output / "answers.jsonl", dialogues, before, after)
    metrics = {"eos_rate": mean(after, "ended"), "kl": mean(after, "kl")}
    for name, column in (("gold_score", "gold"), ("length", "length")):
        metrics |= {f"{name}_before": mean(before, column), f"{name}_after": mean(after, column)}
    return {"metrics": metrics, "peak_memory_gb": round(peak_memory_gb(), 3)}


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Return the mean of one column."""
    return sum(row[name] for row in rows) / len(rows)


def load_policy(folder: Path) -> TokenLogProbs:
    """Load a language model in float32, ready to answer and to give log-probabilities."""
    return TokenLogProbs(load_causal_lm(folder, dtype=torch.float32)).eval()


def write_answers(file: Path, dialogues: Sequence[Any], before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """Write prompt, both answers and both gold scores, a JSON line a prompt."""
    with file.open("w", encoding="utf-8") as out:
        for messages, old, new in zip(dialogues, before, after, strict=True):
            prompt = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
            row = {"prompt": prompt, "before": old["text"], "after": new["text"]}
            row |= {"gold_before": old["gold"], "gold_after": new["gold"]}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def answer(
    policy: TokenLogProbs,
    reference: TokenLogProbs | None,
    dialogues: Sequence[Any],
    seeds: list[int],
    tokenizer: Any,
    template: Template,
    longest: int,
) -> list[dict[str, Any]]:
    """Sample one answer to each dialogue: text, tokens, length (end token included), ended, kl (0 without a reference)."""
    device = next(policy.parameters()).device
    prompts = template.encode_prompts(tokenizer, dialogues)
    ids, mask = (tensor.to(device) for tensor in pad_left(prompts, tokenizer.pad_token_id))
    stop, pad = template.stop_token_ids, tokenizer.pad_token_id
    settings = {"max_new_tokens": longest, "stop_token_ids": stop, "pad_token_id": pad, "row_seeds": seeds}
    generation = generate(policy.model, ids, mask, **settings)
    rows = Experience.from_generation(ids, mask, generation, torch.arange(len(prompts)), pad)
    kl = torch.zeros(len(prompts))
    if reference is not None:
        width = rows.action_mask.shape[1]
        with torch.no_grad():
            here, there = (one(rows.input_ids, rows.attention_mask, keep=width) for one in (policy, reference))
        kl = (here - there).where(rows.action_mask, 0.0).sum(1)
    answers = []
    for row, (length, ended) in enumerate(zip(generation.lengths.tolist(), generation.ended.tolist(), strict=True)):
        tokens = generation.sequences[row, :length].tolist()
        text = template.decode_answer(tokenizer, tokens)
        answers.append({"text": text, "tokens": tokens, "length": length, "ended": ended, "kl": float(kl[row])})
    return answers
