"""Data sets known by name. A new one is a row of NAMED_SETS, and a function where its fields are no known format.

A name is recognised at the end of whatever --data_path says: Dahoas/rm-static on the hub, ../../rm-static or
./datasets/Dahoas/rm-static as a folder written by scripts.download_dataset, HC3-Chinese.jsonl as a file.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from training.utils.data.formats import Fields, Record, Skip, items, mkqa, prompt_messages, record, text, user_turn
from training.utils.data.readers import SUFFIXES


@dataclass(frozen=True)
class NamedSet:
    """names: what users write, the published key first. hub: where it lies. fields: what the rule needs.

    rule: a row -> its records; without one the set is recognised by its fields. local: never on the hub.
    """

    names: tuple[str, ...]
    hub: str | None = None
    config: str | None = None
    fields: tuple[str, ...] = ()
    rule: Callable[[Fields], list[Record]] | None = None
    local: bool = False

    @property
    def hub_id(self) -> str:
        return self.hub or self.names[0]


def _rlhf_reward(row: Fields) -> list[Record]:
    """yitingxie: the prompt lacks its "Assistant:", which opens the answers instead, some behind the whole prompt.

    Only that one mark goes: an answer may quote a dialogue.
    """
    prompt = text(row["prompt"], "prompt").removesuffix("Assistant:").rstrip()
    answers = (text(row[field], field).removeprefix(prompt) for field in ("chosen", "rejected"))
    better, worse = (answer.strip().removeprefix("Assistant:").strip() for answer in answers)
    return [record(prompt_messages(prompt + "\n\nAssistant:"), better, worse)]


def _webgpt(row: Fields) -> list[Record]:
    """Two answers with scores; marks of citations go. Equal scores prefer neither."""
    scores = [float(row["score_0"]), float(row["score_1"])]
    if scores[0] == scores[1]:
        raise Skip("two answers with the same score")
    answers = [_without_citations(text(row[field], field)) for field in ("answer_0", "answer_1")]
    better, worse = answers if scores[0] > scores[1] else reversed(answers)
    question = row["question"]
    question = question.get("full_text") if isinstance(question, dict) else question
    return [record(user_turn(text(question, "question")), better, worse)]


def _without_citations(answer: str) -> str:
    """[1, 2], [title], (1) and (https://…) go; other words in round brackets are the writer's own."""
    return re.sub(r"\s*(\[[^\]\n]*\]|\(\d{1,2}(,\s*\d{1,2})*\)|\(https?://[^)\s]*\))", "", answer).strip()


def _shp(row: Fields) -> list[Record]:
    answers = [text(row[field], field) for field in ("human_ref_A", "human_ref_B")]
    better, worse = answers if int(row["labels"]) == 1 else reversed(answers)
    return [record(user_turn(text(row["history"], "history")), better, worse)]


def _vicuna(row: Fields) -> list[Record]:
    return [record(prompt_messages(row["prompt"], "prompt", "USER", "ASSISTANT"), text(row["label"], "label"))]


def _zhihu(row: Fields) -> list[Record]:
    return [record(user_turn(text(row["INSTRUCTION"], "INSTRUCTION")), text(row["RESPONSE"], "RESPONSE"))]


def _miracl(row: Fields) -> list[Record]:
    """The first passage that answers the query, against the first that does not."""
    found = []
    for field in ("positive_passages", "negative_passages"):
        passages = items(row[field], field)
        found.append(text(passages[0]["text"], field) if passages else None)
    if not found[0]:
        raise Skip("no passage that answers")
    return [record(user_turn(text(row["query"], "query")), found[0], found[1] or None)]


def _hc3(row: Fields) -> list[Record]:
    answers = items(row["human_answers"], "human_answers")
    if not answers:
        raise Skip("an empty answer")
    return [record(user_turn(text(row["question"], "question")), text(answers[0], "human_answers"))]


def _mkqa_in(language: str) -> Callable[[Fields], list[Record]]:
    return lambda row: mkqa(row, language, row["queries"].get(language))


def _qg_jaquad(row: Fields) -> list[Record]:
    return [record(user_turn(text(row["question"], "question")), text(row["sentence"], "sentence"))]


def _qag_jaquad(row: Fields) -> list[Record]:
    questions = items(row["questions"], "questions")
    if not questions:
        raise Skip("no question")
    return [record(user_turn(text(questions[0], "questions")), text(row["paragraph"], "paragraph"))]


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
    NamedSet(("local/jsonfile",), local=True),
    NamedSet(("wangrui6/Zhihu-KOL", "Zhihu-KOL"), fields=("INSTRUCTION", "RESPONSE"), rule=_zhihu),
    NamedSet(("Cohere/miracl-zh-queries-22-12", "miracl-zh-queries-22-12"), fields=MIRACL_FIELDS, rule=_miracl),
    NamedSet(("Cohere/miracl-ja-queries-22-12", "miracl-ja-queries-22-12"), fields=MIRACL_FIELDS, rule=_miracl),
    NamedSet(
        ("Hello-SimpleAI/HC3-Chinese", "HC3-Chinese"), config="all", fields=("question", "human_answers"), rule=_hc3
    ),
    NamedSet(("mkqa-Chinese",), hub="apple/mkqa", fields=("queries", "answers"), rule=_mkqa_in("zh_cn")),
    NamedSet(("mkqa-Japanese",), hub="apple/mkqa", fields=("queries", "answers"), rule=_mkqa_in("ja")),
    NamedSet(("lmqg/qg_jaquad", "qg_jaquad"), fields=("question", "sentence"), rule=_qg_jaquad),
    NamedSet(("lmqg/qag_jaquad", "qag_jaquad"), fields=("questions", "paragraph"), rule=_qag_jaquad),
    NamedSet(("Smart/Q_A",), local=True),
    NamedSet(("zwh9029/rm-static-m2m100-zh-jianti", "rm-static-m2m100-zh-jianti", "rm-static-zh")),
)


def find_named_set(path: str) -> NamedSet | None:
    """The set whose name the last parts of a path are, a data file's suffix aside; None for any other path."""
    name = path.replace("\\", "/").rstrip("/").lower().removesuffix(".gz")
    name = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
    parts = PurePosixPath(name).parts
    for named in NAMED_SETS:
        for known in named.names:
            tail = PurePosixPath(known.lower()).parts
            if parts[-len(tail) :] == tail:
                return named
    return None


def similar_name(path: str) -> str | None:
    """The name of a known set that a path was probably meant to be."""
    lowered = {name.lower(): name for named in NAMED_SETS for name in named.names}
    near = difflib.get_close_matches(path.lower(), lowered, n=1, cutoff=0.75)
    return lowered[near[0]] if near else None
