"""The two tasks of benchmarks/ppo_learning.py: data, gold score, and the SFT and reward models that all trainings start from.

demo       the closed world of scripts/demo/world.py; gold is the rule in scripts/demo/score.py
sentiment  real text: go on with the first words of a film review (../shared/data/sentiment); gold is a fixed list of words

In both, PPO sees a reward model alone, never the gold score. It learned from pairs that the gold score ordered.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.demo.score import demo_score

ROOT = Path(__file__).resolve().parents[1]
REVIEWS = Path("data/sentiment/reviews_en.jsonl")
FIRST_WORDS = 4  # of a review are its prompt
WORDS = (8, 26)  # reviews that long are used: the rest of most of them fits the answer
HELD_OUT_SHARE = 8
PAIR_ANSWERS = 6  # of the SFT model to each training prompt; the reward model's pairs are made of them
# What a folder of results was begun with, beside its budget: these, and these fields of each task.
TASK_SETTINGS = {
    "first words": FIRST_WORDS, "words": list(WORDS), "held-out share": HELD_OUT_SHARE, "answers for pairs": PAIR_ANSWERS,
}  # fmt: skip
TASK_FIELDS = ("answer_tokens", "sft_epochs", "reward_epochs")

# Everyday words of praise and of blame. Of the 2000 labelled reviews 898 score other than 0.5, 78 % of them on their label's side.
PRAISE = """
    admirable amazing amusing astonishing beautiful beautifully best brilliant captivating charm charming clever
    compelling delight delightful dazzling elegant engaging enjoy enjoyable entertaining enthralling excellent exciting
    fascinating fine fresh fun funny gem good gorgeous great happy heartfelt hilarious impressive insightful inspired
    inspiring intelligent intriguing joy likable lively love lovely magnificent marvelous masterful masterpiece memorable
    moving perfect perfectly pleasant pleasure poignant powerful refreshing remarkable rewarding rich satisfying smart
    solid splendid strong stunning superb sweet talented tender terrific thoughtful thrilling touching triumph vivid warm
    winning wise witty wonderful worth
"""
BLAME = """
    absurd annoying awful awkward bad banal bland boring careless cheap cliche cliches clumsy cold confused confusing
    contrived crude dated depressing disappointing disappointment disaster dreadful dreary dull embarrassing empty fail
    fails failure fake flat forced forgettable formulaic hollow horrible inane inept irritating lacking lacks lame lazy
    lifeless mediocre mess messy mindless miserable monotonous obvious offensive overlong painful pathetic plodding pointless
    poor poorly predictable pretentious ridiculous sad shallow silly sloppy slow stale stupid tedious terrible tired
    tiresome trite ugly unfunny uninteresting unpleasant waste wasted weak worse worst wrong
"""


@dataclass(frozen=True)
class Task:
    """What is trained on and how it is measured.

    gold(messages, answer) is in [0, 1]. answer_tokens: the longest answer. sft_epochs, reward_epochs: passes over data.
    """

    name: str
    gold: Callable[[Sequence[dict[str, str]], str], float]
    answer_tokens: int
    sft_epochs: int
    reward_epochs: int


def sentiment(messages: Sequence[dict[str, str]], answer: str) -> float:
    """(2 + number of different words of praise - number of different words of blame) / 4, kept in [0, 1].

    Different words, and no more than two: the same word again and again is worth nothing more.
    """
    words = set(re.findall(r"[a-z']+", answer.lower()))
    return min(max(2 + len(words & _words(PRAISE)) - len(words & _words(BLAME)), 0), 4) / 4


@cache
def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TASKS = {
    task.name: task
    for task in (
        Task("demo", demo_score, answer_tokens=24, sft_epochs=4, reward_epochs=3),
        Task("sentiment", sentiment, answer_tokens=32, sft_epochs=5, reward_epochs=3),
    )
}


def data_folder(task: Task, folder: Path) -> Path:
    """Where the task's sft_train, pairs_train, prompts_train and prompts_heldout .jsonl are."""
    return ROOT / "data/demo" if task.name == "demo" else folder / "data"


def write_sentiment_data(folder: Path, shared: Path) -> None:
    """All files but the pairs, from the film reviews. Raises UserError if they are not there."""
    file = shared / REVIEWS
    if not file.is_file():
        raise UserError(f"--shared {shared}: {REVIEWS} is not there; name the folder of reference data, or --tasks demo.")
    texts = [json.loads(line)["text"].split() for line in file.read_text(encoding="utf-8").splitlines()]
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, Any]]] = {"sft_train": [], "prompts_train": [], "prompts_heldout": []}
    seen = set()
    for words in texts:
        start, rest = " ".join(words[:FIRST_WORDS]), " ".join(words[FIRST_WORDS:])
        if not WORDS[0] <= len(words) <= WORDS[1] or start in seen:
            continue
        seen.add(start)
        record = {"prompt": render(start)}
        if int(hashlib.sha256(start.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0:
            files["prompts_heldout"].append(record)
            continue
        files["prompts_train"].append(record)
        messages = [{"role": "user", "content": start}, {"role": "assistant", "content": rest}]
        files["sft_train"].append({"messages": messages})
    for name, records in files.items():
        write_jsonl(folder / f"{name}.jsonl", records)


def write_sentiment_pairs(folder: Path, sft: Path, answer_tokens: int) -> int:
    """pairs_train.jsonl: of the SFT model's answers to a prompt the best with the worst, the second best with the second worst,
    where gold tells them apart. Returns their number.
    """
    from benchmarks.ppo_learning_evaluate import Sampler

    sampler = Sampler(sft, answer_tokens)
    records = read_jsonl(folder / "sft_train.jsonl")
    prompts = [record["messages"][:1] for record in records]
    dialogues = [prompt for prompt in prompts for _ in range(PAIR_ANSWERS)]
    answers = [row["text"] for row in sampler.answers(sampler.sft, dialogues, first_seed=2**32)]
    pairs = []
    for place, prompt in enumerate(prompts):
        own = answers[place * PAIR_ANSWERS : (place + 1) * PAIR_ANSWERS]
        ranked = sorted((answer for answer in own if answer), key=lambda answer: sentiment((), answer))
        for worse, better in list(zip(ranked, reversed(ranked), strict=True))[:2]:
            if sentiment((), worse) < sentiment((), better):
                text = render(prompt[0]["content"])
                pairs.append({"prompt": text, "chosen": f" {better}", "rejected": f" {worse}"})
    write_jsonl(folder / "pairs_train.jsonl", pairs)
    return len(pairs)


def render(start: str) -> str:
    """A prompt of one message in the Human/Assistant form."""
    return f"\n\nHuman: {start}\n\nAssistant:"


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The records of a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_jsonl(file: Path, records: Sequence[dict[str, Any]]) -> None:
    """One record a line."""
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":   # data folder, SFT model: the pairs, which need the SFT model's answers
    print(write_sentiment_pairs(Path(sys.argv[1]), Path(sys.argv[2]), TASKS["sentiment"].answer_tokens), "pairs")
