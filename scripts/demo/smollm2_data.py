"""The data of the smollm2 preset: prompts of our own, answers by the models themselves, sampled with the rollout engine.

    python -m scripts.demo.smollm2_data sft output/smollm2/base output/smollm2/data
    python -m scripts.demo.smollm2_data pairs output/smollm2/sft output/smollm2/data

sft    the first sentence of each answer of the pretrained model, sampled coolly; kept if it is whole and repeats nothing.
       The model learns from itself to be brief and to end; no answer is chosen for its tone.
pairs  four answers of the SFT model to each prompt; the best and the worst by the gold score are a pair, so are the two
       between, where they differ enough.
Both also write the prompts that need no answer: ppo.jsonl and heldout.jsonl. A file is written whole or not at all.

The prompts are everyday topics, asked about in a few ways. Each topic belongs to one part, so no step trains on what it is
measured on, nor on what another step has seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import yaml

from errors import UserError, told
from scripts.demo.smollm2_score import games, load_analyzer, plain, vader_score

if TYPE_CHECKING:
    from training.evaluate.common import Answer

FOLDER = Path(__file__).parent
_PROMPTS = yaml.safe_load((FOLDER / "smollm2_prompts.yaml").read_text(encoding="utf-8"))
FORMS, TOPICS = _PROMPTS["forms"], _PROMPTS["topics"]
SYSTEM = "Answer in one short sentence."  # its own default is eighteen tokens, and its answers are long
PARTS = {"sft": 32, "pairs": 20, "ppo": 32, "heldout": 12}  # topics of each
LONGEST = 28  # tokens of an answer, end token included; configs/cpu/smollm2.yaml lets PPO's answers have as many
BATCH = 64  # answers in work at a time
SFT_SAMPLING = {"temperature": 0.7, "top_p": 0.95}  # at 1.0 the 4-bit model often loses its thread
PAIR_ANSWERS = 4
LEAST_RECORDS = 8
SENTENCE = re.compile(r"[A-Z][^.!?\n]*[a-z)\"'][.!?](?=\s|$)")
LEAST_DIFFERENCE = 0.2  # in gold score between the answers of a pair

Messages = list[dict[str, str]]


def code_digest() -> str:
    """Return a digest of the files that make the data."""
    files = ("smollm2_data.py", "smollm2_prompts.yaml", "smollm2_score.py")
    return hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in files)).hexdigest()


def topics_of(part: str, seed: int = 0) -> list[str]:
    """Return the topics of one part; the same seed gives the same division."""
    topics = list(TOPICS)
    Random(f"smollm2 {seed}").shuffle(topics)
    names = list(PARTS)
    start = sum(PARTS[name] for name in names[: names.index(part)])
    return topics[start : start + PARTS[part]]


def prompts_of(part: str, seed: int = 0) -> list[Messages]:
    """Return the dialogues of one part in random order: every topic in every form."""
    texts = [form.format(x=topic) for topic in topics_of(part, seed) for form in FORMS]
    Random(f"smollm2 {part} {seed}").shuffle(texts)
    return [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in texts]


def write_lines(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file, under another name until it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    draft.replace(file)


def first_sentence(answer: str) -> str:
    """Return the first sentence of an answer; "" if it is not whole, not plain text, or a game (too short, or repetitive)."""
    match = SENTENCE.match(answer)
    sentence = match.group() if match and match.group().isascii() else ""
    return "" if games(plain(sentence), load_analyzer().lexicon) else sentence


def sft_records(prompts: Sequence[Messages], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Return dialogues to imitate, of one answer to each prompt."""
    kept = [(prompt, sentence) for prompt, answer in zip(prompts, answers, strict=True) if (sentence := first_sentence(answer))]
    return [{"messages": [*prompt, {"role": "assistant", "content": sentence}]} for prompt, sentence in kept]


def pair_records(prompts: Sequence[Messages], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Return preference pairs by the gold score, of PAIR_ANSWERS answers to each prompt, prompt after prompt."""
    records = []
    for number, prompt in enumerate(prompts):
        texts = filter(None, answers[number * PAIR_ANSWERS : (number + 1) * PAIR_ANSWERS])
        ranked = sorted(texts, key=vader_score, reverse=True)
        for chosen, rejected in zip(ranked, reversed(ranked), strict=True):
            if vader_score(chosen) - vader_score(rejected) >= LEAST_DIFFERENCE:
                records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return records


def sample(model: Path, prompts: Sequence[Messages], each: int, seed: int, **sampling: float) -> list[Answer]:
    """Sample `each` answers to each prompt; those to one prompt stand together."""
    from models.checkpoint_folder import open_checkpoint
    from models.quiet import quiet_libraries
    from training.evaluate.common import load_for_evaluation

    quiet_libraries()
    loaded = load_for_evaluation(open_checkpoint(model), "fp32", "auto")
    return loaded.answer(
        loaded.template.encode_prompts(loaded.tokenizer, prompts),
        max_batch=BATCH,
        num_return_sequences=each,
        row_seeds=[seed * 1_000_003 + row for row in range(len(prompts) * each)],
        max_new_tokens=LONGEST,
        **sampling,
    )


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
    for part in ("ppo", "heldout"):
        write_lines(args.folder / f"{part}.jsonl", ({"messages": prompt} for prompt in prompts_of(part)))
    prompts = prompts_of(args.part)[: args.limit or None]
    each, sampling, records_of = (1, SFT_SAMPLING, sft_records) if args.part == "sft" else (PAIR_ANSWERS, {}, pair_records)
    answers = sample(args.model, prompts, each, args.seed, **sampling)
    records = records_of(prompts, [answer.text for answer in answers])
    mean = sum(vader_score(answer.text) for answer in answers) / len(answers)
    ended = sum(answer.ended for answer in answers) / len(answers)
    counts = f"{len(answers)} answers to {len(prompts)} prompts, gold score {mean:.3f}, {ended:.0%} ended"
    if len(records) < LEAST_RECORDS:
        raise UserError(f"{args.model} gave {counts}: {len(records)} of use, {LEAST_RECORDS} are needed; is it the right model?")
    write_lines(args.folder / f"{args.part}.jsonl", records)
    print(f"{counts}: {len(records)} records in {args.folder / args.part}.jsonl", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
