"""Plain text in blocks: nothing lost but the tail, nothing twice, and errors that name the place."""

import gzip
from itertools import chain

import pytest
from datasets import Dataset

from errors import UserError
from models.templates import load_template
from tests.models.chatglm_folders import GENERATIONS
from tests.tiny import TEXT
from tests.training.utils.data.rows import write_lines
from training.utils.data import plain_text
from training.utils.data.plain_text import prepare_blocks

LENGTH = 7
ROWS = [{"text": text, "other": text * 2} for text in TEXT]


def prepare(path, tokenizer, length=LENGTH, **options):
    return prepare_blocks(str(path), tokenizer, load_template(None, tokenizer), length, **options)


@pytest.mark.fast
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "glm4"])
@pytest.mark.parametrize("batch", [1, 2, 500])
def test_blocks_are_the_texts_one_behind_the_other_cut_without_the_tail(
    tmp_path, monkeypatch, caplog, family, batch, tokenizers
):
    monkeypatch.setattr(plain_text, "BATCH", batch)
    rows = [{"text": text} for text in (TEXT[0], "", *TEXT[1:], "  \n", "it spells </s> out " * 3)]
    tokenizer = tokenizers[family]
    template = load_template(None, tokenizer)
    with caplog.at_level("INFO", logger="sanbu"):
        data = prepare(write_lines(tmp_path / "a.jsonl", rows), tokenizer)
    texts = [row["text"] for row in rows if row["text"].strip()]
    encoded = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    expected = [token for ids in encoded for token in (*template.prefix_ids, *ids, template.end_token_id)]
    whole, tail = divmod(len(expected), LENGTH)
    assert list(chain.from_iterable(data.train["input_ids"])) == expected[: whole * LENGTH]
    assert {(row["length"], len(row["input_ids"]), row["prompt_length"]) for row in data.train} == {(LENGTH, LENGTH, 0)}
    assert len(data.eval) == 0
    line = f"a.jsonl: {len(texts)} texts (2 empty ones left out), {len(expected)} tokens in {whole} blocks of {LENGTH}; "
    assert line + f"the last {tail} tokens fill no block and are left out" in caplog.text


@pytest.mark.parametrize("generation", GENERATIONS)
def test_blocks_of_chatglm_open_with_its_marks_which_are_never_learned(tmp_path, generation, chatglm_tokenizers):
    tokenizer = chatglm_tokenizers[generation]
    end = load_template(None, tokenizer).end_token_id
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in ("[gMASK]", "<sop>" if generation == "chatglm" else "sop")]
    texts = [TEXT[3] + " <sop> [gMASK]", TEXT[4]]
    data = prepare(write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]), tokenizer)
    expected = [token for text in texts for token in (*tokenizer.encode_plain([text])[0], end)]
    rows = data.train["input_ids"]
    assert all(row[:2] == marks and not set(row[2:]) & set(marks) and len(row) == LENGTH for row in rows)
    whole = len(expected) // (LENGTH - 2) * (LENGTH - 2)
    assert list(chain.from_iterable(row[2:] for row in rows)) == expected[:whole]
    assert set(data.train["prompt_length"]) == {2}


@pytest.mark.fast
def test_opened_from_the_cache_and_made_anew_for_another_length_text_or_column(tmp_path, monkeypatch, llama):
    file = write_lines(tmp_path / "a.jsonl", ROWS)
    first = prepare(file, llama)
    with monkeypatch.context() as patch:
        patch.setattr(plain_text, "write_blocks", lambda *_: pytest.fail("tokenised again"))
        again = prepare(file, llama)
    assert again.fingerprint == first.fingerprint and again.report == first.report
    others = [prepare(file, llama, length=8), prepare(file, llama, column="other")]
    others.append(prepare(write_lines(tmp_path / "b.jsonl", ROWS[::-1]), llama))
    assert len({first.fingerprint, *(one.fingerprint for one in others)}) == 4


@pytest.mark.fast
def test_every_kind_of_source_gives_the_same_blocks(tmp_path, llama):
    expected = prepare(write_lines(tmp_path / "a.jsonl", ROWS), llama).train["input_ids"]
    named = write_lines(tmp_path / "b.jsonl", [{"story": text, "year": 1900} for text in TEXT])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(TEXT[:2]), encoding="utf-8")
    (folder / "b.txt").write_text("\n" + "\n \n\n".join(TEXT[2:]) + "\n", encoding="utf-8-sig")
    Dataset.from_dict({"text": TEXT}).save_to_disk(str(tmp_path / "saved"))
    for source in (named, tmp_path / "c.jsonl.gz", folder, folder / "a.txt", tmp_path / "saved"):
        blocks = prepare(source, llama).train["input_ids"][:]
        assert blocks and blocks == expected[: len(blocks)], source
        assert source.name == "a.txt" or len(blocks) == len(expected)
    assert prepare(named, llama, column="story").train["input_ids"] == expected
    (folder / "lines.txt").write_text("first line\nsecond line\n\nanother\n")
    assert list(plain_text.paragraphs(folder / "lines.txt")) == [
        ("line 1", {"text": "first line\nsecond line"}),
        ("line 4", {"text": "another"}),
    ]


WRONG = [
    ([{"title": "a", "body": "b"}], {}, r"line 1: which field is the text\? .found: title, body.*--unsupervised_text_col"),
    ([{"text": "a"}, {"label": "b"}], {}, r"line 2: no text in the field 'text' \(found: label\)"),
    ([{"text": "a"}], {"column": "body"}, r"line 1: no text in the field 'body' \(found: text\)"),
    ([{"text": ["a"]}], {}, r"line 1: no text in the field 'text'"),
    ([{"text": "a"}], {}, r"tokens in 1 texts do not fill one block of --max_prompt_seq_len \+ --max_answer_seq_len = 7"),
]


@pytest.mark.fast
@pytest.mark.parametrize("rows, options, sentence", WRONG)
def test_what_is_wrong_is_told_with_its_place(tmp_path, rows, options, sentence, llama):
    with pytest.raises(UserError, match=sentence):
        prepare(write_lines(tmp_path / "a.jsonl", rows), llama, **options)


@pytest.mark.fast
def test_a_set_that_is_not_there_is_called_by_its_own_flag(tmp_path, llama):
    with pytest.raises(UserError, match=r"^--unsupervised_dataset_name .*absent.jsonl: no such file"):
        prepare(tmp_path / "absent.jsonl", llama)
    (tmp_path / "gb.txt").write_bytes("你好".encode("gb18030"))
    with pytest.raises(UserError, match=r"gb.txt: not UTF-8 text"):
        prepare(tmp_path / "gb.txt", llama)


@pytest.mark.fast
def test_texts_in_other_fields_are_told_also_from_the_cache(tmp_path, llama, caplog):
    rows = [row | {"url": "https://x", "title": "T", "empty": "", "number": 5} for row in ROWS]
    path = write_lines(tmp_path / "a.jsonl", rows)
    for _ in range(2):
        with caplog.at_level("INFO", logger="sanbu"):
            prepare(path, llama)
        assert f"{path}: texts in fields that are not read: other, title" in caplog.messages
        caplog.clear()
