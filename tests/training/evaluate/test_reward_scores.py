"""Reward scores: which texts are scored, and what is counted."""

import json
import statistics

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from errors import UserError
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.training.utils.data.rows import rec, turns
from training.evaluate.common import BUILT_IN, LoadedModel
from training.evaluate.reward_scores import encode_pairs, main, read_pairs, summary
from training.step2_reward.main import evaluation_line
from training.utils.data.tokenize import Counts, Encoding, Limits, tokenise
from training.utils.flags.parse import parse
from training.utils.flags.steps import RewardEvalArguments

PAIRS = BUILT_IN["pairs"]


def run(model, output, *words: str) -> dict:
    main(parse(RewardEvalArguments, ["--model_name_or_path", str(model), "--output", str(output), *words]))
    return json.loads(output.read_text(encoding="utf-8"))


def test_builtin_pairs_score_as_transformers_scores_them(reward_model, tmp_path, capsys):
    """The slow way: each text alone through AutoModelForSequenceClassification, no padding anywhere."""
    written = run(reward_model, tmp_path / "scores.json")
    assert [row["chosen"] for row in written["pairs"]] == [pair["chosen"] for pair in PAIRS]
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = load_tokenizer(reward_model)
    template = load_template(reward_model, tokenizer)
    wins = 0.0
    for row, pair in zip(written["pairs"], PAIRS, strict=True):
        prompt = template.encode_prompt(tokenizer, [{"role": "user", "content": pair["prompt"]}])
        expected = []
        for answer in (pair["chosen"], pair["rejected"]):
            with torch.no_grad():
                ids = torch.tensor([prompt + template.encode_answer(tokenizer, answer)])
                expected.append(float(model.score(model.model(input_ids=ids).last_hidden_state[0, -1])))
        assert [row["chosen_score"], row["rejected_score"]] == pytest.approx(expected, abs=1e-4)
        wins += expected[0] > expected[1]
    assert written["summary"]["accuracy"] == pytest.approx(wins / len(PAIRS))
    assert f"accuracy {wins / len(PAIRS):.4f} over {len(PAIRS)} pairs" in capsys.readouterr().out


@pytest.mark.fast
def test_summary_by_hand():
    metrics = summary([(2.0, 1.0), (0.0, 3.0), (1.0, 1.0), (5.0, 0.0)])
    assert metrics["accuracy"] == 2.5 / 4
    assert (metrics["chosen_mean"], metrics["rejected_mean"], metrics["mean"]) == (2.0, 1.25, 1.625)
    assert metrics["margin_mean"] == 0.75
    assert metrics["margin_std"] == pytest.approx(statistics.pstdev([1, -3, 0, 5]))


@pytest.mark.parametrize(
    "messages",
    [turns("once upon a time " * 30), turns("system: Be kind.", "once upon", "yes " * 40, "a time")],
    ids=["one question", "system text and turns"],
)
def test_long_prompts_are_cut_as_in_training(llama, messages, caplog):
    tokenizer = load_tokenizer(llama)
    template = load_template(llama, tokenizer)
    record = rec(messages, "yes", "no, never")
    (row,) = tokenise([record], Encoding(2, tokenizer, template, Limits(60)), Counts())
    loaded = LoadedModel("m", torch.nn.Module(), tokenizer, template, torch.device("cpu"))
    good, bad = encode_pairs([record], loaded, 60)
    assert (good, bad) == (row["chosen_ids"], row["rejected_ids"]) and len(bad) <= 60
    assert template.decode_answer(tokenizer, bad).endswith("no, never") and good[-1] == template.stop_token_ids[0]
    assert messages[0]["role"] == "user" or "Be kind." in tokenizer.decode(good)
    assert [one.getMessage() for one in caplog.records] == ["m: of 1 prompts 1 lost their oldest part, to fit into 60 tokens"]
    encode_pairs([rec(turns("a time"), "yes", "no")], loaded, 60)
    assert len(caplog.records) == 1


def test_pairs_come_from_the_held_out_part_and_need_a_rejected_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "test"):
        rows = [{"prompt": f"{part} {n}", "chosen": "good", "rejected": "bad"} for n in range(5)]
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = RewardEvalArguments(model_name_or_path="m", data_path=[str(data)], num_pairs=3)
    assert [pair["messages"][-1]["content"] for pair in read_pairs(args)] == ["test 0", "test 1", "test 2"]

    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "p", "response": "r"}\n')
    with pytest.raises(UserError, match="no record has a rejected answer"):
        read_pairs(RewardEvalArguments(model_name_or_path="m", data_path=[str(answers)]))


def test_what_is_not_scored_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"p{n}", "response": "good" if n < 2 else "bad", "label": n < 2, "note": "x"} for n in (0, 1, 2)]
    rows.append({"prompt": "p0", "response": "bad", "label": False, "note": "x"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_pairs(RewardEvalArguments(model_name_or_path="m", data_path=[str(tmp_path / "a.jsonl")]))) == 1
    for told in ("1 records without a rejected answer are not scored", "texts in fields that are not read: note", "judged bad"):
        assert told in caplog.text


def test_an_evaluation_says_of_which_pairs_it_is():
    metrics = {"accuracy": 0.75, "pairs": 8.0, "chosen": 1.0, "rejected": -1.0}
    line = "step 3: {} accuracy 0.7500 over 8 pairs, chosen 1.000, rejected -1.000"
    assert evaluation_line(3, metrics, "held-out") == line.format("held-out")
    assert evaluation_line(3, metrics, "training") == line.format("training")


def test_wrong_input_is_said_before_the_model_is_loaded(llama, tmp_path):
    with pytest.raises(UserError, match=r"x\.json cannot be written"):
        run(tmp_path / "no_model", tmp_path / "missing/x.json")
    with pytest.raises(UserError, match=r"is no reward model \(LlamaForCausalLM\)"):
        run(llama, tmp_path / "x.json", "--num_padding_at_beginning", "1")
