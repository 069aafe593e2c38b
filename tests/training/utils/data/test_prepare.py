"""A step gets its share of every set, from the cache where it is there; one sentence says why nothing is left."""

import json
from dataclasses import replace

import pytest

from errors import UserError
from models.templates import load_template
from tests.training.utils.data.rows import pairs, run, write_lines
from training.utils.data import prepare
from training.utils.data.records import load_records
from training.utils.flags.parse import parse
from training.utils.flags.steps import SFTArguments


@pytest.fixture
def files(tmp_path):
    """Write pairs under names; {name: (count, offset)}."""
    return lambda **sets: [write_lines(tmp_path / name / "train.jsonl", pairs(*some)) for name, some in sets.items()]


def with_own_split(tmp_path, train, test):
    write_lines(tmp_path / "own/train.jsonl", train)
    write_lines(tmp_path / "own/test.jsonl", test)
    return tmp_path / "own"


def questions(dataset, tokenizer, column="prompt_ids"):
    return {tokenizer.decode(ids, skip_special_tokens=True).split("?")[0] for ids in dataset[column]}


@pytest.mark.fast
def test_several_sets_and_sft_only_sets_follow_each_other(files, llama):
    one, two, three = files(a=(3, 0), b=(3, 10), c=(3, 20))
    data = run([one, two], 1, llama, sft_only_data_path=[str(three)])
    texts = [llama.decode(ids, skip_special_tokens=True) for ids in data.train["input_ids"]]
    numbers = (0, 1, 2, 10, 11, 12, 20, 21, 22)
    assert all(f"What is {n}+1?" in text for n, text in zip(numbers, texts, strict=True))


@pytest.mark.fast
def test_sft_only_sets_belong_to_step_1_whatever_the_split(files, llama):
    one, other = files(a=(40, 0), b=(40, 100))
    data = run(one, 1, llama, data_split="1,1,0", sft_only_data_path=[str(other)])
    assert 40 < len(data.train) < 80


@pytest.mark.fast
def test_steps_and_evaluation_share_no_question(files, llama):
    parts = []
    for phase, column in ((1, "input_ids"), (2, "chosen_ids"), (3, "prompt_ids")):
        data = run(files(a=(300, 0)), phase, llama, data_split="2,4,4", eval_fraction=0.2)
        parts += [questions(split, llama, column) for split in (data.train, data.eval)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts)) == 300


@pytest.mark.fast
def test_a_question_that_one_set_holds_out_is_not_trained_on_from_another(tmp_path, files, llama):
    """Whether it is in the set's own split, or held out by its hash, which knows nothing of such a split."""
    own = with_own_split(tmp_path, pairs(20), pairs(15, offset=100))
    data = run([own, *files(other=(30, 90))], 3, llama)
    assert (len(data.train), len(data.eval)) == (20 + 15, 15)
    assert not questions(data.train, llama) & questions(data.eval, llama)
    assert data.report["train"]["dropped"] == {"question held out in another set": 15}

    own = with_own_split(tmp_path, pairs(100), pairs(5, offset=500))
    data = run([own, *files(other=(100, 0))], 3, llama, eval_fraction=0.3)
    held_out = len(data.eval) - 5
    assert held_out > 15 and len(data.train) == 2 * (100 - held_out)
    assert not questions(data.train, llama) & questions(data.eval, llama)
    assert data.report["train"]["dropped"] == {"question held out in another set": held_out}


@pytest.mark.fast
def test_a_fixed_instruction_in_two_sets_is_trained_on_although_some_records_are_held_out(tmp_path, llama):
    rows = [{"prompt": "Tell a joke.", "response": f"Joke {n}."} for n in range(60)]
    paths = [write_lines(tmp_path / f"{number}.jsonl", rows[number::2]) for number in (0, 1)]
    data = run(paths, 1, llama, eval_fraction=0.1)
    assert 0 < len(data.eval) < 10 and len(data.train) == 60 - len(data.eval)


NOTHING_LEFT = [
    (2, [{"prompt": "a", "response": "b"}] * 3, {}, r'data.jsonl: no record has a "rejected" answer. Step 2'),
    (1, [{"prompt": f"q{n}"} for n in range(3)], {}, "data.jsonl: prompts without answers"),
    (3, [{"prompt": "x " * 90}] * 2, {"max_seq_len": 30}, r"2 prompt too long \(raise --max_prompt_seq_len 30\)"),
    (2, [{"prompt": "a", "chosen": "b", "rejected": "b"}], {}, "of 1 records none is left.*chosen equals rejected"),
    (1, pairs(2), {"data_split": "1,1000000,0"}, "too few records, none falls to step 1; --data_split 1,0,0 --eval_fraction 0"),
    (1, pairs(2), {"max_seq_len": 1}, "--max_seq_len 1: expected at least 2"),
]


@pytest.mark.fast
@pytest.mark.parametrize("phase, rows, flags, message", NOTHING_LEFT)
def test_data_that_leaves_nothing_is_told_in_one_sentence(tmp_path, llama, phase, rows, flags, message):
    with pytest.raises(UserError, match=message):
        run(write_lines(tmp_path / "data.jsonl", rows), phase, llama, **flags)
    assert not list((tmp_path / "cache" / "tokens").glob("*/"))


# --- the cache --------------------------------------------------------------------------------------------------------


def folders(cache):
    return {folder for folder in (cache / "tokens").iterdir() if folder.is_dir()} if cache.exists() else set()


@pytest.mark.fast
def test_everything_that_changes_the_tokens_changes_the_folder(files, tokenizers, cache, tmp_path):
    """The old cache knew neither the file's content, nor the end token, nor the template."""
    (path,), llama = files(a=(30, 0)), tokenizers["llama"]
    template = load_template(None, llama)
    changes = [
        {},
        {"max_seq_len": 127},
        {"max_source_length": 60, "max_target_length": 68},
        {"max_source_length": 68, "max_target_length": 60},
        {"data_split": "1,1,1"},
        {"seed": 2},
        {"eval_fraction": 0.2},
        {"phase": 2},
        {"template": replace(template, stop_token_ids=(5, 2))},
        {"tokenizer": tokenizers["qwen2"]},
    ]
    for number, change in enumerate(changes, start=1):
        run(path, **{"phase": 1, "tokenizer": llama, "template": template} | change)
        assert len(folders(cache)) == number, change
    moved = write_lines(tmp_path / "moved" / "elsewhere.jsonl", pairs(30))
    data = run(moved, 1, llama)  # the same content
    assert len(folders(cache)) == len(changes)
    write_lines(path, pairs(31))
    assert run(path, 1, llama).fingerprint != data.fingerprint
    assert len(folders(cache)) == len(changes) + 1


@pytest.mark.fast
def test_a_second_run_does_not_tokenise_and_a_rebuild_does(files, llama, monkeypatch, cache):
    (path,) = files(a=(5, 0))
    first = run(path, 2, llama)
    good, tokenised = first.train.to_list(), []
    original = prepare.tokenise
    monkeypatch.setattr(prepare, "tokenise", lambda *given: tokenised.append(1) or original(*given))
    again = run(path, 2, llama)
    assert again.train.to_list() == good and not tokenised
    assert (again.report, again.fingerprint) == (first.report, first.fingerprint)
    for file in (cache / "records").glob("*/train.arrow"):
        file.write_bytes(b"nonsense")
    again = run(path, 2, llama, rebuild_cache=True)
    assert tokenised and first.train.to_list() == again.train.to_list() == good  # what was opened before is still whole
    assert again.fingerprint == first.fingerprint


# --- flags ------------------------------------------------------------------------------------------------------------

BASE = ["--model_name_or_path", "m", "--output_dir", "o"]


@pytest.mark.fast
def test_the_flags_of_a_step_reach_the_tokens(tmp_path, llama, caplog):
    path = write_lines(tmp_path / "data.jsonl", [{"question": f"q{n}", "answer": f"a{n} " * 40} for n in range(40)])
    flags = ["--data_path", str(path), "--data_split", "1,0,0", "--columns", "prompt=question,chosen=answer"]
    flags += ["--eval_fraction", "0.2", "--cache_dir", str(tmp_path / "mine"), "--max_source_length", "16"]
    args = parse(SFTArguments, [*BASE, *flags, "--max_target_length", "24"])
    with caplog.at_level("INFO", logger="sanbu"):
        data = prepare.prepare_phase(args, 1, llama, load_template(None, llama))
    assert len(data.train) + len(data.eval) == 40
    assert max(data.train["length"]) <= args.max_seq_len == 40
    line = f"train: {len(data.train)} of {len(data.train)} records"
    assert line in caplog.text and f"; {len(data.train)} answers lost their tail" in caplog.text
    assert (tmp_path / "mine" / "tokens").is_dir()
    both = ["--max_source_length", "64", "--max_target_length", "128"]
    assert parse(SFTArguments, [*BASE, *both]) == parse(SFTArguments, [*BASE, *both, "--max_seq_len", "192"])


def loaded(path, words=()):
    records = load_records(str(path), columns=parse(SFTArguments, [*BASE, *words]).column_map)["train"].to_list()
    return [(*(turn["content"] for turn in record["messages"]), record["chosen"]) for record in records]


def test_adgen_and_dialogues_take_the_former_flags_or_none(shared_dir):
    path = shared_dir / "data/adgen/dev.json"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    expected = [(row["content"], row["summary"]) for row in rows]
    assert loaded(path) == loaded(path, ["--prompt_column", "content", "--response_column", "summary"]) == expected

    path = shared_dir / "data/chat/oasst_zh_chatglm.jsonl"
    words = ["--prompt_column", "prompt", "--response_column", "response", "--history_column", "history"]
    records = loaded(path, words)
    assert loaded(path) == records
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        texts = [text.strip() for pair in [*row["history"], [row["prompt"], row["response"]]] for text in pair]
        for end in range(2, len(texts) + 1, 2):  # every answer of the dialogue is learned
            assert tuple(texts[:end]) in records
