"""The gold rule of the demo: a score of an answer in [0, 1]. It measures; the demo itself never trains on it.

    score = 0.5 right + 0.25 polite + 0.25 brief,   and 0 where no answer is offered at all

right   one sentence gives the true answer in a form of the demo's world, and no other member of its category is named;
polite  one sentence is a courtesy, in the language of the question;
brief   the text ends with a full stop, nothing is said twice, and every sentence is the answer or a courtesy.

    python -m scripts.demo.score "What is 2 plus 2?" "The sum is 4. Happy to help!"

Step 3 can train against it directly: --reward_function scripts/demo/score.py:reward --reward_model false.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from errors import UserError, told
from scripts.demo.world import COURTESY_AFTER, COURTESY_BEFORE, TASKS

MARKS = re.compile(r"<s>|</s>|<pad>")
END_OF_ANSWER = re.compile(r"<s>|</s>|<pad>|\s*\n\s*(?:Human|Assistant):")
TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant):")
FULL_STOPS = ".!?。！？"
SENTENCE = re.compile(rf"[^{FULL_STOPS}]+[{FULL_STOPS}]*|[{FULL_STOPS}]+")
UNIT = re.compile(r"[a-z]+|\d+|[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Question:
    """A question: its task, its subject ("" for memory), the true answer (None: the user never said it)."""

    language: str
    task: str
    subject: str
    expected: str | None


@dataclass(frozen=True)
class Quality:
    """The axes on which answers differ; answered is False where the text offers no answer at all."""

    right: bool
    polite: bool
    brief: bool
    answered: bool = True

    @property
    def score(self) -> float:
        """0.5 right + 0.25 polite + 0.25 brief; 0 without an answer."""
        return 0.5 * self.right + 0.25 * self.polite + 0.25 * self.brief if self.answered else 0.0


@dataclass(frozen=True)
class Patterns:
    """The texts of a task as patterns; the first three have a group where a form has its blank."""

    question: re.Pattern[str]
    statement: re.Pattern[str]
    answer: re.Pattern[str]  # any answer form, or the answer alone
    named: re.Pattern[str]  # all that could be named as an answer; any number where the answers are numbers


def demo_score(prompt: str | Sequence[Mapping[str, str]], answer: str) -> float:
    """Score `answer` to `prompt` (rendered text or a list of messages) in [0, 1].

    Raises ValueError if the prompt asks nothing that the demo's world knows.
    """
    return judge(prompt, answer).score


def reward(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return demo_score of each answer, for --reward_function of step 3."""
    return [demo_score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def judge(prompt: str | Sequence[Mapping[str, str]], answer: str) -> Quality:
    """Return the parts of the score of one answer; text after its end is ignored."""
    question = read_question(prompt)
    patterns = _patterns(question.language, question.task)
    expected = _bare(question.expected or "")
    text = END_OF_ANSWER.split(answer.lstrip(), maxsplit=1)[0].strip()
    sentences = [_bare(sentence) for sentence in SENTENCE.findall(text)]

    given = [_blank(match) for match in map(patterns.answer.fullmatch, sentences) if match]
    polite_ones = {_bare(one) for one in COURTESY_BEFORE[question.language] + COURTESY_AFTER[question.language]}
    courtesies = [sentence for sentence in sentences if sentence in polite_ones]
    # "2 plus 2 is 4" names 2 only because the question does.
    beside_subject = _bare(text).replace(question.subject.lower() or "\0", " ")
    return Quality(
        answered=bool(given),
        right=expected in given and set(patterns.named.findall(beside_subject)) == {expected},
        polite=bool(courtesies),
        brief=text.endswith(tuple(FULL_STOPS))
        and len(given) == 1
        and len(given) + len(courtesies) == len(sentences) <= 3
        and len(set(sentences)) == len(sentences)
        and not _says_twice(text),
    )


def read_question(prompt: str | Sequence[Mapping[str, str]]) -> Question:
    """Return the question of the last user message with its true answer.

    A memory task finds the answer in what the user said before. Raises ValueError for any other question.
    """
    asked = [message["content"] for message in _messages(prompt) if message["role"] == "user"]
    for language, tasks in TASKS.items():
        for name, task in tasks.items():
            patterns = _patterns(language, name)
            match = patterns.question.search(asked[-1]) if asked else None
            if match is None:
                continue
            if not task.statements:
                subject = _same(_blank(match), task.facts)
                return Question(language, name, subject, task.facts[subject])
            values = [_blank(match) for match in patterns.statement.finditer("\n".join(asked))]
            return Question(language, name, "", _same(values[-1], task.values) if values else None)
    raise ValueError(f"not a question of the demo's world: {asked[-1] if asked else prompt!r}")


def _messages(prompt: str | Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return the messages of rendered text; text without a "Human:" is one user message."""
    if not isinstance(prompt, str):
        return list(prompt)
    parts = TURN.split(MARKS.sub("", prompt))
    if len(parts) == 1:
        return [{"role": "user", "content": parts[0]}]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text} for who, text in zip(parts[1::2], parts[2::2], strict=True)]


def _bare(text: str) -> str:
    """Return the text in lower case, with single spaces, without a full stop at the end."""
    return " ".join(text.lower().split()).rstrip(FULL_STOPS + " ")


def _blank(match: re.Match[str]) -> str:
    """Return the text that filled the blank of the form that matched."""
    return next((group for group in match.groups() if group is not None), "")


def _same(text: str, known: Iterable[str]) -> str:
    """Return the member of `known` that equals `text` whatever its case."""
    return next(member for member in known if member.lower() == text.lower())


def _any(words: Iterable[str]) -> str:
    """Return a pattern of any of the words, longest first; Latin words and numbers only as whole words."""
    longest_first = sorted(words, key=len, reverse=True)
    return "|".join(rf"(?<![A-Za-z0-9]){w}(?![A-Za-z0-9])" if w.isascii() else w for w in longest_first)


def _pattern(forms: Iterable[str], blank: str, words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of any of the forms, each with a group where {blank} stands that takes any of the words."""
    hole = f"({_any(words)})"
    return re.compile("|".join(hole.join(map(re.escape, form.split(blank))) for form in forms), re.IGNORECASE)


@cache
def _patterns(language: str, name: str) -> Patterns:
    task = TASKS[language][name]
    words = [word.lower() for word in task.category]
    return Patterns(
        question=_pattern(task.questions, "{x}", task.facts),
        statement=_pattern(task.statements, "{y}", task.values),
        answer=_pattern([_bare(form) for form in (*task.answers, "{y}")], "{y}", task.category),
        named=re.compile(r"\d+" if words[0].isdigit() else _any(words)),
    )


def _says_twice(text: str) -> bool:
    """Return True if two units (words, numbers, characters) in a row come back, or a word follows itself."""
    units = UNIT.findall(text.lower())
    pairs = list(pairwise(units))
    return len(set(pairs)) < len(pairs) or any(a == b and a.isascii() for a, b in pairs)


@told
def main(argv: Sequence[str]) -> int:
    """Print the score of an answer to a question; returns the exit code."""
    if len(argv) != 2:
        raise UserError(f"give a question and an answer, not {len(argv)} words: python -m scripts.demo.score QUESTION ANSWER")
    try:
        print(demo_score(*argv))
    except ValueError as error:
        raise UserError(f"{error}; data/demo/prompts_train.jsonl has questions that are.") from error
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
