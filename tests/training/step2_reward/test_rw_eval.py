"""rw_eval: which texts are scored, and what is counted."""

import json
import statistics
import subprocess

import pytest
import torch

from errors import UserError
from models.load import load_scalar_model, load_tokenizer
from models.save import save_model
from models.templates import load_template
from tests.launching import environment, start, succeed
from tests.tiny import tiny_checkpoint
from training.step2_reward.main import evaluation_line
from training.step2_reward.rw_eval import PAIRS, encode_pairs, read_pairs, summary
from training.utils.flags.steps import RewardEvalArguments

MODULE = "training.step2_reward.rw_eval"


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tiny language model."""
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def reward_model(language_model, tmp_path_factory):
    """A tiny reward model, saved as step 2 saves it."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = load_tokenizer(language_model)
    model = load_scalar_model(language_model, dtype=torch.float32, seed=3)
    save_model(model, tokenizer, load_template(language_model, tokenizer), folder)
    return folder


def test_builtin_pairs_in_a_user_run_equal_transformers_own_scores(reward_model, tmp_path):
    """The slow way: each text alone through AutoModelForSequenceClassification, no padding anywhere."""
    from transformers import AutoModelForSequenceClassification

    output = tmp_path / "scores.json"
    shown = succeed(MODULE, ["--model_name_or_path", str(reward_model), "--output", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [row["chosen"] for row in found["pairs"]] == [good for _, good, _ in PAIRS]

    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = load_tokenizer(reward_model)
    template = load_template(reward_model, tokenizer)
    wins = 0.0
    for row, (question, good, bad) in zip(found["pairs"], PAIRS, strict=True):
        prompt = template.encode_prompt(tokenizer, [{"role": "user", "content": question}])
        expected = []
        for answer in (good, bad):
            with torch.no_grad():
                ids = torch.tensor([prompt + template.encode_answer(tokenizer, answer)])
                hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
                expected.append(float(model.score(hidden)))
        assert [row["chosen_score"], row["rejected_score"]] == pytest.approx(expected, abs=1e-4)
        wins += expected[0] > expected[1]
    assert found["summary"]["accuracy"] == pytest.approx(wins / len(PAIRS))
    assert f"accuracy {wins / len(PAIRS):.4f} over {len(PAIRS)} pairs" in shown


def test_batch_size_changes_no_score(reward_model, tmp_path):
    scores = []
    for size in ("1", "16"):
        output = tmp_path / f"{size}.json"
        succeed(MODULE, ["--model_name_or_path", str(reward_model), "--output", str(output), "--max_seq_len", "48",
                         "--per_device_eval_batch_size", size])  # fmt: skip
        scores.append([row["chosen_score"] for row in json.loads(output.read_text(encoding="utf-8"))["pairs"]])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_summary_by_hand():
    figures = summary([(2.0, 1.0), (0.0, 3.0), (1.0, 1.0), (5.0, 0.0)])
    assert figures["accuracy"] == 2.5 / 4
    assert (figures["chosen_mean"], figures["rejected_mean"], figures["mean"]) == (2.0, 1.25, 1.625)
    assert figures["margin_mean"] == 0.75
    assert figures["margin_std"] == pytest.approx(statistics.pstdev([1, -3, 0, 5]))


def test_long_prompts_lose_their_beginning_and_answers_keep_their_end(language_model):
    tokenizer = load_tokenizer(language_model)
    template = load_template(language_model, tokenizer)
    messages = [{"role": "user", "content": "once upon a time " * 30}]
    pair = {"messages": messages, "chosen": "yes", "rejected": "no, never"}
    good, bad = encode_pairs([pair], tokenizer, template, 24)
    assert max(len(good), len(bad)) == 24 and good[0] == tokenizer.bos_token_id
    assert good[-1] == bad[-1] == template.stop_token_ids[0]
    assert template.decode_answer(tokenizer, bad).endswith("no, never")


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


def test_an_evaluation_says_of_which_pairs_it_is():
    figures = {"accuracy": 0.75, "pairs": 8.0, "chosen": 1.0, "rejected": -1.0}
    line = "step 3: {} accuracy 0.7500 over 8 pairs, chosen 1.000, rejected -1.000"
    assert evaluation_line(3, figures, held_out=True) == line.format("held-out")
    assert evaluation_line(3, figures, held_out=False) == line.format("training")


def test_an_output_that_cannot_be_written_is_said_before_the_model_is_loaded(tmp_path):
    done = start(MODULE, ["--model_name_or_path", str(tmp_path / "no_model"), "--output", str(tmp_path / "missing/x.json")])
    assert done.returncode == 2
    assert "x.json cannot be written" in done.stderr.splitlines()[-1]


def test_a_language_model_is_refused(language_model):
    done = start(MODULE, ["--model_name_or_path", str(language_model), "--num_padding_at_beginning", "1"])
    assert done.returncode == 2
    assert "is no reward model (LlamaForCausalLM)" in done.stderr.splitlines()[-1]


def test_the_script_runs_from_any_folder(repository, tmp_path):
    script = repository / "training/step2_reward/evaluation_scripts/run_eval.sh"
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr
