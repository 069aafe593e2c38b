"""The closed world of the demo, read from world.yaml: tasks, and the sentences around questions and answers."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Task:
    """Questions of one kind; the fields are explained in world.yaml."""

    questions: list[str]
    answers: list[str]
    mistakes: list[str]
    facts: dict[str, str] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)

    @property
    def category(self) -> list[str]:
        """Everything that counts as an answer, true ones first, without repetition."""
        return list(dict.fromkeys([*self.values, *self.facts.values(), *self.mistakes]))


_WORLD = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
# language -> name -> task
TASKS = {language: {name: Task(**one) for name, one in tasks.items()} for language, tasks in _WORLD["tasks"].items()}
LANGUAGES = tuple(TASKS)
# language -> sentences
OPENINGS, ACKNOWLEDGEMENTS, COURTESY_BEFORE, COURTESY_AFTER, FILLERS = (
    _WORLD[name] for name in ("openings", "acknowledgements", "courtesy_before", "courtesy_after", "fillers")
)


def fill(form: str, x: str = "", y: str = "") -> str:
    """Return a form with its blanks filled and its first letter in upper case."""
    text = form.replace("{x}", x).replace("{y}", y)
    return text[:1].upper() + text[1:]


def join(sentences: list[str], language: str) -> str:
    """Join sentences to one text: a space between English ones, nothing between Chinese ones."""
    return (" " if language == "en" else "").join(sentence for sentence in sentences if sentence)


def render(messages: list[dict[str, str]]) -> str:
    """Return a dialogue as hh-rlhf writes it, up to the end of its last message."""
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)
