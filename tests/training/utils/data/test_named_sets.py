"""Every named set, from a folder and from the hub."""

import pytest
from datasets import Dataset, DatasetDict

from errors import UserError
from tests.training.utils.data.rows import HH, HH_TURNS, PAIR_RECORDS, PAIRS, read, rec, turns, write_lines
from training.utils.data.named_sets import NAMED_SETS, find_named_set

pytestmark = pytest.mark.fast

PASSAGES = {
    "query": "Q",
    "positive_passages": [{"docid": "1", "text": "A", "title": "t"}, {"docid": "2", "text": "A2", "title": "t"}],
    "negative_passages": [{"docid": "3", "text": "B", "title": "t"}],
}
MKQA = {
    "query": "q",
    "queries": {"zh_cn": "问", "ja": "問"},
    "answers": {"zh_cn": [{"text": "答", "type": "entity"}], "ja": [{"text": "答え", "type": "entity"}]},
}
HH_PAIR = {"prompt": HH, "chosen": " A", "rejected": " B"}
HH_RECORD = rec(HH_TURNS, "A", "B")
OPEN_PAIR = {"prompt": HH.removesuffix("Assistant:"), "chosen": "Assistant: A", "rejected": "Assistant: B"}
SCORED = {
    "question": {"dataset": "eli5", "id": "1", "full_text": "Why?"},
    "answer_0": "Who knows.",
    "answer_1": "Because [1, 2] (of 2010) so (3).",
    "score_0": -0.5,
    "score_1": 0.5,
}
ZHIHU = {"INSTRUCTION": "问", "RESPONSE": "答", "SOURCE": "Zhihu", "METADATA": "{}"}
HC3 = {"question": "问", "human_answers": ["答", "答2"], "chatgpt_answers": ["机"]}
ANSWERED = rec(turns("问"), "答")
VICUNA = {"prompt": "USER: Hi ASSISTANT: Hello. USER: Who are you? ASSISTANT:", "label": "A"}
SHP = {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 0, "score_ratio": 2.0}
QG = {"question": "Q", "sentence": "A.", "paragraph": "A. B.", "answer": "A"}
QAG = {"questions": ["Q", "Q2"], "paragraph": "P", "answers": ["A"]}
# The rows of the table of named sets, written out by hand: how users name them -> a row of the set, and its record.
NAMED = {
    "Dahoas/rm-static": (HH_PAIR, HH_RECORD),
    "../../rm-static": (HH_PAIR, HH_RECORD),
    "./datasets/Dahoas/rm-static": (HH_PAIR, HH_RECORD),
    "Dahoas/full-hh-rlhf": (HH_PAIR | {"response": " A"}, HH_RECORD),
    "Dahoas/synthetic-instruct-gptj-pairwise": (PAIRS[1], PAIR_RECORDS[1]),
    "yitingxie/rlhf-reward-datasets": (OPEN_PAIR, HH_RECORD),
    "openai/webgpt_comparisons": (SCORED, rec(turns("Why?"), "Because (of 2010) so.", "Who knows.")),
    "stanfordnlp/SHP": (SHP, rec(turns("Q"), "B", "A")),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (VICUNA, rec(HH_TURNS, "A")),
    "wangrui6/Zhihu-KOL": (ZHIHU, ANSWERED),
    "Zhihu-KOL": (ZHIHU, ANSWERED),
    "Cohere/miracl-zh-queries-22-12": (PASSAGES, rec(turns("Q"), "A", "B")),
    "Cohere/miracl-ja-queries-22-12": (PASSAGES | {"negative_passages": []}, rec(turns("Q"), "A")),
    "Hello-SimpleAI/HC3-Chinese": (HC3, ANSWERED),
    "../HC3-Chinese": (HC3, ANSWERED),
    "mkqa-Chinese": (MKQA, ANSWERED),
    "mkqa-Japanese": (MKQA, rec(turns("問"), "答え")),
    "lmqg/qg_jaquad": (QG, rec(turns("Q"), "A.")),
    "lmqg/qag_jaquad": (QAG, rec(turns("Q"), "P")),
    "zwh9029/rm-static-m2m100-zh-jianti": (HH_PAIR, HH_RECORD),
    "../../rm-static-zh": (HH_PAIR, HH_RECORD),
}


def test_every_named_set_is_tested():
    tested = {find_named_set(name).names[0] for name in NAMED} | {"local/jsonfile", "Smart/Q_A"}
    assert tested == {named.names[0] for named in NAMED_SETS}


@pytest.mark.parametrize("name", NAMED)
def test_named_set(name, load, tmp_path, monkeypatch):
    """From a folder of save_to_disk, named the way that users name it, and from the hub."""
    folder = tmp_path / "work" / "deeper"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    row, expected = NAMED[name]
    asked = []
    saved = DatasetDict({"train": Dataset.from_list([row]), "test": Dataset.from_list([row, row])})
    saved.save_to_disk(str(tmp_path / "hub"))

    def hub(hub_id, config=None):
        asked.append((hub_id, config))
        return DatasetDict.load_from_disk(str(tmp_path / "hub"))

    monkeypatch.setattr("datasets.load_dataset", hub)
    if not name.startswith("."):
        assert load(name) == {"train": [expected], "eval": [expected, expected]}
        owners = {"mkqa-Chinese": "apple/mkqa", "mkqa-Japanese": "apple/mkqa", "Zhihu-KOL": "wangrui6/Zhihu-KOL"}
        assert asked.pop() == (owners.get(name, name), "all" if name.endswith("HC3-Chinese") else None)
    Dataset.from_list([row]).save_to_disk(name if name.startswith(".") else f"datasets/{name}")
    assert load(name) == {"train": [expected]}
    assert not asked


def test_named_set_rules_on_doubtful_rows(load, tmp_path):
    rows = [SCORED, SCORED | {"score_0": 0.5}, SCORED | {"score_0": 0.75}]
    records = load(write_lines(tmp_path / "webgpt_comparisons.jsonl", rows))["train"]
    assert [row["chosen"] for row in records] == ["Because (of 2010) so.", "Who knows."]  # the tie is left out
    for name, rows, message in (
        ("mkqa-Chinese", [MKQA | {"answers": {"zh_cn": [{"text": None}]}}], "left out 1 with no answer in this language"),
        ("HC3-Chinese", [HC3 | {"human_answers": []}], "left out 1 with an empty answer"),
        ("miracl-zh-queries-22-12", [PASSAGES | {"positive_passages": []}], "left out 1 with no passage that answers"),
        ("qag_jaquad", [QAG | {"questions": []}], "left out 1 with no question"),
        ("SHP", [SHP, {"history": "Q"}], r"SHP\.jsonl, line 2: not of the form of stanfordnlp/SHP"),
    ):
        with pytest.raises(UserError, match=message):
            load(write_lines(tmp_path / f"{name}.jsonl", rows))


def test_a_named_folder_with_other_fields_is_recognised_by_them(load, tmp_path, caplog):
    caplog.set_level("INFO")
    Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "HC3-Chinese"))
    assert load(tmp_path / "HC3-Chinese") == {"train": PAIR_RECORDS}
    assert "without the fields of Hello-SimpleAI/HC3-Chinese" in caplog.text


def test_an_answer_that_quotes_a_dialogue_stays_whole(load, tmp_path):
    quoting = "A\n\nHuman: B?\n\nAssistant: C"
    rows = [
        {"prompt": "\n\nHuman: Hi\n\n", "chosen": f"Assistant: {quoting}", "rejected": "Assistant: D"},
        {"prompt": "Human: Hi", "chosen": f"Human: Hi\n\nAssistant: {quoting}", "rejected": "D"},
    ]
    records = load(write_lines(tmp_path / "rlhf-reward-datasets.jsonl", rows))["train"]
    assert records == [rec(turns("Hi"), quoting, "D")] * 2


LEFT = {
    "HC3-Chinese": (HC3, ['more than one item in "human_answers", of which the first is read', "not read: chatgpt_answers;"]),
    "miracl-zh-queries-22-12": (PASSAGES | {"query_id": "7"}, ['item in "positive_passages"', "not read: query_id"]),
    "qag_jaquad": (QAG, ['item in "questions"', "texts in fields that are not read: answers;"]),
    "rm-static": (HH_PAIR | {"notes": "n"}, ["texts in fields that are not read: notes;"]),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_the_rule_of_a_set_does_not_read_is_told(name, tmp_path):
    row, told = LEFT[name]
    _, notes = read(write_lines(tmp_path / f"{name}.jsonl", [row]))
    assert all(words in notes for words in told), notes
