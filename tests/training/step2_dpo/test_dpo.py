"""DPO: what is summed, and which model is the reference. test_dpo_runs.py has whole runs."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import training.step2_dpo.reference as reference_room
from models.adapters.lora import add_lora
from models.heads import TokenLogProbs
from models.load import load_causal_lm
from training.utils.data.batching import collate_answer_pairs
from training.utils.flags.parse import parse
from training.utils.flags.steps import DPOArguments

ROWS = [
    {"chosen_ids": [5, 9, 20, 31, 2], "rejected_ids": [5, 9, 44, 2], "prompt_length": 2, "margin": None},
    {"chosen_ids": [7, 8, 30, 2], "rejected_ids": [7, 8, 50, 51, 52, 53, 2], "prompt_length": 2, "margin": None},
    {"chosen_ids": [6, 60, 2], "rejected_ids": [6, 61, 62, 2], "prompt_length": 1, "margin": None},
    {"chosen_ids": [4, 3, 11, 12, 13, 2], "rejected_ids": [4, 3, 11, 14, 2], "prompt_length": 3, "margin": None},
]


# --- what is summed ---------------------------------------------------------------------------------------------------


def plain_log_prob(model, ids: list[int], prompt: int) -> torch.Tensor:
    """log p(answer | prompt) of one text alone, token by token, from the model's own logits."""
    table = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(table[place - 1, ids[place]] for place in range(prompt, len(ids)))


def test_log_probs_are_those_of_each_answer_alone(llama):
    """Chosen and rejected answers in one padded forward equal each text alone; the tokens of the prompt are not summed."""
    model = load_causal_lm(llama, dtype=torch.float32)
    texts = [(row[name], row["prompt_length"]) for name in ("chosen_ids", "rejected_ids") for row in ROWS]
    with torch.no_grad():
        expected = [float(plain_log_prob(model, *text)) for text in texts]
        for pad_id in (0, 2):   # 2 stands in the answers too
            found = reference_room.answer_log_probs(TokenLogProbs(model), collate_answer_pairs(ROWS, pad_id=pad_id))
            assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=1e-4)


# --- which model is the reference -------------------------------------------------------------------------------------


class Engine(torch.nn.Module):
    """What reference_log_probs needs of DeepSpeed's engine."""

    def __init__(self, module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_the_reference_under_lora_is_the_model_without_its_adapter(llama):
    base = TokenLogProbs(load_causal_lm(llama, dtype=torch.float32)).eval()
    adapted = add_lora(load_causal_lm(llama, dtype=torch.float32), dim=4, alpha=8, dropout=0.5)
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


def test_a_reference_on_the_host_is_split_while_it_is_read(llama, tmp_path, monkeypatch):
    """Whatever the stage of the model that is trained: its own configuration would bind the weights to the device."""
    seen = []
    monkeypatch.setattr(reference_room, "load_causal_lm", lambda path, **settings: seen.append(settings) or torch.nn.Linear(1, 1))
    monkeypatch.setattr(reference_room, "build_frozen", lambda model, run, **how: how["offload"])
    run = SimpleNamespace(dtype=torch.float32, attention="sdpa", world_size=1, device=torch.device("cpu"), in_turn=nullcontext)
    for stage in ("0", "3"):
        flags = f"--model_name_or_path {llama} --data_path d --output_dir {tmp_path} --zero_stage {stage}"
        args = parse(DPOArguments, [*flags.split(), "--offload_reference_model"])
        assert reference_room.load_reference(args, {"model": llama}, None, run) is True
    for settings in seen:
        assert settings["zero3_config"]["zero_optimization"]["offload_param"] == {"device": "cpu"}
