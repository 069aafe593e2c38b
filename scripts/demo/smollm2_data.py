"""The data of the smollm2 preset: prompts of our own, answers by the models themselves, sampled with the rollout engine.

    python -m scripts.demo.smollm2_data sft output/smollm2/base output/smollm2/data
    python -m scripts.demo.smollm2_data pairs output/smollm2/sft output/smollm2/data

sft    the first sentence of each answer of the pretrained model, sampled coolly; kept if it is whole and repeats nothing.
       The model learns from itself to be brief and to end; no answer is chosen for its tone.
pairs  four answers of the SFT model to each prompt; the best and the worst by the gold score are a pair, so are the two
       between, where they differ enough.
Both also write the prompts that need no answer: ppo.jsonl and heldout.jsonl. A file is written whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from errors import UserError, told
from scripts.demo.smollm2_prompts import prompts_of
from scripts.demo.smollm2_score import games, load_analyzer, plain, vader_score

LONGEST = 28  # tokens of an answer, end token included; configs/cpu/smollm2.yaml lets PPO's answers have as many
BATCH = 64  # answers in work at a time
SFT_SAMPLING = {"temperature": 0.7, "top_p": 0.95}  # at 1.0 the 4-bit model often loses its thread
PAIR_ANSWERS = 4
LEAST_RECORDS = 8
SENTENCE = re.compile(r"[A-Z][^.!?\n]*[a-z)\"'][.!?](?=\s|$)")
LEAST_DIFFERENCE = 0.2  # in gold score between the answers of a pair

Messages = list[dict[str, str]]


def write_lines(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file, under another name until it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    draft.replace(file)


def write_prompts(folder: Path, seed: int) -> None:
    """Write ppo.jsonl and heldout.jsonl."""
    for part in ("ppo", "heldout"):
        write_lines(folder / f"{part}.jsonl", ({"messages": prompt} for prompt in prompts_of(part, seed)))


def first_sentence(answer: str) -> str:
    """Return the first sentence of an answer; "" if it is not whole, not plain text, or a game (too short, or repetitive)."""
    found = SENTENCE.match(answer)
    sentence = found.group() if found and found.group().isascii() else ""
    return "" if games(plain(sentence), load_analyzer().lexicon) else sentence


def sft_records(prompts: Sequence[Messages], answers: Sequence[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Return dialogues to imitate. answers: (text, ended), one to each prompt."""
    return [
        {"messages": [*prompt, {"role": "assistant", "content": sentence}]}
        for prompt, (answer, _) in zip(prompts, answers, strict=True)
        if (sentence := first_sentence(answer))
    ]


def pair_records(prompts: Sequence[Messages], answers: Sequence[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Return preference pairs by the gold score. answers: (text, ended), PAIR_ANSWERS to each prompt, prompt after prompt."""
    records = []
    for place, prompt in enumerate(prompts):
        texts = [text for text, _ in answers[place * PAIR_ANSWERS : (place + 1) * PAIR_ANSWERS] if text]
        ranked = sorted(texts, key=vader_score, reverse=True)
        for chosen, rejected in zip(ranked, reversed(ranked), strict=True):
            if vader_score(chosen) - vader_score(rejected) >= LEAST_DIFFERENCE:
                records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return records


def sample(
    model_folder: Path, prompts: Sequence[Messages], each: int, seed: int, **sampling: float
) -> list[tuple[str, bool]]:
    """Sample `each` answers to each prompt; return (text, ended), those to one prompt together."""
    import torch

    from inference.engine import generate_many
    from models.device import detect_platform, set_device
    from models.load import load_causal_lm, load_tokenizer
    from models.templates import load_template
    from training.utils.run.process_group import quiet_libraries

    quiet_libraries()
    device = set_device(detect_platform(), 0)
    tokenizer = load_tokenizer(model_folder)
    template = load_template(model_folder, tokenizer)
    model = load_causal_lm(model_folder, dtype=torch.float32).to(device)
    found = generate_many(
        model,
        template.encode_prompts(tokenizer, prompts),
        max_batch=BATCH,
        num_return_sequences=each,
        row_seeds=[seed * 1_000_003 + row for row in range(len(prompts) * each)],
        max_new_tokens=LONGEST,
        stop_token_ids=template.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    rows = zip(found.sequences.tolist(), found.lengths.tolist(), found.ended.tolist(), strict=True)
    return [(template.decode_answer(tokenizer, tokens[:length]), ended) for tokens, length, ended in rows]


@told
def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("sft", "pairs"))
    parser.add_argument("model", type=Path, help="folder of the model that answers")
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--limit", type=int, default=0, help="only so many prompts; 0 = all")
    args = parser.parse_args()
    write_prompts(args.folder, seed=0)
    prompts = prompts_of(args.part)[: args.limit or None]
    if args.part == "sft":
        answers = sample(args.model, prompts, 1, args.seed, **SFT_SAMPLING)
        records = sft_records(prompts, answers)
    else:
        answers = sample(args.model, prompts, PAIR_ANSWERS, args.seed)
        records = pair_records(prompts, answers)
    mean = sum(vader_score(text) for text, _ in answers) / len(answers)
    ended = sum(ended for _, ended in answers) / len(answers)
    counts = f"{len(answers)} answers to {len(prompts)} prompts, gold score {mean:.3f}, {ended:.0%} ended"
    if len(records) < LEAST_RECORDS:
        raise UserError(f"{args.model} gave {counts}: {len(records)} of use, {LEAST_RECORDS} are needed; is it the right model?")
    write_lines(args.folder / f"{args.part}.jsonl", records)
    print(f"{counts}: {len(records)} records in {args.folder / args.part}.jsonl", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
