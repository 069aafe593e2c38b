"""Tell what became of each data set: a table of counts, what was left out and why, and examples as the model sees them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, groupby, pairwise
from typing import Any

from training.utils.data.arrow_rows import ArrowRows
from training.utils.data.batching import context_spans, target_counts
from training.utils.data.cache import CachedData
from training.utils.data.tokenize import SPLITS

FILE = "data.txt"
OPEN, CLOSE = ">>>", "<<<"
SHOWN = {  # by phase
    1: f"the model learns the tokens between {OPEN} and {CLOSE}",
    2: f"chosen, then rejected: the answers stand between {OPEN} and {CLOSE}",
    3: "the model writes the answer",
}
LONGEST, HEAD = 2000, 500  # characters of a shown text, and how many of them are of its beginning


def overview(data: CachedData, paths: list[str], phase: int, tokenizer: Any, number: int, loss_on: str) -> str:
    """Return a table for each data set of a step, with the first examples to train on.

    paths: the data sets in their order. number: of examples a set. loss_on: "answer" or "all" (step 1).
    """
    lines, starts = [], dict.fromkeys(SPLITS, 0)
    for path, one in zip(paths, data.report["sets"], strict=True):
        columns = []
        for split in SPLITS:
            counts = one[split]
            first, starts[split] = starts[split], starts[split] + counts["kept"]
            rows = data.datasets[split].select(range(first, starts[split]) if counts["kept"] else [])
            columns.append(counts_of(counts, rows, phase, loss_on))
            if split == "train":
                shown = rows.select(range(min(number, len(rows))))
        lines += [f"{path}, read by {one['form']}", f"  {'':46}{'train':>12}{'held out':>12}"]
        for name in dict.fromkeys([*columns[0], *columns[1]]):
            lines.append(f"  {name:46}{columns[0].get(name, 0):12}{columns[1].get(name, 0):12}")
        lines += [f"  {note}" for note in one["notes"]]
        for place, row in enumerate(shown, start=1):
            lines.append(f"  example {place} ({SHOWN[phase]}):")
            lines += [
                f"    | {line}" for text in example_texts(row, phase, tokenizer, loss_on) for line in text.split("\n")
            ]
    return "\n".join(lines)


def counts_of(counts: dict[str, Any], rows: ArrowRows, phase: int, loss_on: str) -> dict[str, int]:
    """Return the numbers of one split of a set by their names."""
    cuts = {"truncated_prompts": "prompts cut at the beginning", "truncated_answers": "answers cut at the end"}
    named = {"records of this step": counts["records"]}
    named |= {f"left out: {reason}": count for reason, count in counts["dropped"].items()}
    named |= {words: counts[name] for name, words in cuts.items() if counts[name]}
    if phase == 1 and counts["rejected"]:
        named |= {"answers rejected or judged bad, not learned": counts["rejected"]}
    if counts["joined"]:
        named |= {"answers in the sequence of a later one": counts["joined"]}
        named |= {"tokens with a sequence for each answer": counts["tokens_apart"]}
    named |= {"examples": counts["kept"], "tokens": counts["tokens"]}
    if phase == 1:
        return named | {"tokens that are targets": sum(target_counts(rows, loss_on)) if len(rows) else 0}
    if phase == 2:  # two answers a prompt
        return named | {"tokens of answers": counts["tokens"] - 2 * sum(max(one, 1) for one in rows["prompt_length"])}
    return named


def example_texts(row: dict[str, Any], phase: int, tokenizer: Any, loss_on: str) -> Iterator[str]:
    """Yield the texts of an example, special tokens included, with marks around the targets."""
    names = {1: ["input_ids"], 2: ["chosen_ids", "rejected_ids"], 3: ["prompt_ids"]}[phase]
    for name in names:
        ids = row[name]
        first = len(ids) if phase == 3 else 1 if loss_on == "all" else row["prompt_length"]
        edges = [first, *chain.from_iterable(() if loss_on == "all" else context_spans(row)), len(ids)]
        texts = [decode(tokenizer, ids[:edge]) for edge in edges]
        shown = shortened(texts[0])
        for place, (start, end) in enumerate(pairwise(edges), start=1):
            before, upto = texts[place - 1 : place + 1]
            text = shortened(upto[len(before) :] if upto.startswith(before) else decode(tokenizer, ids[start:end]))
            shown += f"{OPEN}{text}{CLOSE}" if place % 2 else text
        yield shown if phase != 3 else shortened(texts[0])


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of tokens as it is, special tokens included, also ChatGLM's, which its decode leaves out."""
    control = getattr(tokenizer, "control_ids", ())
    names = {token: name for name, token in tokenizer.get_vocab().items()} if control else {}
    return "".join(
        "".join(names.get(token, "") for token in run)
        if marks
        else tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for marks, run in ((marks, list(run)) for marks, run in groupby(ids, control.__contains__))
    )


def shortened(text: str) -> str:
    """Return a text without the middle where it is very long."""
    if len(text) <= LONGEST:
        return text
    return f"{text[:HEAD]} [… {len(text) - LONGEST} characters …] {text[HEAD - LONGEST :]}"
