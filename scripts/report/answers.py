"""Answers before and after PPO, side by side; held-out prompts apart from those that PPO trained on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from scripts.report.words import word
from training.utils.run.metrics import format_figure, is_finite, read_lines

MOST_HELD_OUT, MOST_TRAINING = 24, 8  # rows of a table
# What templates write before a turn, special tokens left out: "Human: ", "[Round 1]\n\n问：", "user\n", "[INST]". A tokenizer
# without the tokens of its chat template has them as text: "<|im_start|>user\n … <|im_end|>", "<|user|>\n".
MARKS = re.compile(
    r"(?:^|\n+)[ \t]*(?:\[Round \d+\]\n+)?(?:<\|(?:im_start\|>)?)?"
    r"(?:(?P<user>Human|问|user)|(?P<assistant>Assistant|答|assistant)|(?P<system>system))"
    r"(?:\|>)?(?:[:：][ \t]*|\n+)|(?P<user2>\[INST\])|(?P<assistant2>\[/INST\])"
)


@dataclass(frozen=True)
class Answers:
    """What models answered to one prompt: the SFT model's answer is None where it was not asked."""

    prompt: str
    after: str
    after_score: Any = None
    before: str | None = None
    before_score: Any = None
    ended: bool = True


def turns_of(prompt: str) -> list[tuple[str, str]]:
    """Return a prompt, as a template wrote it, as (role, text) of its turns; one of the user where no marks are found."""
    marks = list(MARKS.finditer(prompt + "\n"))
    ends = [*(mark.start() for mark in marks[1:]), len(prompt)][: len(marks)]
    turns = [
        (mark.lastgroup.rstrip("2"), prompt[mark.end() : end].strip().removesuffix("<|im_end|>"))
        for mark, end in zip(marks, ends, strict=True)
    ]
    before = prompt[: marks[0].start()].strip() if marks else prompt.strip()
    turns = [("system" if marks else "user", before), *turns]
    if turns[-1][0] == "assistant":  # where the answer begins; there stand marks of reasoning at most
        turns.pop()
    return [(role, text) for role, text in turns if text] or [("user", prompt.strip())]


def read_answers(file: Path, rename: dict[str, str]) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of a file of answers that have a prompt and an answer, and how many lines have not.

    rename: key in the file -> field of Answers.
    """
    records, left_out = read_lines(file)
    rows = [{rename.get(name, name): value for name, value in record.items()} for record in records]
    good = [row for row in rows if all(isinstance(row.get(name), str) for name in ("prompt", "after"))]
    return good, left_out + len(records) - len(good)


def demo_answers(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the answers that the demo measured."""
    return read_answers(file, {"gold_before": "before_score", "gold_after": "after_score"})


def sampled_answers(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the answers that PPO wrote down: "part" says whether to held-out prompts, "step" after which rollout."""
    names = {"answer": "after", "score": "after_score", "reference": "before", "reference_score": "before_score"}
    rows, left_out = read_answers(file, names)
    good = [row for row in rows if is_finite(row.get("step"))]
    return good, left_out + len(rows) - len(good)


def last_of(rows: Sequence[dict[str, Any]], part: str) -> tuple[int, list[dict[str, Any]]]:
    """Return the last rollout of which there are rows of a part, and those rows; 0 and none without any."""
    rows = [row for row in rows if row.get("part") == part]
    last = max((row["step"] for row in rows), default=0)
    return last, [row for row in rows if row["step"] == last]


def answer_table(rows: Sequence[dict[str, Any]], language: str) -> str:
    """Return an HTML table of rows as in Answers; the column of the SFT model only where it answered."""
    fields = Answers.__dataclass_fields__
    answers = [Answers(**{name: value for name, value in row.items() if name in fields}) for row in rows]
    both = any(isinstance(one.before, str) for one in answers)
    head = [word(name, language) for name in ("prompt", *(["sft_answer"] if both else []), "ppo_answer")]
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    for one in answers:
        cells = [prompt_cell(one.prompt, language)]
        cells += [answer_cell(one.before or "", one.before_score, None, True, language)] if both else []
        cells += [answer_cell(one.after, one.after_score, one.before_score, one.ended is not False, language)]
        lines.append(f"<tr>{''.join(f'<td><div>{cell}</div></td>' for cell in cells)}</tr>")
    return f'<div class="wide"><table class="answers">{"".join(lines)}</table></div>'


def prompt_cell(prompt: str, language: str) -> str:
    """Return a prompt as HTML; its turns named where there are several."""
    turns = turns_of(prompt)
    if len(turns) == 1:
        return escape(turns[0][1])
    return "\n".join(f"<b>{escape(word(role, language))}</b> {escape(text)}" for role, text in turns)


def answer_cell(answer: str, score: Any, before: Any, ended: bool, language: str) -> str:
    """Return an answer as HTML with its score below: green where it is higher than before, red where it is lower."""
    notes = []
    if is_finite(score):
        change = "" if not is_finite(before) or score == before else "good" if score > before else "bad"
        notes.append(f'<span class="{change}">{escape(word("score", language, format_figure(score)))}</span>')
    notes += [] if ended else [escape(word("not_ended", language))]
    return f"{escape(answer)}\n<small>{' · '.join(notes)}</small>" if notes else escape(answer)
