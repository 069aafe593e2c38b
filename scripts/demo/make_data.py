"""Write the demo's data: seeded dialogues, preference pairs and prompts of the closed world in world.yaml.

    python -m scripts.make_demo_data [--output data/demo] [--seed 0]

Answers are right or wrong, polite or curt, brief or rambling. A prompt belongs to the held-out part or to training by a hash of
its first user message, so no held-out prompt, nor its first question, is ever trained on; every fact is.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from random import Random

from scripts.demo import world
from scripts.demo.score import UNIT, Quality, demo_score, read_question
from scripts.demo.world import ACKNOWLEDGEMENTS, COURTESY_AFTER, COURTESY_BEFORE, TASKS, fill, join

SIZES = {"sft": (3700, 200), "pairs": (2600, 300), "prompts": (1200, 240)}  # train, held out
HELD_OUT_SHARE = 8  # one first message in so many is kept out of training
RATES = {"right": 0.60, "polite": 0.40, "brief": 0.55}  # of the answers to imitate
PAIR_RATES = {"right": 0.60, "polite": 0.50, "brief": 0.85}
DIFFERING = {"right": 0.6, "polite": 0.45, "brief": 0.35}  # how often the answers of a pair differ in an axis
DEFECTS = 0.12  # share of rejected answers that fail in a way of their own
RAMBLING_UNITS = (25, 27)  # words or characters; more than the 24 tokens that the demo lets an answer have

FACT_TASKS = tuple(name for name, task in TASKS["en"].items() if not task.statements)
MEMORY_TASKS = tuple(name for name, task in TASKS["en"].items() if task.statements)

Messages = list[dict[str, str]]


def dialogue(*contents: str) -> Messages:
    """Return messages of user and assistant in turn."""
    return [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), contents)]


def draw_quality(rng: Random, rates: dict[str, float] = RATES) -> Quality:
    """Draw the quality of an answer to imitate."""
    return Quality(**{axis: rng.random() < rate for axis, rate in rates.items()})


def draw_prompt(rng: Random) -> Messages:
    """Draw a dialogue that ends in a question: one turn, two questions, or a question about what was said before."""
    language = rng.choice(world.LANGUAGES)
    shape = rng.random()
    if shape < 0.55:
        return dialogue(ask(rng, language, rng.choice(FACT_TASKS)))
    if shape < 0.70:
        first = ask(rng, language, rng.choice(FACT_TASKS))
        second = question(rng, language, rng.choice(FACT_TASKS))
        quality = Quality(right=True, polite=rng.random() < RATES["polite"], brief=True)
        return dialogue(first, write_answer(rng, dialogue(first), quality), second)
    facts = {task: rng.choice(TASKS[language][task].values) for task in MEMORY_TASKS}
    statements = [fill(rng.choice(TASKS[language][task].statements), y=value) for task, value in facts.items()]
    introduction = join([rng.choice(world.OPENINGS[language][:4]), *statements], language)
    acknowledgement = rng.choice(ACKNOWLEDGEMENTS[language]).format(*facts.values())
    return dialogue(introduction, acknowledgement, question(rng, language, rng.choice(list(facts))))


def ask(rng: Random, language: str, task: str) -> str:
    """Draw a question with an opening."""
    return join([rng.choice(world.OPENINGS[language]), question(rng, language, task)], language)


def question(rng: Random, language: str, task: str) -> str:
    """Draw a question of a task, in one of its forms."""
    forms, subjects = TASKS[language][task].questions, list(TASKS[language][task].facts)
    return fill(rng.choice(forms), x=rng.choice(subjects) if subjects else "")


def write_answer(rng: Random, prompt: Messages, quality: Quality) -> str:
    """Write an answer of the given quality to the last message."""
    asked = read_question(prompt)
    language = asked.language
    sentences = [answer_sentence(rng, prompt, quality.right)]
    goal = rng.randint(*RAMBLING_UNITS)
    fillers = rng.sample(world.FILLERS[language], k=len(world.FILLERS[language]))
    before, after = rng.choice(COURTESY_BEFORE[language]), rng.choice(COURTESY_AFTER[language])
    early = rng.random() < 0.5
    if not quality.brief:
        while count_units(join(sentences, language)) < goal:
            sentences.append(fillers.pop())
    if quality.polite:
        # A rambling answer is cut off before its end: its courtesy has to come first to be seen.
        sentences = [before, *sentences] if early or not quality.brief else [*sentences, after]
    return join(sentences, language)


def answer_sentence(rng: Random, prompt: Messages, right: bool) -> str:
    """Write one sentence with the true answer, or with one of the usual mistakes."""
    asked = read_question(prompt)
    task = TASKS[asked.language][asked.task]
    mistake = rng.choice(task.mistakes)
    return fill(rng.choice(task.answers), y=asked.expected if right else mistake)


def write_defect(rng: Random, prompt: Messages) -> str:
    """Write an answer that fails in a way of its own: two answers, none, one of another task, or the same courtesy twice."""
    language = read_question(prompt).language
    asked = TASKS[language][read_question(prompt).task]
    courtesy = rng.choice(COURTESY_BEFORE[language] + COURTESY_AFTER[language])
    right, wrong = (answer_sentence(rng, prompt, is_right) for is_right in (True, False))
    both = [right, wrong] if rng.random() < 0.5 else [wrong, right]
    other = rng.choice([task for task in TASKS[language].values() if task is not asked])
    astray = fill(rng.choice(asked.answers), y=rng.choice(other.category))
    return join(rng.choice([both, [courtesy], [astray], [astray, courtesy], [courtesy, wrong, courtesy]]), language)


def count_units(text: str) -> int:
    """Count words, numbers, Chinese characters and sentence ends: about the tokens of the demo's tokenizer."""
    return len(UNIT.findall(text.lower())) + sum(text.count(mark) for mark in ".!?。！？")


def draw_pair(rng: Random, prompt: Messages) -> tuple[str, str]:
    """Draw (chosen, rejected): answers that differ in one to three axes, the one with the higher gold score first."""
    if rng.random() < DEFECTS:
        rejected = write_defect(rng, prompt)
        quality = draw_quality(rng)
        while quality.score <= demo_score(prompt, rejected):
            quality = draw_quality(rng)
        return write_answer(rng, prompt, quality), rejected
    axes = list(RATES)
    while True:
        quality = draw_quality(rng, PAIR_RATES)
        differing = [axis for axis in axes if rng.random() < DIFFERING[axis]]
        other = Quality(**{axis: getattr(quality, axis) != (axis in differing) for axis in axes})
        if differing and quality.score != other.score:
            break
    better, worse = sorted((quality, other), key=lambda q: -q.score)
    # The same dice for both: what does not differ in quality does not differ in words.
    dice = rng.random()
    return write_answer(Random(dice), prompt, better), write_answer(Random(dice), prompt, worse)


def render(prompt: Messages) -> str:
    """Return the prompt as hh-rlhf writes it, up to where the answer begins."""
    return world.render(prompt) + "\n\nAssistant:"


def is_held_out(prompt: Messages) -> bool:
    """Return True for a prompt of the held-out part, decided by its first user message alone."""
    return int(hashlib.sha256(prompt[0]["content"].encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def prompts(rng: Random, held_out: bool) -> Iterator[Messages]:
    """Yield endless prompts of one part, each only once."""
    seen = set()
    while True:
        prompt = draw_prompt(rng)
        if is_held_out(prompt) == held_out and render(prompt) not in seen:
            seen.add(render(prompt))
            yield prompt


def make_records(kind: str, count: int, rng: Random, held_out: bool) -> Iterator[dict]:
    """Yield `count` records of one file: dialogues (sft), preference pairs (pairs) or prompts."""
    for _, prompt in zip(range(count), prompts(rng, held_out), strict=False):
        if kind == "sft":
            answer = write_answer(rng, prompt, draw_quality(rng))
            yield {"messages": [*prompt, {"role": "assistant", "content": answer}]}
        elif kind == "pairs":
            chosen, rejected = draw_pair(rng, prompt)
            yield {"prompt": render(prompt), "chosen": f" {chosen}", "rejected": f" {rejected}"}
        else:
            yield {"prompt": render(prompt)}


def write_demo_data(folder: Path, seed: int = 0) -> None:
    """Write the six files; the same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, counts in SIZES.items():
        for part, count in zip(("train", "heldout"), counts, strict=True):
            rng = Random(f"{seed} {kind} {part}")
            records = make_records(kind, count, rng, held_out=part == "heldout")
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            (folder / f"{kind}_{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/demo"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_demo_data(args.output, args.seed)
    for file in sorted(args.output.glob("*.jsonl")):
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
