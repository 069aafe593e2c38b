"""Plain text in blocks: nothing lost but the tail, nothing twice, and errors that name the place."""

import gzip
import json
from itertools import chain

import pytest
from datasets import Dataset

from errors import UserError
from models.load import load_tokenizer
from models.templates import load_template
from tests.tiny import TEXT, tiny_tokenizer
from tests.tiny_chatglm import GENERATIONS, copy_tokenizer
from training.utils.data import plain_text
from training.utils.data.plain_text import prepare_blocks

LENGTH = 7


def prepare(path, tmp_path, family="llama", length=LENGTH, **options):
    tokenizer = tiny_tokenizer(family)
    template = load_template(None, tokenizer)
    return prepare_blocks(str(path), tokenizer, template, length, cache_dir=str(tmp_path / "cache"), **options), tokenizer, template


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def by_hand(texts, tokenizer, template):
    """All texts one behind the other: what opens a text, the text, the end token."""
    return [
        token for text in texts
        for token in (*template.prefix_ids, *tokenizer(text, add_special_tokens=False)["input_ids"], template.end_token_id)
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "glm4"])
@pytest.mark.parametrize("batch", [1, 2, 500])
def test_blocks_are_the_texts_one_behind_the_other_cut_without_the_tail(tmp_path, monkeypatch, caplog, family, batch):
    monkeypatch.setattr(plain_text, "BATCH", batch)
    file = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in (TEXT[0], "", *TEXT[1:], "  \n")])
    with caplog.at_level("INFO", logger="sanbu"):
        data, tokenizer, template = prepare(file, tmp_path, family)
    expected = by_hand(TEXT, tokenizer, template)
    whole = len(expected) // LENGTH
    assert list(chain.from_iterable(data.train["input_ids"])) == expected[: whole * LENGTH]
    assert {(row["length"], len(row["input_ids"]), row["prompt_length"]) for row in data.train} == {(LENGTH, LENGTH, 0)}
    assert len(data.eval) == 0
    said = (
        f"a.jsonl: {len(TEXT)} texts (2 empty ones left out), {len(expected)} tokens in {whole} blocks of {LENGTH}; the last "
        f"{len(expected) % LENGTH} tokens fill no block and are left out"
    )
    assert said in caplog.text


def test_a_text_that_spells_the_end_token_does_not_end_there(tmp_path):
    data, tokenizer, _ = prepare(jsonl(tmp_path / "a.jsonl", [{"text": "a </s> b " * 20}]), tmp_path)
    assert len(data.train) and tokenizer.eos_token_id not in chain.from_iterable(data.train["input_ids"])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_blocks_of_chatglm_open_with_its_marks_which_are_never_learned(tmp_path, shared_dir, generation):
    folder = tmp_path / generation
    folder.mkdir()
    golden = shared_dir / "golden" / generation / "official" / "config.json"
    (folder / "config.json").write_bytes(golden.read_bytes())
    copy_tokenizer(folder, generation, shared_dir)
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer)
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in ("[gMASK]", "<sop>" if generation == "chatglm-6b" else "sop")]
    texts = [TEXT[3] + " <sop> [gMASK]", TEXT[4]]
    file = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    data = prepare_blocks(str(file), tokenizer, template, LENGTH, cache_dir=str(tmp_path / "cache"))
    expected = [token for text in texts for token in (*tokenizer.encode_plain([text])[0], template.end_token_id)]
    rows = data.train["input_ids"]
    assert all(row[:2] == marks and not set(row[2:]) & set(marks) and len(row) == LENGTH for row in rows)
    whole = len(expected) // (LENGTH - 2) * (LENGTH - 2)
    assert list(chain.from_iterable(row[2:] for row in rows)) == expected[:whole]
    assert set(data.train["prompt_length"]) == {2}


def test_opened_from_the_cache_and_made_anew_for_another_length_text_or_column(tmp_path, monkeypatch):
    file = jsonl(tmp_path / "a.jsonl", [{"text": text, "other": text * 2} for text in TEXT])
    first = prepare(file, tmp_path)[0]
    made = plain_text.write_blocks
    monkeypatch.setattr(plain_text, "write_blocks", lambda *_: pytest.fail("tokenised again"))
    again = prepare(file, tmp_path)[0]
    assert again.fingerprint == first.fingerprint and again.report == first.report
    monkeypatch.setattr(plain_text, "write_blocks", made)
    others = [prepare(file, tmp_path, length=8)[0], prepare(file, tmp_path, column="other")[0]]
    others.append(prepare(jsonl(tmp_path / "b.jsonl", [{"text": text} for text in reversed(TEXT)]), tmp_path)[0])
    assert len({first.fingerprint, *(one.fingerprint for one in others)}) == 4


def test_every_kind_of_source_gives_the_same_blocks(tmp_path):
    expected = prepare(jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXT]), tmp_path)[0].train["input_ids"]
    named = jsonl(tmp_path / "b.jsonl", [{"story": text, "year": 1900} for text in TEXT])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(TEXT[:2]), encoding="utf-8")
    (folder / "b.txt").write_text("\n" + "\n \n\n".join(TEXT[2:]) + "\n", encoding="utf-8-sig")
    single = tmp_path / "all.txt"
    single.write_text("\n\n".join(TEXT) + "\n", encoding="utf-8")
    Dataset.from_dict({"text": TEXT}).save_to_disk(str(tmp_path / "saved"))
    for source in (named, tmp_path / "c.jsonl.gz", folder, single, tmp_path / "saved"):
        assert prepare(source, tmp_path)[0].train["input_ids"] == expected, source
    assert prepare(named, tmp_path, column="story")[0].train["input_ids"] == expected


def test_lines_of_a_paragraph_stay_one_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("first line\nsecond line\n\nanother\n")
    assert [row["text"] for _, row in plain_text.paragraphs(file)] == ["first line\nsecond line", "another"]
    assert [where for where, _ in plain_text.paragraphs(file)] == ["line 1", "line 4"]


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([{"title": "a", "body": "b"}], {},
         r"line 1: which field is the text\? \(found: title, body\).*--unsupervised_text_column"),
        ([{"text": "a"}, {"label": "b"}], {}, r"line 2: no text in the field 'text' \(found: label\)"),
        ([{"text": "a"}], {"column": "body"}, r"line 1: no text in the field 'body' \(found: text\)"),
        ([{"text": ["a"]}], {}, r"line 1: no text in the field 'text'"),
        ([{"text": "a"}], {}, r"tokens in 1 texts do not fill one block of --max_prompt_seq_len \+ --max_answer_seq_len = 7"),
        ([{"text": "a"}], {"config": "x"}, "--unsupervised_dataset_config_name x has no effect; drop it"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path, rows, options, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(jsonl(tmp_path / "a.jsonl", rows), tmp_path, **options)


def test_a_set_that_is_not_there_is_called_by_its_own_flag(tmp_path):
    with pytest.raises(UserError, match=r"^--unsupervised_dataset_name .*absent.jsonl: no such file"):
        prepare(tmp_path / "absent.jsonl", tmp_path)
    (tmp_path / "gb.txt").write_bytes("你好".encode("gb18030"))
    with pytest.raises(UserError, match=r"gb.txt: not UTF-8 text"):
        prepare(tmp_path / "gb.txt", tmp_path)
