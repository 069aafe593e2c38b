"""Divide records among the steps, and into training and evaluation: a hash of their content decides, nothing else.

No index files, no random state: membership is the same on every rank, in every step and in every run with the same
seed, and stays when other records come or go.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from errors import UserError
from training.utils.data.arrow_rows import ArrowRows

PHASES = {1: "step 1 (supervised fine-tuning)", 2: "step 2 (reward model)", 3: "step 3 (PPO)"}
# One opening question that holds more than this share of the dialogues, and at least this many, is a constant prompt.
CONSTANT_SHARE, CONSTANT_COUNT = 0.2, 10
CONSTANT = "many prompts are the same text: the whole record, not its opening question, says which step it belongs to"


def parse_split(data_split: str) -> tuple[float, float, float]:
    """Return the shares of the three steps: (0.2, 0.4, 0.4) for "2,4,4"."""
    try:
        ratios = [float(part) for part in data_split.split(",")]
    except ValueError:
        ratios = []
    if len(ratios) != 3 or not all(math.isfinite(part) and part >= 0 for part in ratios) or sum(ratios) <= 0:
        raise UserError(
            f"--data_split {data_split}: expected three proportions for steps 1, 2 and 3, for example 2,4,4."
        )
    first, second, third = (part / sum(ratios) for part in ratios)
    return first, second, third


def phase_and_part(key: str, ratios: tuple[float, float, float], seed: int, eval_fraction: float) -> tuple[int, bool]:
    """Return the phase (1, 2, 3) of a key and whether it is held out for evaluation. ratios add up to 1.

    Two independent numbers of [0, 1) are read from one hash: held-out keys are spread over the phases like the others.
    """
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=16).digest()
    point, held_out = (int.from_bytes(half, "big") / 2**64 for half in (digest[:8], digest[8:]))
    phase = 1 if point < ratios[0] else 2 if point < ratios[0] + ratios[1] else 3
    if ratios[phase - 1] == 0:  # rounding of the sum may leave a sliver above the last proportion that is not 0
        phase = max(range(1, 4), key=lambda one: ratios[one - 1])
    return phase, held_out < eval_fraction


def select_phase(
    records: dict[str, ArrowRows],
    phase: int,
    *,
    data_split: str,
    seed: int,
    eval_fraction: float,
    sft_only: bool = False,
    notes: list[str] | None = None,
) -> tuple[ArrowRows, ArrowRows]:
    """Return (training, evaluation) records of one step out of those of a set. Either may be empty for a small set.

    The opening question is the key: the turns of a dialogue, and pairs about one question, stay together. A set with
    its own held-out split keeps it; its training records that share a question with that split are left out. sft_only:
    everything belongs to step 1, whatever data_split says. notes: gets a line where the whole record is the key, and one on
    records that are left out.
    """
    if phase not in PHASES:
        raise ValueError(f"phase {phase}: expected 1, 2 or 3")
    if not 0 <= eval_fraction < 1:
        raise UserError(f"--eval_fraction {eval_fraction}: expected a share of at least 0 and below 1.")
    ratios = (1.0, 0.0, 0.0) if sft_only else parse_split(data_split)
    if ratios[phase - 1] == 0 and not sft_only:
        raise UserError(f"--data_split {data_split} leaves nothing for {PHASES[phase]}; give it a proportion above 0.")

    train, held_out = records["train"], records.get("eval")
    questions, whole = _questions(train)
    notes = [] if notes is None else notes
    notes += [CONSTANT] if whole else []
    keys = _keys(train, whole=True) if whole else questions
    keys = [(*phase_and_part(key, ratios, seed, eval_fraction), key) for key in keys]
    if held_out is None:
        rows = {part: [row for row, found in enumerate(keys) if found[:2] == (phase, part)] for part in (False, True)}
        return train.select(rows[False]), train.select(rows[True])

    eval_keys = list(_keys(held_out, whole))
    taken = set(eval_keys)
    rows = [row for row, (found, _, key) in enumerate(keys) if found == phase and key not in taken]
    shared = sum(key in taken for found, _, key in keys if found == phase)
    if shared:
        what = "text" if whole else "question"
        notes.append(f"{shared} records of this step left out: their {what} is in the held-out split too")
    eval_rows = [row for row, key in enumerate(eval_keys) if phase_and_part(key, ratios, seed, 0.0)[0] == phase]
    return train.select(rows), held_out.select(eval_rows)


def opening_question(messages: list[dict[str, str]]) -> str:
    """Return the first user message, white space evened out: the same question in two sets falls into one phase."""
    return " ".join(next((turn["content"] for turn in messages if turn["role"] == "user"), "").split())


def question_of(messages: list[dict[str, str]]) -> str:
    """Return a short key of the opening question."""
    return _digest(opening_question(messages))


def held_out_questions(held_out: ArrowRows, others: list[ArrowRows]) -> set[str]:
    """Return the opening questions (question_of) that a set holds out, which no other set may train on either.

    Questions that make up more than a fifth are left out, for they are a fixed instruction: a fifth of the split that
    came with the set, or, where a hash held a few records out, of these and of the ``others``.
    """
    if len(held_out) == 0:
        return set()
    questions = set(_keys(held_out, whole=False))
    counts = Counter(key for dataset in (held_out, *others) for key in _keys(dataset, whole=False))
    most = max(CONSTANT_COUNT - 1, CONSTANT_SHARE * counts.total())
    return {question for question in questions if counts[question] <= most}


def batches(dataset: ArrowRows) -> Iterator[list[dict]]:
    """Yield the rows of a data set in lists of 500."""
    rows = iter(dataset)
    while batch := list(islice(rows, 500)):
        yield batch


def _digest(text: str) -> str:
    """Return a short key of a text, so that a set of keys stays small."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _keys(dataset: ArrowRows, whole: bool) -> Iterator[str]:
    """Yield the key of each record: of its opening question, or of the whole record."""
    if not whole:
        yield from (question_of(row["messages"]) for row in dataset.with_columns("messages"))
        return
    for row in dataset.with_columns("messages", "chosen", "rejected"):
        yield _digest(json.dumps([row["messages"], row["chosen"], row["rejected"]]))


def _questions(dataset: ArrowRows) -> tuple[list[str], bool]:
    """Return the key of each record's opening question, and whether one holds more than a fifth of the dialogues.

    It does in sets with a single prompt. Later turns do not count: a long dialogue is many records with one opening. Without
    first turns all records count.
    """
    questions, first = [], Counter()
    for row in dataset.with_columns("messages"):
        questions.append(question_of(row["messages"]))
        if all(turn["role"] != "assistant" for turn in row["messages"]):
            first[questions[-1]] += 1
    counts = first or Counter(questions)
    most = max(counts.values(), default=0)
    return questions, most >= CONSTANT_COUNT and most > CONSTANT_SHARE * counts.total()
