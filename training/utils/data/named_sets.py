"""Know data sets by name. A new one is a row of NAMED_SETS, and a function where its fields are no known format.

A name is recognised at the end of whatever --data_path says: Dahoas/rm-static on the hub, ../../rm-static or
./datasets/Dahoas/rm-static as a folder written by scripts.download_dataset, HC3-Chinese.jsonl as a file.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from errors import nearest
from training.utils.data.formats import Record, mkqa, question_answer, record, user_turn
from training.utils.data.readers import SUFFIXES
from training.utils.data.turns import Fields, Skip, items, prompt_messages, text


@dataclass(frozen=True)
class NamedSet:
    """A row of NAMED_SETS. A set without a rule is recognised by its fields."""

    names: tuple[str, ...]  # as users write it, the published one first
    hub: str | None = None  # its id on the hub, where that is not the first name
    config: str | None = None
    fields: tuple[str, ...] = ()  # needed by the rule
    rule: Callable[[Fields], list[Record | Skip]] | None = None  # makes the records of a row
    files: dict[str, tuple[str, ...]] | None = None  # split -> files of the user's own, the first that is there is read

    @property
    def hub_id(self) -> str:
        """Return the id on the hub."""
        return self.hub or self.names[0]


def _rlhf_reward(row: Fields) -> list[Record]:
    """Read yitingxie's form: "Assistant:" is missing in the prompt and opens the answers, some behind the whole prompt.

    Only that one mark goes: an answer may quote a dialogue.
    """
    prompt = text(row["prompt"], "prompt").removesuffix("Assistant:").rstrip()
    answers = (text(row[field], field).removeprefix(prompt) for field in ("chosen", "rejected"))
    better, worse = (answer.strip().removeprefix("Assistant:").strip() for answer in answers)
    return [record(prompt_messages(prompt + "\n\nAssistant:"), better, worse)]


def _webgpt(row: Fields) -> list[Record]:
    """Read two answers with scores, without marks of citations. Raise Skip for equal scores, which prefer neither."""
    scores = [float(row["score_0"]), float(row["score_1"])]
    if scores[0] == scores[1]:
        raise Skip("two answers with the same score")
    answers = [_without_citations(text(row[field], field)) for field in ("answer_0", "answer_1")]
    better, worse = answers if scores[0] > scores[1] else reversed(answers)
    question = row["question"]
    question = question.get("full_text") if isinstance(question, dict) else question
    return [record(user_turn(text(question, "question")), better, worse)]


def _without_citations(answer: str) -> str:
    """Cut out [1, 2], [title], (1) and (https://…); other words in round brackets are the writer's own."""
    return re.sub(r"\s*(\[[^\]\n]*\]|\(\d{1,2}(,\s*\d{1,2})*\)|\(https?://[^)\s]*\))", "", answer).strip()


def _shp(row: Fields) -> list[Record]:
    answers = [text(row[field], field) for field in ("human_ref_A", "human_ref_B")]
    better, worse = answers if int(row["labels"]) == 1 else reversed(answers)
    return [record(user_turn(text(row["history"], "history")), better, worse)]


def _vicuna(row: Fields) -> list[Record]:
    return [record(prompt_messages(row["prompt"]), text(row["label"], "label"))]


def _miracl(row: Fields) -> list[Record | Skip]:
    """Take the first passage that answers the query, against the first that does not."""
    fields = ("positive_passages", "negative_passages")
    good, bad = (_first(row, field, "text") for field in fields)
    if not good:
        raise Skip("no passage that answers")
    return [record(user_turn(text(row["query"], "query")), good, bad or None), *further(row, *fields)]


def _hc3(row: Fields) -> list[Record | Skip]:
    question = text(row["question"], "question")
    return [record(user_turn(question), _first(row, "human_answers")), *further(row, "human_answers")]


def _qag_jaquad(row: Fields) -> list[Record | Skip]:
    question = _first(row, "questions")
    if not question:
        raise Skip("no question")
    return [record(user_turn(question), text(row["paragraph"], "paragraph")), *further(row, "questions")]


def further(row: Fields, *fields: str) -> list[Skip]:
    """Return Skips for what stands behind the first item of lists, which a rule takes alone."""
    counts = {field: len(items(row[field], field)) - 1 for field in fields}
    reason = 'more than one item in "{}", of which the first is read'
    return [Skip(reason.format(field), count) for field, count in counts.items() if count > 0]


def _first(row: Fields, field: str, key: str | None = None) -> str:
    """Return the first text of a list, or under a key of its first item; "" if the list is empty."""
    values = items(row[field], field)
    return text(values[0][key] if key else values[0], field) if values else ""


def _mkqa_in(language: str) -> Callable[[Fields], list[Record]]:
    return lambda row: mkqa(row, language, row["queries"].get(language))


def _fields(question: str, answer: str) -> dict[str, Any]:
    """Return fields and rule of a set with a question and an answer, plain texts."""
    return {"fields": (question, answer), "rule": lambda row: question_answer(row, question, answer)}


MIRACL_FIELDS = ("query", "positive_passages", "negative_passages")
PAIR_FIELDS = ("prompt", "chosen", "rejected")

NAMED_SETS: tuple[NamedSet, ...] = (
    NamedSet(("Dahoas/rm-static", "rm-static")),
    NamedSet(("Dahoas/full-hh-rlhf", "full-hh-rlhf")),
    NamedSet(("Dahoas/synthetic-instruct-gptj-pairwise", "synthetic-instruct-gptj-pairwise")),
    NamedSet(("yitingxie/rlhf-reward-datasets", "rlhf-reward-datasets"), fields=PAIR_FIELDS, rule=_rlhf_reward),
    NamedSet(
        ("openai/webgpt_comparisons", "webgpt_comparisons"),
        fields=("question", "answer_0", "answer_1", "score_0", "score_1"),
        rule=_webgpt,
    ),
    NamedSet(("stanfordnlp/SHP", "SHP"), fields=("history", "human_ref_A", "human_ref_B", "labels"), rule=_shp),
    NamedSet(
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", "sharegpt_alpaca_oa_vicuna_format"),
        fields=("prompt", "label"),
        rule=_vicuna,
    ),
    NamedSet(("local/jsonfile",), files={"train": ("data/train.json",), "eval": ("data/eval.json",)}),
    NamedSet(("wangrui6/Zhihu-KOL", "Zhihu-KOL"), **_fields("INSTRUCTION", "RESPONSE")),
    NamedSet(("Cohere/miracl-zh-queries-22-12", "miracl-zh-queries-22-12"), fields=MIRACL_FIELDS, rule=_miracl),
    NamedSet(("Cohere/miracl-ja-queries-22-12", "miracl-ja-queries-22-12"), fields=MIRACL_FIELDS, rule=_miracl),
    NamedSet(
        ("Hello-SimpleAI/HC3-Chinese", "HC3-Chinese"), config="all", fields=("question", "human_answers"), rule=_hc3
    ),
    NamedSet(("mkqa-Chinese",), hub="apple/mkqa", fields=("queries", "answers"), rule=_mkqa_in("zh_cn")),
    NamedSet(("mkqa-Japanese",), hub="apple/mkqa", fields=("queries", "answers"), rule=_mkqa_in("ja")),
    NamedSet(("lmqg/qg_jaquad", "qg_jaquad"), **_fields("question", "sentence")),
    NamedSet(("lmqg/qag_jaquad", "qag_jaquad"), fields=("questions", "paragraph"), rule=_qag_jaquad),
    NamedSet(("Smart/Q_A",), files={"train": ("Smart/Q_A.json", "data/Smart/Q_A.json", "datasets/Smart/Q_A.json")}),
    NamedSet(("zwh9029/rm-static-m2m100-zh-jianti", "rm-static-m2m100-zh-jianti", "rm-static-zh")),
)


def find_named_set(path: str) -> NamedSet | None:
    """Return the set whose name ends a path, a data file's suffix aside; None for any other path."""
    name = path.replace("\\", "/").rstrip("/").lower().removesuffix(".gz")
    name = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
    for named in NAMED_SETS:
        if any(f"/{name}".endswith(f"/{known.lower()}") for known in named.names):
            return named
    return None


def similar_name(path: str) -> str | None:
    """Return the name of the known set that a path was probably meant to be."""
    lowered = {name.lower(): name for named in NAMED_SETS for name in named.names}
    near = nearest(path.lower(), lowered, 0.75)
    return near and lowered[near]
