"""Measure what PPO changed: sampled answers to held-out prompts, their gold score, length and KL."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.engine import Generation, generate
from models.device import detect_platform, peak_memory_gb, set_device
from models.heads import TokenLogProbs
from models.load import load_causal_lm
from models.quiet import quiet_libraries
from models.templates import load_template
from models.tokenizer import load_tokenizer
from scripts.demo.pipeline import read_done
from training.utils.data.batching import pad_left
from training.utils.data.records import load_records

BATCH = 60  # prompts answered at once


def measure(output: Path, seed: int, limit: int, prompts: Path, gold: Callable[[Any, str], float]) -> dict[str, Any]:
    """Sample answers at temperature 1 from the SFT model and from the actor, with the same random numbers; score them.

    limit: number of prompts, 0 = all. prompts: the file they are in. gold: score of (messages, answer). Writes answers.jsonl.
    Returns "metrics" - kl is the mean over the actor's answers of sum_t log p_actor(t) - log p_sft(t), in nats - and
    "peak_memory_gb" of this process.
    """
    quiet_libraries()
    longest = read_done(output, "ppo")["flags"]["max_answer_seq_len"]
    dialogues = list(load_records(str(prompts), cache_dir=str(output / "cache"))["train"]["messages"])[: limit or None]
    before, after = sample_answers((output / "sft", output / "ppo" / "actor"), dialogues, seed, longest)
    for answers in (before, after):
        for messages, row in zip(dialogues, answers, strict=True):
            row["gold"] = gold(messages, row["text"])
    with (output / "answers.jsonl").open("w", encoding="utf-8") as out:
        for messages, old, new in zip(dialogues, before, after, strict=True):
            prompt = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
            row = {"prompt": prompt, "before": old["text"], "after": new["text"]}
            row |= {"gold_before": old["gold"], "gold_after": new["gold"]}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    metrics = {"eos_rate": mean(after, "ended"), "kl": mean(after, "kl")}
    for name, column in (("gold_score", "gold"), ("length", "length")):
        metrics |= {f"{name}_before": mean(before, column), f"{name}_after": mean(after, column)}
    return {"metrics": metrics, "peak_memory_gb": round(peak_memory_gb(), 3)}


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Return the mean of one column."""
    return sum(row[name] for row in rows) / len(rows)


def sample_answers(
    folders: Sequence[Path], dialogues: Sequence[Any], seed: int, longest: int
) -> list[list[dict[str, Any]]]:
    """Sample an answer to each dialogue from each model, with the same random numbers: seed + its place.

    An answer has text, tokens, length (end token included), ended, and kl to the first model, the others' reference.
    """
    device = set_device(detect_platform(), 0)
    tokenizer = load_tokenizer(folders[0])
    template = load_template(folders[0], tokenizer)
    stop, pad = template.stop_token_ids, tokenizer.pad_token_id
    policies = [TokenLogProbs(load_causal_lm(folder, dtype=torch.float32)).eval().to(device) for folder in folders]
    answers: list[list[dict[str, Any]]] = [[] for _ in folders]
    for start in range(0, len(dialogues), BATCH):
        prompts = template.encode_prompts(tokenizer, dialogues[start : start + BATCH])
        ids, mask = (tensor.to(device) for tensor in pad_left(prompts, pad))
        seeds = range(seed + start, seed + start + len(prompts))
        settings = {"max_new_tokens": longest, "stop_token_ids": stop, "pad_token_id": pad, "row_seeds": seeds}
        for policy, made in zip(policies, answers, strict=True):
            generation = generate(policy.model, ids, mask, **settings)
            kl = kl_to_reference(policy, policies[0], ids, mask, generation)
            for row, length in enumerate(generation.lengths.tolist()):
                tokens = generation.sequences[row, :length].tolist()
                numbers = {"length": length, "ended": bool(generation.ended[row]), "kl": float(kl[row])}
                made.append({"text": template.decode_answer(tokenizer, tokens), "tokens": tokens} | numbers)
    return answers


@torch.no_grad()
def kl_to_reference(
    policy: TokenLogProbs, reference: TokenLogProbs, ids: Tensor, mask: Tensor, generation: Generation
) -> Tensor:
    """Return the sum over each answer of log p_policy(t) - log p_reference(t), in nats: [rows]."""
    if policy is reference:
        return torch.zeros(len(ids))
    width = generation.sequences.shape[1]
    drawn = torch.arange(width, device=ids.device) < generation.lengths[:, None]
    whole = torch.cat([ids, generation.sequences], dim=1), torch.cat([mask, drawn.long()], dim=1)
    here, there = (one(*whole, keep=width) for one in (policy, reference))
    return (here - there).where(drawn, 0.0).sum(1)
