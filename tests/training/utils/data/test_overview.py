"""A step tells of each data set what it holds, what was left out, and shows examples with their targets marked."""

import pytest

from tests.training.utils.data.rows import pairs, run, turns, write_lines
from training.utils.data.batching import target_counts

pytestmark = pytest.mark.fast

ROWS = [
    {"messages": turns("system: Be short.", "2+2?", "4.", "", "X")},
    {"messages": turns("2+2?", "4.", "3+3?", "6."), "id": 1},
]


def numbers_of(table: str) -> dict[str, list[str]]:
    """The counts of a table by their names: of training and held out."""
    return {line[:48].strip(): line[48:].split() for line in table.splitlines() if line[48:60].strip().isnumeric()}


def test_the_table_of_each_set(tmp_path, tokenizers, caplog):
    caplog.set_level("INFO")
    first, second = write_lines(tmp_path / "a.jsonl", ROWS), write_lines(tmp_path / "b.jsonl", pairs(3))
    data = run([first, second], 1, tokenizers["qwen2"], overview_folder=str(tmp_path), show_examples=2)
    table = (tmp_path / "data.txt").read_text(encoding="utf-8")
    assert table.strip() in caplog.text
    one, other = table.split(f"{second}, ")
    targets = target_counts(data.train, "answer")
    for text, records, kept, lengths, learned in (
        (one, 2, 1, data.train["length"][:1], targets[:1]),
        (other, 3, 3, data.train["length"][1:], targets[1:]),
    ):
        numbers = numbers_of(text)
        assert numbers["examples"] == [str(kept), "0"] and numbers["records of this step"] == [str(records), "0"]
        assert numbers["tokens"][0] == str(sum(lengths)) and numbers["tokens that are targets"][0] == str(sum(learned))
    assert f"{first}, read by its fields messages\n" in one
    assert "left out 1 with an empty turn (2 answers; first: line 1)" in one
    assert "fields without content, not read: id" in one
    shown = "    | <|im_start|>user\n    | 2+2?<|im_end|>\n    | <|im_start|>assistant\n    | "
    assert f"{shown}>>>4.<|im_end|><<<" in one and one.rstrip().endswith(">>>6.<|im_end|><<<")
    assert one.count("example ") == 1 and other.count("example ") == 2
    assert numbers_of(one)["answers in the sequence of a later one"] == ["1", "0"]
    assert numbers_of(one)["tokens with a sequence for each answer"][0] > numbers_of(one)["tokens"][0]

    caplog.clear()
    again = run([first, second], 1, tokenizers["qwen2"], show_examples=0)  # from the cache
    assert again.fingerprint == data.fingerprint
    assert "left out 1 with an empty turn" in caplog.text and "example" not in caplog.text.replace("examples", "")


@pytest.mark.parametrize(
    "phase, loss_on, expected",
    [
        (1, "all", "    | <s>>>>"),
        (2, "answer", "Assistant:>>> It is 7.</s><<<"),
        (3, "answer", "Human: What is 0+1?\n    | \n    | Assistant:\n"),
    ],
)
def test_what_a_step_learns_is_marked(phase, loss_on, expected, tmp_path, llama):
    path = write_lines(tmp_path / "a.jsonl", pairs(1))
    run(path, phase, llama, overview_folder=str(tmp_path), loss_on=loss_on)
    table = (tmp_path / "data.txt").read_text(encoding="utf-8")
    assert expected in table
    assert (">>>" in table.split("):\n")[1]) == (phase != 3)


def test_step_1_tells_every_bad_answer(shared_cases, tmp_path, llama):
    """One that has a good one beside it, for step 2, and one that has none."""
    run(shared_cases / "labels_good_bad.jsonl", 1, llama, overview_folder=str(tmp_path))
    table = (tmp_path / "data.txt").read_text(encoding="utf-8")
    assert numbers_of(table)["answers rejected or judged bad, not learned"] == ["1", "0"]
    assert "left out 1 with an answer judged bad without a good one" in table


def test_long_texts_lose_their_middle(tmp_path, llama):
    rows = [{"prompt": "word " * 1000, "response": "end"}]
    run(write_lines(tmp_path / "a.jsonl", rows), 1, llama, max_seq_len=4000, overview_folder=str(tmp_path))
    table = (tmp_path / "data.txt").read_text(encoding="utf-8")
    assert "characters …]" in table and ">>> end</s><<<" in table and len(table) < 4000


def test_chatglm_shows_its_marks(tmp_path, chatglm_tokenizers):
    for version, tokenizer in chatglm_tokenizers.items():
        run(
            write_lines(tmp_path / "a.jsonl", [{"prompt": "问题", "response": "回答"}]),
            1,
            tokenizer,
            overview_folder=str(tmp_path),
        )
        table = (tmp_path / "data.txt").read_text(encoding="utf-8")
        assert "[gMASK]" in table and "问题" in table and "回答" in table.split(">>>")[-1], version


def test_records_left_out_for_the_held_out_split_are_in_the_table_also_from_the_cache(tmp_path, llama):
    write_lines(tmp_path / "set" / "train.jsonl", pairs(5))
    write_lines(tmp_path / "set" / "test.jsonl", pairs(2))
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
        run(tmp_path / "set", 1, llama, overview_folder=str(tmp_path / name))
        told = "  2 records of this step left out: their question is in the held-out split too\n"
        assert told in (tmp_path / name / "data.txt").read_text()
