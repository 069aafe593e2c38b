"""Membership follows from content, ratio and seed alone; nothing leaks between steps or into evaluation."""

import json
import math
import re

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import UserError
from tests.training.utils.data.rows import rec, turns
from training.utils.data.arrow_rows import ArrowRows
from training.utils.data.records import SCHEMA, load_records
from training.utils.data.splits import CONSTANT, opening_question, parse_split, phase_and_part, select_phase


def pairs(count: int, per_question: int = 1, start: int = 0) -> list[dict]:
    """Records with `per_question` different pairs about each question."""
    numbers = range(count)
    return [rec(turns(f"Question {start + n // per_question}?"), f"answer {n}", f"worse {n}") for n in numbers]


def dialogues(count: int, num_turns: int) -> list[dict]:
    """Every assistant turn of `count` dialogues as a record."""
    records = []
    for number in range(count):
        contents = [f"{number} {turn}" for turn in range(2 * num_turns)]
        records += [rec(turns("system: S", *contents[:end]), contents[end]) for end in range(1, 2 * num_turns, 2)]
    return records


def dataset(records: list[dict]) -> ArrowRows:
    return ArrowRows([pyarrow.RecordBatch.from_pylist(records, schema=SCHEMA)])


def split(records: list[dict], held_out: list[dict] | None = None, **settings) -> dict[tuple[int, str], list[dict]]:
    """{(phase, "train" | "eval"): records} for all three phases."""
    sets = {"train": dataset(records)} | ({"eval": dataset(held_out)} if held_out is not None else {})
    settings = {"data_split": "2,4,4", "seed": 1234, "eval_fraction": 0.1} | settings
    chosen = {phase: select_phase(sets, phase, **settings) for phase in (1, 2, 3)}
    return {(phase, part): list(both[part == "eval"]) for phase, both in chosen.items() for part in ("train", "eval")}


def questions(records: list[dict]) -> set[str]:
    return {opening_question(row["messages"]) for row in records}


def as_texts(records: list[dict]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in records)


def check_no_leak(parts, records):
    """Every record is in one part, and every question in one part only."""
    assert as_texts([row for rows in parts.values() for row in rows]) == as_texts(records)
    assert sorted(one for rows in parts.values() for one in questions(rows)) == sorted(questions(records))


def within(found: int, total: int, share: float) -> bool:
    """Whether a binomial count lies within 4.5 standard deviations of its mean."""
    return abs(found - total * share) <= 4.5 * math.sqrt(total * share * (1 - share)) + 1e-9


# --- the hash ---------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_parse_split():
    assert parse_split("2,4,4") == pytest.approx((0.2, 0.4, 0.4))
    assert parse_split("10,0,0") == (1.0, 0.0, 0.0)
    assert parse_split("0.5, 0.25, 0.25") == (0.5, 0.25, 0.25)
    for wrong in ("", "2,4", "2,4,4,4", "a,b,c", "2;4;4", "0,0,0", "-1,1,1", "nan,1,1", "inf,1,1", "2,,4"):
        with pytest.raises(UserError, match=r"--data_split .*expected three proportions"):
            parse_split(wrong)


@pytest.mark.fast
@pytest.mark.parametrize("text, seed, eval_fraction", [("2,4,4", 1, 0.05), ("1,0,3", 3, 0.5)])
def test_proportions(text, seed, eval_fraction):
    """Of 20 000 keys every phase gets its share, and of each phase the same share is held out."""
    ratios = parse_split(text)
    found = [phase_and_part(f"key {number}", ratios, seed, eval_fraction) for number in range(20_000)]
    for phase in (1, 2, 3):
        held_out = [is_eval for one, is_eval in found if one == phase]
        assert within(len(held_out), len(found), ratios[phase - 1])
        assert within(sum(held_out), len(held_out), eval_fraction)


@pytest.mark.fast
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


@pytest.mark.fast
def test_a_key_has_the_same_phase_in_every_process_and_another_under_other_seeds():
    """Python's own hash changes from process to process: ranks would disagree."""
    ratios = parse_split("2,4,4")
    assert [phase_and_part(str(n), ratios, 7, 0.1)[0] for n in range(10)] == [2, 2, 3, 2, 1, 1, 3, 1, 2, 1]
    moved = sum(
        phase_and_part(str(n), ratios, 1, 0.1)[0] != phase_and_part(str(n), ratios, 2, 0.1)[0] for n in range(5000)
    )
    assert within(moved, 5000, 0.64)  # by chance: 1 - (0.2² + 0.4² + 0.4²)


# --- whole sets -------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    "records", [pairs(600, per_question=3), dialogues(150, num_turns=4)], ids=["pairs", "dialogues"]
)
def test_no_leak_between_steps_or_into_evaluation(records):
    parts = split(records)
    check_no_leak(parts, records)
    assert all(parts.values())  # with so many questions no part is empty


@pytest.mark.fast
def test_a_record_stays_in_any_order_and_beside_any_others():
    """Also beside the same questions in another set, written with other white space."""
    records = pairs(200, per_question=2)
    first = split(records)
    more = split(records[::-1] + pairs(500, start=10_000))
    for part, rows in first.items():
        assert set(as_texts(rows)) <= set(as_texts(more[part]))
    spaced = [rec(turns(row["messages"][0]["content"].replace(" ", "  \n")), "other") for row in records]
    assert {part: questions(rows) for part, rows in split(spaced).items()} == {
        part: questions(rows) for part, rows in first.items()
    }


@pytest.mark.fast
def test_opening_question_is_the_first_of_the_user():
    assert opening_question(turns("system: s", " a\n b ", "c", "d")) == "a b"


@pytest.mark.fast
def test_own_held_out_split_is_kept():
    """Evaluation is the set's own; training loses the questions that stand there, and nothing else."""
    records, held_out = pairs(300), pairs(60, start=280)  # questions 280..299 are in both
    notes: list[str] = []
    parts = split(records, held_out, notes=notes)
    left_out = r"(\d+) records of this step left out: their question is in the held-out split too"
    assert sum(int(re.fullmatch(left_out, note)[1]) for note in notes) == 20
    shared = {f"Question {number}?" for number in range(280, 300)}
    check_no_leak(parts, [row for row in records if not questions([row]) & shared] + held_out)
    assert as_texts([row for (_, part), rows in parts.items() if part == "eval" for row in rows]) == as_texts(held_out)


@pytest.mark.fast
def test_constant_prompt_is_split_by_the_whole_record():
    records, notes = pairs(600, per_question=600), []
    parts = split(records, notes=notes)
    assert as_texts([row for rows in parts.values() for row in rows]) == as_texts(records)
    for phase, share in ((1, 0.2), (2, 0.4), (3, 0.4)):
        assert within(len(parts[phase, "train"]) + len(parts[phase, "eval"]), 600, share)
    assert notes == [CONSTANT] * 3  # once a call
    # Twelve turns of one dialogue share their opening, but a dialogue is one prompt: it stays whole.
    records = dialogues(4, num_turns=12)
    check_no_leak(split(records), records)


@pytest.mark.fast
def test_steps_without_data():
    records = pairs(100)
    parts = split(records, sft_only=True, data_split="0,5,5")
    assert as_texts(parts[1, "train"] + parts[1, "eval"]) == as_texts(records)
    assert not any(rows for (phase, _), rows in parts.items() if phase != 1)
    for phase, text, step in ((2, "10,0,0", "step 2"), (1, "0,1,1", "step 1"), (3, "1,1,0", "step 3")):
        with pytest.raises(UserError, match=rf"--data_split {text} leaves nothing for {step}"):
            select_phase({"train": dataset(pairs(5))}, phase, data_split=text, seed=1, eval_fraction=0.1)
    with pytest.raises(UserError, match="--eval_fraction 1"):
        select_phase({"train": dataset(pairs(5))}, 1, data_split="1,1,1", seed=1, eval_fraction=1)


def test_real_pairs(shared_dir):
    """rm-static's English sample: proportions, and no opening question in two places."""
    records = list(load_records(str(shared_dir / "data/preference_en/rm_static_en_train.jsonl.gz"))["train"])
    parts = split(records, seed=5)
    check_no_leak(parts, records)
    for phase, share in ((1, 0.2), (2, 0.4), (3, 0.4)):
        assert within(len(questions(parts[phase, "train"] + parts[phase, "eval"])), len(questions(records)), share)
