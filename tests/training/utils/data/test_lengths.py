"""--max_source_length and --max_target_length: limits of prompt and answer apart, counted by hand."""

import json
from dataclasses import asdict

import pytest

from models.templates import load_template
from tests.tiny import tiny_tokenizer
from training.utils.data import tokenize
from training.utils.data.formats import user_turn
from training.utils.data.sources import load_records
from training.utils.data.tokenize import Counts, Task, fit, prepare
from training.utils.flags.parse import parse
from training.utils.flags.steps import SFTArguments

BASE = ["--model_name_or_path", "m", "--output_dir", "o"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path / "cache"))


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# bos 1 opens every text of LLaMA's, end token 2 every answer.
@pytest.mark.parametrize(
    ("prompt", "answer", "expected", "cut"),
    [
        ([1, 10, 11, 12], [20, 21, 2], ([1, 10, 11, 12], [20, 21, 2]), (0, 0)),
        ([1, 10, 11, 12, 13, 14], [20, 2], ([1, 12, 13, 14], [20, 2]), (1, 0)),       # the end of the prompt stays
        ([1, 10], [20, 21, 22, 23, 2], ([1, 10], [20, 21, 2]), (0, 1)),               # a short prompt gives no room away
        ([1, 10, 11, 12, 13, 14], [20, 21, 22, 2], ([1, 12, 13, 14], [20, 21, 2]), (1, 1)),
        ([10, 11, 12, 13, 14], [20, 2], ([11, 12, 13, 14], [20, 2]), (1, 0)),         # a prompt without bos
    ],
)
def test_prompt_and_answer_are_cut_apart(prompt, answer, expected, cut):
    tokenizer = tiny_tokenizer("llama")
    template = load_template(None, tokenizer)
    assert (template.prefix_ids, template.end_token_id) == ((1,), 2)
    task, counts = Task(1, tokenizer, template, 7, max_source_length=4, max_target_length=3), Counts()
    assert fit(prompt, [answer], task, counts) == expected
    assert (counts.truncated_prompts, counts.truncated_answers) == cut


def test_a_long_dialogue_keeps_its_question(tmp_path):
    """K11: cut at the end, a prompt of several turns lost the question."""
    tokenizer = tiny_tokenizer("llama")
    template = load_template(None, tokenizer)
    rows = [{"prompt": "Why?", "response": "Because. " * 30, "history": [["What is this? " * 20, "A thing. " * 20]]}]
    path = write(tmp_path / "data.jsonl", rows)
    data = prepare([path], 1, tokenizer, template, max_seq_len=72, max_source_length=40, max_target_length=32,
                   data_split="1,0,0", eval_fraction=0.0)  # fmt: skip
    first, second = sorted(data.train.to_list(), key=lambda row: row["prompt_length"])[-2:]
    for row in (first, second):
        assert (row["prompt_length"], row["length"]) == (40, 72)
    dialogue = [*user_turn(rows[0]["history"][0][0].strip()), {"role": "assistant", "content": ("A thing. " * 20).strip()}]
    prompt = template.encode_prompt(tokenizer, [*dialogue, *user_turn("Why?")])
    answer = template.encode_answer(tokenizer, ("Because. " * 30).strip())
    assert [1, *prompt[-39:], *answer[:31], 2] in (first["input_ids"], second["input_ids"])
    assert data.report["train"]["truncated_prompts"] == data.report["train"]["truncated_answers"] == 2


def test_the_limits_are_part_of_the_key(tmp_path):
    tokenizer = tiny_tokenizer("llama")
    template = load_template(None, tokenizer)
    path = write(tmp_path / "data.jsonl", [{"content": "材质#棉", "summary": "一件衣服"}] * 3)
    for limits in ({}, {"max_source_length": 30, "max_target_length": 34}, {"max_source_length": 34, "max_target_length": 30}):
        prepare([path], 1, tokenizer, template, max_seq_len=64, data_split="1,0,0", eval_fraction=0.0, **limits)
    assert len([one for one in (tmp_path / "cache/tokens").iterdir() if one.is_dir()]) == 3


def test_the_flags_reach_the_tokens(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(tokenize, "prepare", lambda *_, **options: seen.update(options) or tokenize.PhaseData(None, None, {}, ""))
    tokenize.prepare_phase(parse(SFTArguments, [*BASE, "--max_source_length", "64", "--max_target_length", "128"]), 1, None, None)
    assert (seen["max_source_length"], seen["max_target_length"], seen["max_seq_len"]) == (64, 128, 192)
    both = ["--max_source_length", "64", "--max_target_length", "128", "--max_seq_len", "192"]
    assert parse(SFTArguments, [*BASE, *both]) == parse(SFTArguments, [*BASE, *both[:4]])
    assert asdict(parse(SFTArguments, [*BASE, "--max_seq_len", "100"]))["max_seq_len"] == 100


# --- ADGEN and dialogues with a history column ------------------------------------------------------------------------


def loaded(path, words=()):
    return load_records(str(path), columns=parse(SFTArguments, [*BASE, *words]).column_map)["train"].to_list()


def test_adgen_needs_no_columns_and_takes_the_former_flags(shared_dir):
    path = shared_dir / "data/adgen/dev.json"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    expected = [(user_turn(row["content"]), row["summary"]) for row in rows]
    assert [(one["messages"], one["chosen"]) for one in loaded(path)] == expected
    words = ["--prompt_column", "content", "--response_column", "summary"]
    assert [(one["messages"], one["chosen"]) for one in loaded(path, words)] == expected


def test_a_history_column_comes_before_the_question(tmp_path):
    rows = [
        {"q": "三？", "a": "三。", "past": [["一？", "一。"], ["二？", "二。"]]},
        {"q": "四？", "a": "四。", "past": []},
    ]
    path = write(tmp_path / "chat.json", rows)
    found = loaded(path, ["--prompt_column", "q", "--response_column", "a", "--history_column", "past"])
    texts = [[turn["content"] for turn in one["messages"]] + [one["chosen"]] for one in found]
    whole = ["一？", "一。", "二？", "二。", "三？", "三。"]
    assert texts == [whole[:2], whole[:4], whole, ["四？", "四。"]]   # every answer of the dialogue is learned


def test_real_dialogues_with_history(shared_dir):
    path = shared_dir / "data/chat/oasst_zh_chatglm.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    words = ["--prompt_column", "prompt", "--response_column", "response", "--history_column", "history"]
    found = {(*(turn["content"] for turn in one["messages"]), one["chosen"]) for one in loaded(path, words)}
    for row in rows:
        turns = [text.strip() for pair in [*row["history"], [row["prompt"], row["response"]]] for text in pair]
        for end in range(2, len(turns) + 1, 2):
            assert tuple(turns[:end]) in found
    assert loaded(path) == loaded(path, words)
