"""DPO: what is summed, which model is the reference, wrong input. test_dpo_runs.py has whole runs."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import training.step2_dpo.main as dpo
import training.step2_dpo.reference as reference_room
from models.adapters.lora import add_lora
from models.heads import TokenLogProbs
from models.load import load_causal_lm
from tests.launching import write_pairs
from tests.tiny import tiny_checkpoint
from training.utils.data.batching import collate_answer_pairs, plan_micro_batches
from training.utils.flags.parse import main_entry, parse
from training.utils.flags.steps import DPOArguments
from training.utils.loss import dpo_loss, implicit_rewards

BETA = 0.5
ROWS = [
    {"chosen_ids": [5, 9, 20, 31, 2], "rejected_ids": [5, 9, 44, 2], "prompt_length": 2, "margin": None},
    {"chosen_ids": [7, 8, 30, 2], "rejected_ids": [7, 8, 50, 51, 52, 53, 2], "prompt_length": 2, "margin": None},
    {"chosen_ids": [6, 60, 2], "rejected_ids": [6, 61, 62, 2], "prompt_length": 1, "margin": None},
    {"chosen_ids": [4, 3, 11, 12, 13, 2], "rejected_ids": [4, 3, 11, 14, 2], "prompt_length": 3, "margin": None},
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A data file and two tiny models with one tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    tiny_checkpoint(folder / "base", "llama")
    tiny_checkpoint(folder / "other", "llama", seed=5)
    write_pairs(folder / "pairs.jsonl", 48)
    return folder


# --- what is summed ---------------------------------------------------------------------------------------------------


def plain_log_prob(model, ids: list[int], prompt: int) -> torch.Tensor:
    """log p(answer | prompt) of one text alone, token by token, from the model's own logits."""
    table = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(table[place - 1, ids[place]] for place in range(prompt, len(ids)))


def test_log_probs_are_those_of_each_answer_alone(start):
    """Chosen and rejected answers in one padded forward equal each text alone; the tokens of the prompt are not summed."""
    model = load_causal_lm(start / "base", dtype=torch.float32)
    texts = [(row[name], row["prompt_length"]) for name in ("chosen_ids", "rejected_ids") for row in ROWS]
    with torch.no_grad():
        expected = [float(plain_log_prob(model, *text)) for text in texts]
        for pad_id in (0, 2):   # 2 stands in the answers too
            found = reference_room.answer_log_probs(TokenLogProbs(model), collate_answer_pairs(ROWS, pad_id=pad_id))
            assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("world_size", "examples"), [(1, 4), (1, 1), (2, 2), (3, 1), (3, 4)])
def test_gradient_is_the_mean_over_pairs_however_the_batch_is_cut(start, world_size, examples):
    model = load_causal_lm(start / "base", dtype=torch.float32)
    other = load_causal_lm(start / "other", dtype=torch.float32)

    def gradient(losses) -> torch.Tensor:
        model.zero_grad()
        sum(losses).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def alone(row) -> torch.Tensor:
        rewards = []
        for name in ("chosen_ids", "rejected_ids"):
            with torch.no_grad():
                ref = plain_log_prob(other, row[name], row["prompt_length"])
            rewards.append(BETA * (plain_log_prob(model, row[name], row["prompt_length"]) - ref))
        return -(rewards[0] - rewards[1]).sigmoid().log() / len(ROWS)

    def cut(positions) -> torch.Tensor:
        batch = collate_answer_pairs([ROWS[max(p, 0)] for p in positions], [p >= 0 for p in positions], pad_id=0)
        log_probs = [reference_room.answer_log_probs(TokenLogProbs(one), batch) for one in (model, other)]
        return dpo_loss(*implicit_rewards(log_probs[0], log_probs[1].detach(), BETA).chunk(2), batch.weight, len(ROWS))

    lengths = [2 * max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in ROWS]
    plan = plan_micro_batches(lengths, world_size, examples, None)
    found = gradient(cut(positions) for rank in plan for positions in rank)
    torch.testing.assert_close(found, gradient(map(alone, ROWS)), atol=1e-5, rtol=1e-4)


# --- which model is the reference -------------------------------------------------------------------------------------


class Engine(torch.nn.Module):
    """What reference_log_probs needs of DeepSpeed's engine."""

    def __init__(self, module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_the_reference_under_lora_is_the_model_without_its_adapter(start):
    base = TokenLogProbs(load_causal_lm(start / "base", dtype=torch.float32)).eval()
    adapted = add_lora(load_causal_lm(start / "base", dtype=torch.float32), dim=4, alpha=8, dropout=0.5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    engine, batch = Engine(TokenLogProbs(adapted)).train(), collate_answer_pairs(ROWS, pad_id=0)
    found = reference_room.reference_log_probs(engine, None, batch)
    assert torch.equal(found, reference_room.answer_log_probs(base, batch)) and not found.requires_grad
    assert engine.training and engine.module.training
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == trained
    assert (reference_room.answer_log_probs(engine, batch) - found).abs().max() > 0.1   # the adapter is back


def test_a_reference_on_the_host_is_split_while_it_is_read(start, tmp_path, monkeypatch):
    """Whatever the stage of the model that is trained: its own configuration would bind the weights to the device."""
    seen = []
    monkeypatch.setattr(reference_room, "load_causal_lm", lambda path, **settings: seen.append(settings) or torch.nn.Linear(1, 1))
    monkeypatch.setattr(reference_room, "build_frozen", lambda model, run, **how: how["offload"])
    run = SimpleNamespace(dtype=torch.float32, attention="sdpa", world_size=1, device=torch.device("cpu"), in_turn=nullcontext)
    for stage in ("0", "3"):
        args = parse(DPOArguments, [
            "--model_name_or_path", str(start / "base"), "--data_path", "d", "--output_dir", str(tmp_path), "--zero_stage", stage,
            "--offload_reference_model",
        ])  # fmt: skip
        assert reference_room.load_reference(args, None, run) is True
    for settings in seen:
        assert settings["zero3_config"]["zero_optimization"]["offload_param"] == {"device": "cpu"}


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(start, tmp_path, monkeypatch, capsys):
    """Run DPO; it must end with code 2 and one sentence, which is returned, before a model is loaded."""

    def forbidden(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    for room in (dpo, reference_room):
        monkeypatch.setattr(room, "load_causal_lm", forbidden)

    def ends(*flags: str) -> str:
        common = ["--model_name_or_path", str(start / "base"), "--output_dir", str(tmp_path / "out"), "--max_seq_len", "64"]
        with pytest.raises(SystemExit) as ended:
            main_entry(dpo.main, DPOArguments, [*common, "--data_path", str(start / "pairs.jsonl"), *flags])
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    yield ends
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--beta", "0"), "--beta 0.0: must be more than 0"),
        (("--beta=-0.1",), "--beta -0.1: must be more than 0"),
        (("--beta", "nan"), "--beta nan: must be finite"),
        (("--label_smoothing", "0.5"), "--label_smoothing 0.5: must be 0 or more and less than 0.5"),
        (("--data_split", "1,0,1"), "--data_split 1,0,1 leaves nothing for DPO"),
        (("--center_rewards_coefficient", "1"), "is a flag of step 2 (reward model), not of DPO"),
        (("--lora_dim", "4", "--offload_reference_model"), "--offload_reference_model has no effect with --lora_dim"),
        (("--ref_model_name_or_path", "missing/model"), "missing/model"),
    ],
)
def test_wrong_flags(refuse, flags, words):
    assert words in refuse(*flags)


def test_answers_without_pairs_and_a_reference_with_another_tokenizer(refuse, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q {i}", "response": f"a {i}"}) + "\n" for i in range(40)))
    message = refuse("--data_path", str(file))
    assert "answers.jsonl" in message and "rejected" in message
    other = tiny_checkpoint(tmp_path / "opt", "opt")
    message = refuse("--ref_model_name_or_path", str(other))
    assert "The tokenizers of" in message and str(other) in message and "reward model" not in message
