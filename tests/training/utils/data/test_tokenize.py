"""Tokenised data: what is cut and dropped is known, and the cache is built once, never stale, never half."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from errors import UserError
from models.templates import load_template
from tests.tiny import tiny_tokenizer
from training.utils.data import tokenize
from training.utils.data.tokenize import BATCH, prepare, report_lines, tokenizer_digest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["llama", "qwen2"])
def tokenizer(request):
    return tiny_tokenizer(request.param)


@pytest.fixture
def llama():
    return tiny_tokenizer("llama")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count: int, offset: int = 0) -> list[dict]:
    return [
        {
            "prompt": f"Human: What is {n}+1? Assistant:",
            "chosen": f"It is {n + 1}, as everybody knows.",
            "rejected": f"It is {n + 7}.",
        }
        for n in range(offset, offset + count)
    ]


def run(paths, phase, tokenizer, *, max_seq_len=128, split=None, eval_fraction=0.0, **options):
    """prepare() with the whole of the data for the phase."""
    paths = [paths] if isinstance(paths, str) else paths
    split = split or ",".join("1" if phase == one else "0" for one in (1, 2, 3))
    return prepare(
        paths, phase, tokenizer, load_template(None, tokenizer), max_seq_len=max_seq_len, data_split=split,
        eval_fraction=eval_fraction, **options,
    )  # fmt: skip


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_three_phases_hold_what_the_template_writes(tmp_path, tokenizer):
    rows = pairs(7)
    path = write(tmp_path / "pairs.jsonl", rows)
    template = load_template(None, tokenizer)
    prompts = [template.encode_prompt(tokenizer, [{"role": "user", "content": f"What is {n}+1?"}]) for n in range(7)]
    chosen = [template.encode_answer(tokenizer, row["chosen"]) for row in rows]
    rejected = [template.encode_answer(tokenizer, row["rejected"]) for row in rows]

    sft = run(path, 1, tokenizer).train
    assert [row["input_ids"] for row in sft] == [p + c for p, c in zip(prompts, chosen, strict=True)]
    assert list(sft["prompt_length"]) == [len(p) for p in prompts]
    assert list(sft["length"]) == [len(p) + len(c) for p, c in zip(prompts, chosen, strict=True)]

    reward = run(path, 2, tokenizer).train
    assert [row["chosen_ids"] for row in reward] == [p + c for p, c in zip(prompts, chosen, strict=True)]
    assert [row["rejected_ids"] for row in reward] == [p + r for p, r in zip(prompts, rejected, strict=True)]
    assert list(reward["margin"]) == [None] * 7
    for row in reward:
        sizes = len(row["chosen_ids"]), len(row["rejected_ids"])
        assert (row["length"], row["padded_length"]) == (sum(sizes), 2 * max(sizes))

    ppo = run(path, 3, tokenizer).train
    assert [row["prompt_ids"] for row in ppo] == prompts
    assert list(ppo["length"]) == [len(p) for p in prompts]


def test_margins_arrive(tmp_path, llama):
    path = write(tmp_path / "pairs.jsonl", [row | {"margin": 0.5} for row in pairs(3)])
    assert list(run(path, 2, llama).train["margin"]) == [0.5, 0.5, 0.5]


def test_several_sets_and_sft_only_sets_follow_each_other(tmp_path, llama):
    paths = [write(tmp_path / f"{n}.jsonl", pairs(3, offset=10 * n)) for n in range(3)]
    data = run(paths[:2], 1, llama, sft_only_data_path=paths[2:])
    assert len(data.train) == 9
    texts = [llama.decode(row["input_ids"], skip_special_tokens=True) for row in data.train]
    numbers = (0, 1, 2, 10, 11, 12, 20, 21, 22)
    assert all(f"What is {n}+1?" in text for n, text in zip(numbers, texts, strict=True))


def test_sft_only_sets_belong_to_step_1_whatever_the_split(tmp_path, llama):
    one, other = (write(tmp_path / f"{name}.jsonl", pairs(40, n)) for name, n in (("a", 0), ("b", 100)))
    data = run(one, 1, llama, split="1,1,0", sft_only_data_path=[other])
    assert 40 < len(data.train) < 80


# --- too long (D21) ---------------------------------------------------------------------------------------------------


def test_the_oldest_part_of_the_prompt_goes_first_and_the_answer_stays_whole(tmp_path, tokenizer):
    """D21: cut on the right, an example lost its answer and its end token."""
    words = " ".join(str(n) for n in range(400))
    rows = [{"prompt": words + " Why?", "chosen": "Because.", "rejected": "Never, because of the rain."}]
    path = write(tmp_path / "long.jsonl", rows)
    template = load_template(None, tokenizer)
    prompt = template.encode_prompt(tokenizer, [{"role": "user", "content": words + " Why?"}])
    answer = template.encode_answer(tokenizer, "Because.")
    data = run(path, 1, tokenizer, max_seq_len=60)
    row = data.train[0]
    assert row["length"] == len(row["input_ids"]) == 60
    assert row["input_ids"][row["prompt_length"] :] == answer
    opening = list(template.prefix_ids)  # bos of LLaMA, nothing for Qwen
    assert row["input_ids"][: len(opening)] == opening
    tail = row["input_ids"][len(opening) : row["prompt_length"]]
    assert tail == prompt[-len(tail) :]
    assert (data.report["train"]["truncated_prompts"], data.report["train"]["truncated_answers"]) == (1, 0)

    pair = run(path, 2, tokenizer, max_seq_len=60).train[0]
    assert pair["chosen_ids"][: pair["prompt_length"]] == pair["rejected_ids"][: pair["prompt_length"]]
    assert len(pair["rejected_ids"]) == 60
    assert pair["rejected_ids"][pair["prompt_length"] :] == template.encode_answer(tokenizer, rows[0]["rejected"])
    assert pair["chosen_ids"][pair["prompt_length"] :] == answer


def test_an_answer_that_is_too_long_alone_keeps_its_end_token(tmp_path, tokenizer):
    rows = [{"prompt": "Count.", "chosen": " ".join(map(str, range(300))), "rejected": "No."}]
    path = write(tmp_path / "long.jsonl", rows)
    template = load_template(None, tokenizer)
    data = run(path, 1, tokenizer, max_seq_len=40)
    row = data.train[0]
    whole = template.encode_answer(tokenizer, rows[0]["chosen"])
    assert row["length"] == 40
    assert row["prompt_length"] == 1
    assert row["input_ids"][1:-1] == whole[:38]
    assert row["input_ids"][-1] == template.end_token_id
    assert data.report["train"]["truncated_answers"] == 1


@pytest.mark.ppo
def test_pairs_that_are_equal_once_cut_are_dropped_and_counted(tmp_path, llama):
    start = " ".join(map(str, range(200)))
    rows = [
        *pairs(2),
        {"prompt": "Count to 200.", "chosen": start + " yes", "rejected": start + " no"},
        {"prompt": "Say a.", "chosen": "a", "rejected": "a"},
    ]
    data = run(write(tmp_path / "pairs.jsonl", rows), 2, llama, max_seq_len=50)
    assert len(data.train) == data.report["train"]["kept"] == 2
    assert data.report["train"]["records"] == 4
    assert data.report["train"]["dropped"] == {
        "chosen equals rejected": 1, "chosen equals rejected after truncation": 1,
    }  # fmt: skip


def test_prompts_of_step_3_are_dropped_not_cut(tmp_path, llama):
    rows = [{"prompt": "Short?"}, {"prompt": "Long? " + "x y z " * 100}, {"prompt": "Also short?"}]
    data = run(write(tmp_path / "prompts.jsonl", rows), 3, llama, max_seq_len=40)
    assert len(data.train) == 2
    assert data.report["train"]["dropped"] == {"prompt too long": 1}
    assert report_lines(data.report)[0].startswith("train: 2 of 3 records")
    assert "1 dropped: prompt too long" in report_lines(data.report)[0]


def test_dialogues_that_the_chat_template_refuses_are_dropped_and_counted(tmp_path, llama):
    llama.chat_template = (
        "{{ raise_exception('no system') if messages[0].role == 'system' }}{% for m in messages %}{{ m.content }}</s>"
        "{% endfor %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": "A"}]} for n in range(3)
    ]
    rows[1]["messages"].insert(0, {"role": "system", "content": "S"})
    data = run(write(tmp_path / "chat.jsonl", rows), 1, llama)
    assert len(data.train) == 2
    assert data.report["train"]["dropped"] == {"refused by the chat template": 1}


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "rows", "options", "message"),
    [
        (2, [{"prompt": "a", "response": "b"}] * 3, {}, r'data.jsonl: no record has a "rejected" answer. Step 2'),
        (1, [{"prompt": f"q{n}"} for n in range(3)], {}, "data.jsonl: prompts without answers"),
        (
            3, [{"prompt": "x " * 90}, {"prompt": "y " * 90}], {"max_seq_len": 30},
            r"2 prompt too long \(raise --max_prompt_seq_len 30\)",
        ),
        (2, [{"prompt": "a", "chosen": "b", "rejected": "b"}], {}, "of 1 records none is left.*chosen equals rejected"),
        (1, pairs(2), {"split": "1,1000000,0"}, "too few records, none falls to step 1; --data_split 1,0,0"),
        (1, pairs(2), {"max_seq_len": 1}, "--max_seq_len 1: expected at least 2"),
    ],
)  # fmt: skip
def test_data_that_leaves_nothing_is_told_in_one_sentence(tmp_path, llama, phase, rows, options, message):
    path = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(UserError, match=message):
        run(path, phase, llama, **options)
    assert not list((tmp_path / "cache" / "tokens").glob("*/"))


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, llama):
    path = write(tmp_path / "data.jsonl", pairs(3))
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError), match="file"):
        run(path, 1, llama, cache_dir=str(tmp_path / "file"))


# --- evaluation -------------------------------------------------------------------------------------------------------


def questions(dataset: Dataset, tokenizer) -> set[str]:
    return {tokenizer.decode(row["prompt_ids"], skip_special_tokens=True) for row in dataset}


def test_steps_and_evaluation_share_no_question(tmp_path, llama):
    path = write(tmp_path / "pairs.jsonl", pairs(300))
    parts = []
    for phase in (1, 2, 3):
        data = run(path, phase, llama, split="2,4,4", eval_fraction=0.2)
        for part in (data.train, data.eval):
            column = {1: "input_ids", 2: "chosen_ids", 3: "prompt_ids"}[phase]
            texts = [llama.decode(row[column], skip_special_tokens=True) for row in part]
            parts.append({text.split("?")[0] for text in texts})
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts)) == 300


def test_a_question_that_one_set_holds_out_is_not_trained_on_from_another(tmp_path, llama):
    folder = tmp_path / "own_split"
    folder.mkdir()
    write(folder / "train.jsonl", pairs(20))
    write(folder / "test.jsonl", pairs(15, offset=100))
    other = write(tmp_path / "other.jsonl", pairs(30, offset=90))
    data = run([str(folder), other], 3, llama)
    assert len(data.eval) == 15
    assert not questions(data.train, llama) & questions(data.eval, llama)
    assert data.report["train"]["dropped"] == {"question held out in another set": 15}
    assert len(data.train) == 20 + 15


def test_a_question_held_out_by_its_hash_is_not_trained_on_from_a_set_with_its_own_split(tmp_path, llama):
    """The hash does not hold out records of a set that came with a split."""
    folder = tmp_path / "own_split"
    folder.mkdir()
    write(folder / "train.jsonl", pairs(100))
    write(folder / "test.jsonl", pairs(5, offset=500))
    other = write(tmp_path / "other.jsonl", pairs(100))
    data = run([str(folder), other], 3, llama, eval_fraction=0.3)
    held_out = len(data.eval) - 5
    assert held_out > 15
    assert not questions(data.train, llama) & questions(data.eval, llama)
    assert data.report["train"]["dropped"] == {"question held out in another set": held_out}
    assert len(data.train) == 100 - held_out + 100 - held_out


def test_a_fixed_instruction_in_two_sets_is_trained_on_although_some_records_are_held_out(tmp_path, llama):
    rows = [{"prompt": "Tell a joke.", "response": f"Joke {n}."} for n in range(60)]
    paths = [write(tmp_path / f"{place}.jsonl", rows[place::2]) for place in (0, 1)]
    data = run(paths, 1, llama, eval_fraction=0.1)
    assert 0 < len(data.eval) < 10 and len(data.train) == 60 - len(data.eval)


# --- the cache --------------------------------------------------------------------------------------------------------


class Refusing:
    """A tokenizer that may be described but not used."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        raise AssertionError("tokenised again")


def test_a_second_run_does_not_tokenise(tmp_path, llama, monkeypatch):
    path = write(tmp_path / "pairs.jsonl", pairs(5))
    template = load_template(None, llama)
    first = run(path, 2, llama)
    monkeypatch.setattr(type(llama), "__call__", Refusing.__call__)
    again = prepare([path], 2, llama, template, max_seq_len=128, data_split="0,1,0", eval_fraction=0.0)
    assert again.train.to_list() == first.train.to_list()
    assert (again.report, again.fingerprint) == (first.report, first.fingerprint)
    with pytest.raises(AssertionError, match="tokenised again"):
        prepare([path], 2, llama, template, max_seq_len=128, data_split="0,1,0", eval_fraction=0.0, rebuild=True)


def folders(cache: Path) -> list[Path]:
    return sorted(folder for folder in (cache / "tokens").iterdir() if folder.is_dir())


def test_everything_that_changes_the_tokens_changes_the_key(tmp_path, llama, cache, monkeypatch):
    """D15: the old cache knew neither the file's content, nor the end token, nor the template, nor the code."""
    path = write(tmp_path / "pairs.jsonl", pairs(30))
    template = load_template(None, llama)
    base = {"max_seq_len": 128, "data_split": "1,0,0", "seed": 1, "eval_fraction": 0.1}

    def key(phase=1, tokenizer=llama, template=template, **changes) -> str:
        before = set(folders(cache)) if cache.exists() else set()
        prepare([path], phase, tokenizer, template, **(base | changes))
        new = set(folders(cache)) - before
        return new.pop().name if new else "old"

    keys = [key(), key(max_seq_len=127), key(data_split="1,1,1"), key(seed=2), key(eval_fraction=0.2)]
    keys += [key(phase=2, data_split="1,1,1"), key(template=replace(template, stop_token_ids=(5, 2)))]
    keys += [key(tokenizer=tiny_tokenizer("llama", vocab_size=390))]
    write(tmp_path / "pairs.jsonl", pairs(31))
    keys += [key()]
    monkeypatch.setattr(tokenize, "code_digest", lambda: "other code")
    keys += [key()]
    assert len(set(keys)) == len(keys)
    assert key() == "old"


def test_the_key_does_not_depend_on_where_the_file_lies_or_how_the_tokenizer_was_used(tmp_path, llama, cache):
    run(write(tmp_path / "pairs.jsonl", pairs(5)), 1, llama)
    (tmp_path / "moved").mkdir()
    digest = tokenizer_digest(llama)
    llama(["a", "b c d"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(llama) == digest
    llama.save_pretrained(tmp_path / "tokenizer")
    again = type(llama).from_pretrained(tmp_path / "tokenizer")
    assert tokenizer_digest(again) == digest
    run(write(tmp_path / "moved" / "pairs.jsonl", pairs(5)), 1, again)
    assert len(folders(cache)) == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "manifest", "missing part", "no manifest"])
def test_a_damaged_cache_is_noticed_and_built_again(tmp_path, llama, cache, damage, caplog):
    path = write(tmp_path / "pairs.jsonl", pairs(50))
    good = run(path, 1, llama).train.to_list()
    (folder,) = folders(cache)
    arrow, manifest = folder / "train.arrow", folder / "manifest.json"
    content = bytearray(arrow.read_bytes())
    if damage == "cut":
        arrow.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        arrow.write_bytes(content)
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        (arrow if damage == "missing part" else manifest).unlink()
    assert run(path, 1, llama).train.to_list() == good
    assert "tokenising again" in caplog.text
    assert folders(cache) == [folder]


def test_what_a_killed_build_left_is_neither_opened_nor_kept(tmp_path, llama, cache):
    path = write(tmp_path / "pairs.jsonl", pairs(50))
    good = run(path, 1, llama).train.to_list()
    (folder,) = folders(cache)
    half = folder.with_name(f".{folder.name}.building")
    folder.rename(half)  # killed before it was moved into place
    (half / "train.arrow").write_bytes(b"half")
    assert run(path, 1, llama).train.to_list() == good
    assert folders(cache) == [folder]


def test_a_build_that_fails_leaves_nothing(tmp_path, llama, cache, monkeypatch):
    path = write(tmp_path / "pairs.jsonl", pairs(50))
    monkeypatch.setattr(tokenize, "tokenise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(path, 1, llama)
    assert folders(cache) == []


def test_rebuilding_replaces_tokens_and_records(tmp_path, llama, cache):
    path = write(tmp_path / "pairs.jsonl", pairs(5))
    first = run(path, 1, llama)
    (folder,) = folders(cache)
    stamp = folder.stat().st_mtime_ns
    for file in (cache / "records").glob("*/train.arrow"):
        file.write_bytes(b"nonsense")
    again = run(path, 1, llama, rebuild=True)
    assert folder.stat().st_mtime_ns > stamp
    assert again.train.to_list() == first.train.to_list()  # and what was opened before is still whole
    assert again.fingerprint == first.fingerprint


WORKER = """
import sys, time
from pathlib import Path
from models.templates import load_template
from tests.tiny import tiny_tokenizer
from training.utils.data import tokenize
path, gate, log, me = sys.argv[1:]
build = tokenize.write_parts
def slow(*args):
    with open(log, "a") as file:
        file.write(f"build {me}\\n")
    time.sleep(1)
    return build(*args)
tokenize.write_parts = slow
tokenizer = tiny_tokenizer("llama")
Path(gate + me).touch()
while len(list(Path(gate).parent.glob("gate*"))) < 2:
    time.sleep(0.01)
data = tokenize.prepare([path], 1, tokenizer, load_template(None, tokenizer), max_seq_len=64, data_split="1,0,0")
print(len(data.train), data.fingerprint, sum(data.train["length"]))
"""


def run_two(worker: str, path: str, tmp_path: Path, repository: Path) -> list[str]:
    """What two processes that run the worker at the same time print."""
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", worker, path, str(tmp_path / "gate"), str(tmp_path / "log"), str(number)],
            cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [job.communicate(timeout=240) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    return [out for out, _ in outputs]


def test_two_jobs_at_once_build_once_and_read_the_same(tmp_path, repository):
    """D19: the old cache was built by one process a node, all at once on a shared disk."""
    path = write(tmp_path / "pairs.jsonl", pairs(2 * BATCH + 3))
    outputs = run_two(WORKER, path, tmp_path, repository)
    assert outputs[0] == outputs[1]
    assert (tmp_path / "log").read_text().count("build") == 1


def test_one_rebuild_serves_all_processes_of_a_job(tmp_path, repository, llama, cache):
    path = write(tmp_path / "pairs.jsonl", pairs(20))
    prepare([path], 1, llama, load_template(None, llama), max_seq_len=64, data_split="1,0,0")
    (folder,) = folders(cache)
    stamp = folder.stat().st_mtime_ns
    join = f'dist.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=int(me), world_size=2)'
    worker = WORKER.replace("tokenizer =", f"import torch.distributed as dist; {join}\ntokenizer =")
    outputs = run_two(worker.replace('split="1,0,0"', 'split="1,0,0", rebuild=True'), path, tmp_path, repository)
    assert outputs[0] == outputs[1]
    assert (tmp_path / "log").read_text().count("build") == 1
    assert folders(cache)[0].stat().st_mtime_ns > stamp


def test_a_killed_builder_does_not_block_the_next_one(tmp_path, repository, llama, cache):
    path = write(tmp_path / "pairs.jsonl", pairs(20))
    worker = WORKER.replace("sleep(1)", "sleep(60)").replace("< 2:", "< 1:")
    job = subprocess.Popen(
        [sys.executable, "-c", worker, path, str(tmp_path / "gate"), str(tmp_path / "log"), "0"], cwd=repository
    )
    while not (tmp_path / "log").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.kill()
    job.wait()
    data = prepare([path], 1, llama, load_template(None, llama), max_seq_len=64, data_split="1,0,0")
    assert len(data.train) + len(data.eval) == 20
    assert len(folders(cache)) == 1


def test_reading_while_another_process_rebuilds(tmp_path, llama):
    path = write(tmp_path / "pairs.jsonl", pairs(40))
    data = run(path, 1, llama)
    good = data.train.to_list()
    rebuilding = threading.Thread(target=lambda: [run(path, 1, llama, rebuild=True) for _ in range(3)])
    rebuilding.start()
    while rebuilding.is_alive():
        assert data.train.to_list() == good
    rebuilding.join()


def test_fingerprints_follow_the_tokens(tmp_path, llama):
    one, other = (write(tmp_path / f"{name}.jsonl", pairs(5, n)) for name, n in (("a", 0), ("b", 1)))
    assert run(one, 1, llama).fingerprint != run(other, 1, llama).fingerprint
