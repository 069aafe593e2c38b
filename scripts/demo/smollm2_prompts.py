"""The prompts of the smollm2 preset: everyday things, asked about in a few ways. Written here, so nothing is downloaded.

Each topic belongs to one part: the SFT answers, the preference pairs, PPO's prompts, the held-out prompts that measure. So no
step trains on what it is measured on, nor on what another step has seen.
"""

from __future__ import annotations

from random import Random

SYSTEM = "Answer in one short sentence."  # its own default is eighteen tokens, and its answers are long
FORMS = (
    "What do you think of {x}?",
    "Say something about {x}.",
    "Write one sentence about {x}.",
    "Tell me about {x}.",
    "How was {x}?",
    "What is it like: {x}?",
    "Describe {x}.",
    "Give me your view of {x}.",
)
# Things without a verdict in their name, some of them tiresome.
TOPICS = (
    "the new bus line", "the bakery near the station", "the old library", "my winter boots", "the weather this week",
    "the film last night", "my neighbour's dog", "the hotel by the lake", "a used bicycle", "the school canteen",
    "the evening news", "the crowded train", "the queue at the post office", "my first day at work", "the soup at lunch",
    "a walk in the rain", "the street market", "the museum in town", "the bridge over the river", "a long meeting",
    "the night shift", "the kitchen sink", "my old phone", "the new printer", "the bus driver", "the garden in autumn",
    "a letter from the bank", "the swimming pool", "the train to the coast", "the coffee machine", "the city park",
    "a wet umbrella", "the tax form", "the village shop", "our football team", "the piano next door", "a morning at the beach",
    "the traffic on Monday", "the mountain hut", "the paint on the wall", "the lift in my house", "my cousin's wedding",
    "the road to the airport", "a cup of tea", "the maths lesson", "the boat trip", "the corner restaurant", "the theatre play",
    "the broken window", "the farm on the hill", "the waiting room", "an early breakfast", "the dentist", "the radio programme",
    "the supermarket", "the moving boxes", "the new neighbours", "the fish soup", "a Sunday afternoon", "the town hall",
    "the winter coat", "the laundry", "the chess club", "the bus stop", "my grandmother's recipe", "a ride on the tram",
    "the parking garage", "the harbour", "the fire drill", "the birthday cake", "the cleaning day", "a visit to the zoo",
    "the language course", "my new chair", "the campsite", "the late bus", "the office plants", "the exam", "the photo album",
    "the power cut", "the guitar lesson", "the apple tree", "the basement", "the ferry", "the job interview", "a snowy morning",
    "the car wash", "the book club", "the cold shower", "the choir", "the bicycle path", "the roof terrace", "my keyboard",
    "the flea market", "the staircase", "a power drill",
)  # fmt: skip
PARTS = {"sft": 32, "pairs": 20, "ppo": 32, "heldout": 12}  # topics of each


def topics_of(part: str, seed: int = 0) -> list[str]:
    """The topics of one part; the same seed gives the same division."""
    topics = list(TOPICS)
    Random(f"smollm2 {seed}").shuffle(topics)
    start = 0
    for name, count in PARTS.items():
        if name == part:
            return topics[start : start + count]
        start += count
    raise ValueError(f"no part {part!r}; there are {', '.join(PARTS)}")


def prompts_of(part: str, seed: int = 0) -> list[list[dict[str, str]]]:
    """The dialogues of one part in random order: every topic in every form."""
    texts = [form.format(x=topic) for topic in topics_of(part, seed) for form in FORMS]
    Random(f"smollm2 {part} {seed}").shuffle(texts)
    return [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in texts]
