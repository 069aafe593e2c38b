"""The heads and the factory under ZeRO-3 with two processes, against transformers' own forward in one plain process."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from models.adapters.lora import merged_state_dict
from models.adapters.quantization import quantize_linears
from models.chatglm.configuration_chatglm import ChatGLM2Config
from models.chatglm.modeling_chatglm2 import ChatGLMForConditionalGeneration
from models.heads import base_model
from tests.closeness import assert_close
from tests.launching import succeed
from tests.models.zero3_worker import CASES, LEARNING_RATE, STEPS, batch, load
from tests.tiny import tiny_checkpoint
from tests.tiny_chatglm import SMALL

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    for family in {case.family for case in CASES} - {"chatglm2-int4"}:
        tiny_checkpoint(folder / family, family)
    tiny_integers(folder / "chatglm2-int4")
    succeed("tests.models.zero3_worker", [str(folder)], processes=2)
    return folder


def tiny_integers(folder):
    """A random ChatGLM2 checkpoint whose blocks are stored in 4 bits."""
    torch.manual_seed(0)
    config = ChatGLM2Config(padded_vocab_size=408, seq_length=256, **SMALL["chatglm2-6b"])
    model = ChatGLMForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    quantize_linears(model, 4)
    config.quantization_bit = 4
    model.save_pretrained(folder)


def plain_loss(case, model, step):
    """The loss of the global batch without any of our heads."""
    ids, targets = batch(step)
    network = base_model(model)
    if case.scalar:
        network.config.pad_token_id = 401  # no such token in the batch: transformers reads the last position
        return (network(ids, use_cache=False).logits[:, 0] - 1).square().sum() / 4
    log_probs = network(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return -chosen[targets[:, 1:]].sum() / targets.sum()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_learn_what_one_learns(trained, case):
    model = load(case, trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        loss = plain_loss(case, model, step)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = torch.load(trained / f"{case.name}.pt")
    assert_close(found, torch.stack(losses))
    assert found[0] != found[1]  # the worker learned something
    opener = AutoModelForSequenceClassification if case.scalar else AutoModelForCausalLM
    saved = opener.from_pretrained(trained / case.name).state_dict()
    expected = merged_state_dict(model)
    assert saved.keys() == expected.keys()
    for name in saved:
        torch.testing.assert_close(
            saved[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
