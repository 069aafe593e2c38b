"""The prompts of the smollm2 preset: everyday things, asked about in a few ways. Shipped here, so nothing is downloaded.

Each topic belongs to one part: the SFT answers, the preference pairs, PPO's prompts, the held-out prompts that measure. So no
step trains on what it is measured on, nor on what another step has seen.
"""

from pathlib import Path
from random import Random

import yaml

_PROMPTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
FORMS, TOPICS = _PROMPTS["forms"], _PROMPTS["topics"]
SYSTEM = "Answer in one short sentence."  # its own default is eighteen tokens, and its answers are long
PARTS = {"sft": 32, "pairs": 20, "ppo": 32, "heldout": 12}  # topics of each


def topics_of(part: str, seed: int = 0) -> list[str]:
    """Return the topics of one part; the same seed gives the same division."""
    topics = list(TOPICS)
    Random(f"smollm2 {seed}").shuffle(topics)
    names = list(PARTS)
    start = sum(PARTS[name] for name in names[: names.index(part)])
    return topics[start : start + PARTS[part]]


def prompts_of(part: str, seed: int = 0) -> list[list[dict[str, str]]]:
    """Return the dialogues of one part in random order: every topic in every form."""
    texts = [form.format(x=topic) for topic in topics_of(part, seed) for form in FORMS]
    Random(f"smollm2 {part} {seed}").shuffle(texts)
    return [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in texts]
