"""The benchmark beside TRL: its table and picture by hand, its models, and that TRL is given the rows that we train on."""

import itertools
import json

import pytest
import torch

from benchmarks import beside_trl
from benchmarks.beside_trl import (
    MEASURES,
    RAGGED,
    draw,
    flags_of_ours,
    rows_for_trl,
    table_row,
    train_tokenizer,
    write_models,
)

NOW = {"tokens": 300.0, "cpu": 1.0, "wall": 2.0, "peak_mb": 500, "loss": 1.4, "steps": 2, "before": 4.5}
NOW |= {"flops": 6.0, "counted_tokens": 3.0, "matmul_rate": 1200.0}  # two operations a token: 600 a second
RESULT = {
    "measure": "reward",
    "setting": "TRL length-grouped",
    "unit": "tokens",
    "target": 1.6,
    "sides": {
        "now": [NOW] * 3,
        "44ce0bc": [{"tokens": 100.0, "cpu": 1.0, "wall": 2.0, "peak_mb": 700, "loss": 1.4, "steps": 2}] * 3,
        "TRL": [
            {"tokens": 100.0, "cpu": cpu, "wall": 1.0, "peak_mb": 900, "loss": 1.4, "steps": 2, "before": 5.5}
            for cpu in (0.5, 1.0, 2.0)
        ],
    },
}


@pytest.mark.fast
def test_the_table_compares_blocks_that_stand_beside_each_other():
    row = table_row(RESULT)
    assert row[:5] == ["reward", "tokens", "100", "100", "300"]
    assert row[5:9] == ["3.00 (3.00 to 3.00)", "3.00 (1.50 to 6.00)", "1.50", 1.6]
    assert row[9:] == ["0.50", "900", "700", "500", "5.5", "4.5", "0.700", "0.700", "length-grouped"]
    assert len(row) == len(beside_trl.HEAD)
    alone = RESULT | {"sides": {name: RESULT["sides"][name] for name in ("now", "TRL")}}
    assert table_row(alone)[3] == "-" and "44ce0bc" in draw([RESULT]) and "44ce0bc" not in draw([alone])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    for name in ("pairs", "dialogues"):
        lines = (json.dumps(record) + "\n" for record in beside_trl.random_records(name, count=60))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = train_tokenizer(folder)
    write_models(folder / "models", tokenizer, vocabulary=4096, ragged=True)
    return folder


def test_the_end_token_has_its_probability_everywhere(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "models/model")
    with torch.no_grad():
        logits = model(torch.arange(5, 205)[None]).logits[0]
    ends = logits.softmax(dim=-1)[:, model.config.eos_token_id]
    assert RAGGED * 0.8 < float(ends.min()) < float(ends.max()) < RAGGED * 1.2


@pytest.mark.parametrize("name", ["sft-answers", "sft-all", "sft-dialogues", "reward", "dpo", "ppo-ragged"])
def test_trl_is_given_the_rows_of_our_step(folder, name):
    measure = MEASURES[name]
    rows = rows_for_trl(measure, flags_of_ours(measure, folder / "models", folder / "output"))
    assert len(rows) > 20
    first = rows[0]
    if measure.trainer == "SFT":
        trained = [label != -100 for label in first["labels"]]
        assert all(trained[1:]) == (name == "sft-all") and not trained[0]
        answers = sum(one and not before for before, one in itertools.pairwise(trained))
        assert (answers > 1) == (name == "sft-dialogues")
        assert [label for label, one in zip(first["labels"], trained, strict=True) if one][-1] == 0, "the end token is a target"
    elif measure.trainer == "DPO":
        assert first["chosen_ids"][-1] == first["rejected_ids"][-1] == 0 and first["prompt_ids"]
    elif measure.trainer == "Reward":
        assert first["chosen_ids"] != first["rejected_ids"]
    else:
        assert len(first["input_ids"]) <= beside_trl.PROMPT
