"""Every named set, from a folder and from the hub; and what happens when the hub cannot be asked."""

import json

import pytest
from datasets import Dataset, DatasetDict

from errors import UserError
from tests.training.utils.data.rows import HH, HH_TURNS, PAIR_RECORDS, PAIRS, rec, turns, write_lines
from training.utils.data import sources
from training.utils.data.named_sets import NAMED_SETS, find_named_set

# ---------------------------------------------------------------------------------------------------- named sets

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
# The rows of the table of named sets, written out by hand: how users name them -> a row of the set, and its record.
NAMED = {
    "Dahoas/rm-static": (HH_PAIR, HH_RECORD),
    "../../rm-static": (HH_PAIR, HH_RECORD),
    "./datasets/Dahoas/rm-static": (HH_PAIR, HH_RECORD),
    "Dahoas/full-hh-rlhf": ({**HH_PAIR, "response": " A"}, HH_RECORD),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        rec(turns("Q"), "A", "B"),
    ),
    "yitingxie/rlhf-reward-datasets": (
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who are you?\n\n",
            "chosen": "Assistant: A",
            "rejected": "Assistant: B",
        },
        HH_RECORD,
    ),
    "openai/webgpt_comparisons": (
        {
            "question": {"dataset": "eli5", "id": "1", "full_text": "Why?"},
            "answer_0": "Who knows.",
            "answer_1": "Because [1, 2] (of 2010) so (3).",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        rec(turns("Why?"), "Because (of 2010) so.", "Who knows."),
    ),
    "stanfordnlp/SHP": (
        {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 0, "score_ratio": 2.0},
        rec(turns("Q"), "B", "A"),
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        {"prompt": "USER: Hi ASSISTANT: Hello. USER: Who are you? ASSISTANT:", "label": "A"},
        rec(HH_TURNS, "A"),
    ),
    "wangrui6/Zhihu-KOL": (
        {"INSTRUCTION": "问", "RESPONSE": "答", "SOURCE": "Zhihu", "METADATA": "{}"},
        rec(turns("问"), "答"),
    ),
    "Zhihu-KOL": ({"INSTRUCTION": "问", "RESPONSE": "答", "SOURCE": "Zhihu", "METADATA": "{}"}, rec(turns("问"), "答")),
    "Cohere/miracl-zh-queries-22-12": (PASSAGES, rec(turns("Q"), "A", "B")),
    "Cohere/miracl-ja-queries-22-12": ({**PASSAGES, "negative_passages": []}, rec(turns("Q"), "A")),
    "Hello-SimpleAI/HC3-Chinese": (
        {"question": "问", "human_answers": ["答", "答2"], "chatgpt_answers": ["机"]},
        rec(turns("问"), "答"),
    ),
    "../HC3-Chinese": ({"question": "问", "human_answers": ["答"], "chatgpt_answers": ["机"]}, rec(turns("问"), "答")),
    "mkqa-Chinese": (MKQA, rec(turns("问"), "答")),
    "mkqa-Japanese": (MKQA, rec(turns("問"), "答え")),
    "lmqg/qg_jaquad": (
        {"question": "Q", "sentence": "A.", "paragraph": "A. B.", "answer": "A"},
        rec(turns("Q"), "A."),
    ),
    "lmqg/qag_jaquad": ({"questions": ["Q", "Q2"], "paragraph": "P", "answers": ["A"]}, rec(turns("Q"), "P")),
    "zwh9029/rm-static-m2m100-zh-jianti": (HH_PAIR, HH_RECORD),
    "../../rm-static-zh": (HH_PAIR, HH_RECORD),
}


def test_every_named_set_is_tested():
    tested = {find_named_set(name).names[0] for name in NAMED} | {"local/jsonfile", "Smart/Q_A"}
    assert tested == {named.names[0] for named in NAMED_SETS}


@pytest.mark.parametrize("name", NAMED)
def test_named_set_in_a_folder(name, load, tmp_path, monkeypatch):
    """A folder written by save_to_disk, named the way that the launchers of the forks name it."""
    work = tmp_path / "work" / "deeper"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    row, expected = NAMED[name]
    is_path = name.startswith(".")
    Dataset.from_list([row]).save_to_disk(name if is_path else f"datasets/{name}")
    assert load(name) == {"train": [expected]}


@pytest.mark.parametrize("name", [name for name in NAMED if not name.startswith(".")])
def test_named_set_on_the_hub(name, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row, expected = NAMED[name]
    saved = DatasetDict({"train": Dataset.from_list([row]), "test": Dataset.from_list([row, row])})
    saved.save_to_disk(str(tmp_path / "hub"))
    asked = []

    def hub(hub_id, config=None):
        asked.append((hub_id, config))
        return DatasetDict.load_from_disk(str(tmp_path / "hub"))

    monkeypatch.setattr(sources, "load_dataset", hub)
    assert load(name) == {"train": [expected], "eval": [expected, expected]}
    owners = {"mkqa-Chinese": "apple/mkqa", "mkqa-Japanese": "apple/mkqa", "Zhihu-KOL": "wangrui6/Zhihu-KOL"}
    assert asked == [(owners.get(name, name), "all" if name.endswith("HC3-Chinese") else None)]


def test_named_set_rules_on_doubtful_rows(load, tmp_path):
    webgpt = NAMED["openai/webgpt_comparisons"][0]
    rows = [webgpt, {**webgpt, "score_0": 0.5}, {**webgpt, "score_0": 0.75}]
    records = load(write_lines(tmp_path / "webgpt_comparisons.jsonl", rows))["train"]
    assert [row["chosen"] for row in records] == ["Because (of 2010) so.", "Who knows."]  # the tie is left out
    with pytest.raises(UserError, match="no usable record; left out 1 with no answer in this language"):
        load(write_lines(tmp_path / "mkqa-Chinese.jsonl", [{**MKQA, "answers": {"zh_cn": [{"text": None}]}}]))
    with pytest.raises(UserError, match=r"SHP\.jsonl, line 2: not of the form of stanfordnlp/SHP"):
        load(write_lines(tmp_path / "SHP.jsonl", [NAMED["stanfordnlp/SHP"][0], {"history": "Q"}]))


def test_a_named_folder_with_other_fields_is_recognised_by_them(load, tmp_path, caplog):
    caplog.set_level("INFO")
    Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "HC3-Chinese"))
    assert load(tmp_path / "HC3-Chinese") == {"train": PAIR_RECORDS}
    assert "without the fields of Hello-SimpleAI/HC3-Chinese" in caplog.text


def test_local_jsonfile(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data/train\.json"):
        load("local/jsonfile")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.json").write_text(json.dumps(PAIRS))
    assert load("local/jsonfile") == {"train": PAIR_RECORDS}
    (tmp_path / "data/eval.json").write_text(json.dumps(PAIRS[:1]))
    assert load("local/jsonfile") == {"train": PAIR_RECORDS, "eval": PAIR_RECORDS[:1]}


def test_a_file_of_the_name_of_a_local_set_is_read_itself(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/train.json", "data/Smart/Q_A.json"):
        write_lines(tmp_path / name, PAIRS)
    for name in ("x/local/jsonfile.json", "x/Smart/Q_A.json"):
        with pytest.raises(UserError, match="no such file or folder"):
            load(name)
        assert load(write_lines(tmp_path / name, PAIRS[:1])) == {"train": PAIR_RECORDS[:1]}


def test_an_answer_that_quotes_a_dialogue_stays_whole(load, tmp_path):
    quoting = "A\n\nHuman: B?\n\nAssistant: C"
    rows = [
        {"prompt": "\n\nHuman: Hi\n\n", "chosen": f"Assistant: {quoting}", "rejected": "Assistant: D"},
        {"prompt": "Human: Hi", "chosen": f"Human: Hi\n\nAssistant: {quoting}", "rejected": "D"},
    ]
    records = load(write_lines(tmp_path / "rlhf-reward-datasets.jsonl", rows))["train"]
    assert records == [rec(turns("Hi"), quoting, "D")] * 2


def test_smart_qa_is_a_file_and_never_its_own_test_set(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Smart/Q_A\.json"):
        load("Smart/Q_A")
    (tmp_path / "data/Smart").mkdir(parents=True)
    (tmp_path / "data/Smart/Q_A.json").write_text(json.dumps(PAIRS))
    assert load("Smart/Q_A") == {"train": PAIR_RECORDS}


# ---------------------------------------------------------------------------------------------------- the hub


def test_no_network_says_how_to_fetch(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Dahoas/rm-static", "mkqa-Chinese", "some/thing"):
        monkeypatch.setattr(sources, "load_dataset", raising(ConnectionError("offline")))
        with pytest.raises(UserError, match=rf"cannot be reached.*scripts\.download_dataset {name}, .*datasets/{name}"):
            load(name)
    with pytest.raises(UserError, match="Did you mean stanfordnlp/SHP"):
        load("stanfordnlp/SPH")


def test_real_client_without_network(load, tmp_path, monkeypatch):
    """The exception that the installed client raises offline is understood (HF_HUB_OFFLINE is set for all tests)."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be reached"):
        load("nobody-here/no-such-set")


def test_hub_troubles(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "load_dataset", raising(FileNotFoundError("Dataset 'a/b' doesn't exist")))
    with pytest.raises(UserError, match="no public data set on the hub"):
        load("a/b")
    monkeypatch.setattr(
        sources, "load_dataset", raising(ValueError("Config name is missing, one of ['main', 'socratic']"))
    )
    with pytest.raises(UserError, match=r"'main', 'socratic'.*ID:CONFIG"):
        load("a/b")


def test_configurations_and_loading_scripts(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "saved"))
    asked = []

    def hub(hub_id, config=None, revision=None):
        asked.append((hub_id, config, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found b.py")
        return DatasetDict({"train": Dataset.load_from_disk(str(tmp_path / "saved"))})

    monkeypatch.setattr(sources, "load_dataset", hub)
    assert load("a/b:main") == {"train": PAIR_RECORDS}
    assert asked == [("a/b", "main", None), ("a/b", "main", "refs/convert/parquet")]


def test_another_owner_is_not_taken_for_the_known_set(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(sources, "load_dataset", lambda *names: asked.append(names) or raising(ConnectionError("x"))())
    with pytest.raises(UserError):
        load("somebody/rm-static")
    assert asked == [("somebody/rm-static", None)]


def raising(error: Exception):
    def function(*_, **__):
        raise error

    return function
