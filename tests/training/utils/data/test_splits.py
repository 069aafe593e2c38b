"""Membership follows from content, ratio and seed alone; nothing leaks between steps or into evaluation."""

import json
import math
import subprocess
import sys

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from errors import UserError
from training.utils.data.records import FEATURES, load_records
from training.utils.data.splits import opening_question, parse_split, phase_and_part, select_phase


def pairs(count: int, per_question: int = 1, start: int = 0) -> list[dict]:
    """Records with `per_question` different pairs about each question."""
    return [
        {
            "messages": [{"role": "user", "content": f"Question {start + number // per_question}?"}],
            "chosen": f"answer {number}",
            "rejected": f"worse {number}",
            "margin": None,
        }
        for number in range(count)
    ]


def dialogues(count: int, num_turns: int) -> list[dict]:
    """Every assistant turn of `count` dialogues as a record."""
    records = []
    for number in range(count):
        messages = [{"role": "system", "content": "Be kind."}]
        for turn in range(num_turns):
            messages = [*messages, {"role": "user", "content": f"Question {number}, turn {turn}?"}]
            records.append({"messages": messages, "chosen": f"{number} {turn}", "rejected": None, "margin": None})
            messages = [*messages, {"role": "assistant", "content": f"{number} {turn}"}]
    return records


def dataset(records: list[dict]) -> Dataset:
    return Dataset.from_list(records, features=FEATURES)


def split(records: list[dict], held_out: list[dict] | None = None, **settings) -> dict[tuple[int, str], list[dict]]:
    """{(phase, "train" | "eval"): records} for all three phases."""
    sets = {"train": dataset(records)} | ({"eval": dataset(held_out)} if held_out is not None else {})
    settings = {"data_split": "2,4,4", "seed": 1234, "eval_fraction": 0.1} | settings
    chosen = {phase: select_phase(sets, phase, **settings) for phase in (1, 2, 3)}
    return {(phase, part): list(both[part == "eval"]) for phase, both in chosen.items() for part in ("train", "eval")}


def questions(records: list[dict]) -> set[str]:
    return {next(turn["content"] for turn in row["messages"] if turn["role"] == "user") for row in records}


def told(records: list[dict]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in records)


# ---------------------------------------------------------------------------------------------------- the pure hash


def test_parse_split():
    assert parse_split("2,4,4") == pytest.approx((0.2, 0.4, 0.4))
    assert parse_split("6,2,2") == pytest.approx((0.6, 0.2, 0.2))
    assert parse_split("10,0,0") == (1.0, 0.0, 0.0)
    assert parse_split("0.5, 0.25, 0.25") == (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    "wrong", ["", "2,4", "2,4,4,4", "a,b,c", "2;4;4", "0,0,0", "-1,1,1", "nan,1,1", "inf,1,1", "2,,4"]
)
def test_wrong_split(wrong):
    with pytest.raises(UserError, match=r"--data_split .*expected three proportions"):
        parse_split(wrong)


def within(found: int, total: int, share: float) -> bool:
    """Whether a binomial count lies within 4.5 standard deviations of its mean."""
    return abs(found - total * share) <= 4.5 * math.sqrt(total * share * (1 - share)) + 1e-9


@pytest.mark.parametrize("text, seed, eval_fraction", [("2,4,4", 1, 0.05), ("6,2,2", 2, 0.2), ("1,0,3", 3, 0.5)])
def test_proportions(text, seed, eval_fraction):
    """Of 20 000 keys every phase gets its share, and of each phase the same share is held out."""
    ratios = parse_split(text)
    found = [phase_and_part(f"key {number}", ratios, seed, eval_fraction) for number in range(20_000)]
    for phase in (1, 2, 3):
        held_out = [is_eval for one, is_eval in found if one == phase]
        assert within(len(held_out), len(found), ratios[phase - 1])
        assert within(sum(held_out), len(held_out), eval_fraction)


@given(
    st.text(st.characters(codec="utf-8")),
    st.sampled_from(["2,4,4", "10,0,0", "0,1,0", "0,0,7", "1,0,1"]),
    st.integers(0, 99),
)
def test_empty_phases_stay_empty_and_nothing_is_held_out_at_zero(key, text, seed):
    ratios = parse_split(text)
    phase, is_eval = phase_and_part(key, ratios, seed, 0.0)
    assert ratios[phase - 1] > 0 and not is_eval
    assert phase_and_part(key, ratios, seed, 0.3)[0] == phase  # the held-out share does not move a key between steps


def test_seeds_are_independent():
    """Under another seed a key changes its phase as often as chance says: 1 - (0.2² + 0.4² + 0.4²) = 0.64."""
    ratios = parse_split("2,4,4")
    moved = sum(
        phase_and_part(str(n), ratios, 1, 0.1)[0] != phase_and_part(str(n), ratios, 2, 0.1)[0] for n in range(5000)
    )
    assert within(moved, 5000, 0.64)


def test_same_in_another_process(repository):
    """Python's own hash changes from process to process; ours must not, or ranks would disagree."""
    code = (
        "from training.utils.data.splits import phase_and_part\n"
        "print([phase_and_part(str(n), (0.2, 0.4, 0.4), 7, 0.1) for n in range(200)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str([phase_and_part(str(n), (0.2, 0.4, 0.4), 7, 0.1) for n in range(200)])


# ---------------------------------------------------------------------------------------------------- whole sets


def test_every_record_is_somewhere_once():
    records = pairs(600)
    parts = split(records)
    assert told([row for rows in parts.values() for row in rows]) == told(records)
    assert all(parts.values())  # with 600 questions no part is empty


@pytest.mark.parametrize(
    "records", [pairs(600, per_question=3), dialogues(150, num_turns=4)], ids=["pairs", "dialogues"]
)
def test_no_leak_between_steps_or_into_evaluation(records):
    parts = split(records)
    owners: dict[str, set] = {}
    for part, rows in parts.items():
        for question in questions(rows):
            owners.setdefault(question, set()).add(part)
    assert len(owners) == len(questions(records))
    assert all(len(where) == 1 for where in owners.values())


def test_the_same_on_every_call_and_in_any_order():
    records = pairs(300, per_question=2)
    first, again, shuffled = split(records), split(records), split(records[::-1])
    assert first == again
    assert {part: told(rows) for part, rows in first.items()} == {part: told(rows) for part, rows in shuffled.items()}


def test_other_records_do_not_move_a_record():
    few, many = split(pairs(200)), split(pairs(200) + pairs(500, start=10_000))
    for part, rows in few.items():
        assert set(told(rows)) <= set(told(many[part]))


def test_one_question_in_two_sets_falls_into_one_part():
    """Two --data_path sets with the same questions, written with other white space, do not leak into each other."""
    other = [{**row, "chosen": "other"} for row in pairs(200)]
    for row in other:
        row["messages"] = [{"role": "user", "content": row["messages"][0]["content"].replace(" ", "  \n")}]
    first, second = split(pairs(200)), split(other)
    for part in first:
        assert questions(first[part]) == {" ".join(question.split()) for question in questions(second[part])}


def test_opening_question_is_the_first_of_the_user():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": " a\n b "},
        {"role": "assistant", "content": "c"},
    ]
    assert opening_question(messages) == "a b"
    assert opening_question([*messages, {"role": "user", "content": "d"}]) == "a b"


def test_own_held_out_split_is_kept():
    """Evaluation is the set's own; training loses the questions that stand there, and nothing else."""
    records, held_out = pairs(300), pairs(60, start=280)  # questions 280..299 are in both
    parts = split(records, held_out)
    shared = {f"Question {number}?" for number in range(280, 300)}
    trained = [row for (_, part), rows in parts.items() if part == "train" for row in rows]
    evaluated = [row for (_, part), rows in parts.items() if part == "eval" for row in rows]
    assert told(evaluated) == told(held_out)
    assert questions(trained) == questions(records) - shared
    for phase in (1, 2, 3):
        others = [row for (one, _), rows in parts.items() if one != phase for row in rows]
        assert not questions(parts[phase, "train"] + parts[phase, "eval"]) & questions(others)


def test_constant_prompt_is_split_by_the_whole_record(caplog):
    caplog.set_level("INFO")
    records = pairs(600, per_question=600)
    assert len(questions(records)) == 1
    parts = split(records)
    assert told([row for rows in parts.values() for row in rows]) == told(records)
    for phase, share in ((1, 0.2), (2, 0.4), (3, 0.4)):
        assert within(len(parts[phase, "train"]) + len(parts[phase, "eval"]), 600, share)
    assert caplog.text.count("Many prompts are the same text") == 3  # once a call


def test_few_long_dialogues_are_not_a_constant_prompt():
    """Twelve turns of one dialogue share their opening, but a dialogue is one prompt: it stays whole."""
    records = dialogues(4, num_turns=12)
    parts = split(records)
    assert sorted(question for rows in parts.values() for question in questions(rows)) == sorted(questions(records))


def test_sft_only_belongs_to_step_1():
    records = pairs(100)
    parts = split(records, sft_only=True, data_split="0,5,5")
    assert told(parts[1, "train"] + parts[1, "eval"]) == told(records)
    assert not any(rows for (phase, _), rows in parts.items() if phase != 1)


def test_a_step_without_a_share_is_an_error():
    for phase, text, step in ((2, "10,0,0", "step 2"), (1, "0,1,1", "step 1"), (3, "1,1,0", "step 3")):
        with pytest.raises(UserError, match=rf"--data_split {text} leaves nothing for {step}"):
            select_phase({"train": dataset(pairs(5))}, phase, data_split=text, seed=1, eval_fraction=0.1)
    with pytest.raises(UserError, match="--eval_fraction 1"):
        select_phase({"train": dataset(pairs(5))}, 1, data_split="1,1,1", seed=1, eval_fraction=1)


def test_real_pairs(shared_dir, tmp_path):
    """rm-static's English sample: proportions, and no opening question in two places."""
    path = shared_dir / "data" / "preference_en" / "rm_static_en_train.jsonl.gz"
    records = list(load_records(str(path), cache_dir=str(tmp_path))["train"])
    parts = split(records, seed=5)
    assert sum(map(len, parts.values())) == len(records)
    for phase, share in ((1, 0.2), (2, 0.4), (3, 0.4)):
        mine = parts[phase, "train"] + parts[phase, "eval"]
        assert within(len(questions(mine)), len(questions(records)), share)
    seen = [question for rows in parts.values() for question in questions(rows)]
    assert len(seen) == len(set(seen))
