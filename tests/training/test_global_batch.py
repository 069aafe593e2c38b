"""The gradient of a global batch does not depend on how it is cut into micro-batches and processes.

Processes are played one after the other in this one; the two-process runs of test_steps.py repeat it with DeepSpeed.
"""

import pytest
import torch

from models.heads import TokenLogProbs, TokenScores, at_last_token
from models.load import load_causal_lm, load_scalar_model
from tests.tiny import tiny_checkpoint
from training.step3_ppo.objectives import policy_loss, value_loss
from training.utils.data.batching import collate_pairs, collate_sft, plan_micro_batches
from training.utils.loss import bradley_terry_loss, sft_loss

# processes, examples a micro-batch, tokens a micro-batch
CUTS = [
    (1, 7, None), (1, 1, None), (1, 3, None), (2, 2, None), (3, 1, None), (5, 4, None), (1, None, 60), (2, None, 45),
    (9, 1, None),
]  # fmt: skip
PAD = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module")
def rows():
    """Seven examples of ragged lengths."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    found = []
    for _ in range(7):
        prompt = [draw(4, 300) for _ in range(draw(2, 9))]
        chosen = [draw(4, 300) for _ in range(draw(1, 12))]
        rejected = [draw(4, 300) for _ in range(draw(1, 12))]
        found.append({
            "input_ids": prompt + chosen, "prompt_length": len(prompt), "length": len(prompt) + len(chosen),
            "chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "margin": None,
        })  # fmt: skip
    return found


def gradients(model, micro_losses) -> torch.Tensor:
    """Add up the gradients of the losses as DeepSpeed would; one flat vector."""
    model.zero_grad()
    for loss in micro_losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cut(rows, lengths, world_size, max_examples, max_tokens):
    """(rows, which are real) of every micro-batch of every process."""
    for rank in plan_micro_batches(lengths, world_size, max_examples, max_tokens):
        for positions in rank:
            yield [rows[max(position, 0)] for position in positions], [position >= 0 for position in positions]


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_sft_gradient(folder, rows, loss_on):
    model = TokenLogProbs(load_causal_lm(folder, dtype=torch.float32))
    # The reference: each example alone, without padding or masks; a plain mean over target tokens.
    starts = [row["prompt_length"] if loss_on == "answer" else 1 for row in rows]
    total = sum(len(row["input_ids"]) - start for row, start in zip(rows, starts, strict=True))

    def alone(row, start):
        ids = torch.tensor([row["input_ids"]])
        logits = model.model(input_ids=ids).logits.log_softmax(-1)[0]
        return -sum(logits[t - 1, ids[0, t]] for t in range(start, ids.shape[1])) / total

    expected = gradients(model, [alone(row, start) for row, start in zip(rows, starts, strict=True)])
    for setting in CUTS:
        def micro(part, real):
            batch = collate_sft(part, real, pad_id=PAD, loss_on=loss_on)
            mask = batch.loss_mask[:, 1:]
            return sft_loss(model(batch.input_ids, batch.attention_mask, target_mask=mask), mask, total)

        found = gradients(model, [micro(*pair) for pair in cut(rows, [row["length"] for row in rows], *setting)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_reward_gradient(folder, rows):
    model = TokenScores(load_scalar_model(folder, dtype=torch.float32, seed=1))

    def alone(row):
        scores = [model.model(input_ids=torch.tensor([row[name]])).logits[0, 0] for name in ("chosen_ids", "rejected_ids")]
        return -(scores[0] - scores[1]).sigmoid().log() / len(rows)

    expected = gradients(model, [alone(row) for row in rows])
    lengths = [2 * max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    for world_size, max_examples, max_tokens in CUTS:
        def micro(part, real):
            batch = collate_pairs(part, real, pad_id=PAD)
            chosen, rejected = at_last_token(model(batch.input_ids, batch.attention_mask), batch.attention_mask).chunk(2)
            return bradley_terry_loss(chosen, rejected, batch.weight, len(rows), margin=batch.margin)

        setting = (world_size, max_examples, max_tokens and 2 * max_tokens)
        found = gradients(model, [micro(*pair) for pair in cut(rows, lengths, *setting)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.detail(33)
@pytest.mark.ppo
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_ppo_gradient(folder, rows, role):
    """One denominator for the global minibatch; the reference sums token by token."""
    if role == "actor":
        model = TokenLogProbs(load_causal_lm(folder, dtype=torch.float32))
    else:
        model = TokenScores(load_scalar_model(folder, dtype=torch.float32, seed=1))
    generator = torch.Generator().manual_seed(1)
    wide = max(len(row["input_ids"]) for row in rows)
    first, second = (torch.randn(len(rows), wide, generator=generator) * 0.3 for _ in range(2))
    total = sum(len(row["input_ids"]) - row["prompt_length"] for row in rows)

    def outputs(ids, mask):
        """What is trained, at the places that predict tokens 1 and later: log-probabilities, or values."""
        return model(ids, mask) if role == "actor" else model(ids, mask)[:, :-1]

    def alone(number, row):
        ids = torch.tensor([row["input_ids"]])
        found = outputs(ids, torch.ones_like(ids))[0]
        loss = 0.0
        for t in range(row["prompt_length"], ids.shape[1]):
            a, b = first[number, t], second[number, t]
            if role == "actor":
                ratio = (found[t - 1] - (found[t - 1].detach() + a)).exp()
                loss = loss + torch.maximum(-b * ratio, -b * ratio.clamp(0.8, 1.2))
            else:
                clipped = a + (found[t - 1] - a).clamp(-0.2, 0.2)
                loss = loss + 0.5 * torch.maximum((found[t - 1] - b) ** 2, (clipped - b) ** 2)
        return loss / total

    expected = gradients(model, [alone(number, row) for number, row in enumerate(rows)])
    assert expected.abs().max() > 1e-3
    numbered = [row | {"number": number} for number, row in enumerate(rows)]
    for setting in CUTS:
        def micro(part, real):
            batch = collate_sft(part, real, pad_id=PAD, loss_on="answer")
            mask = batch.loss_mask[:, 1:]
            numbers = [row["number"] for row in part]
            a, b = (values[numbers][:, 1 : mask.shape[1] + 1] for values in (first, second))
            found = outputs(batch.input_ids, batch.attention_mask)
            if role == "actor":
                return policy_loss(found, found.detach() + a, b, mask, total)[0]
            return value_loss(found, a, b, mask, total)

        found = gradients(model, [micro(*pair) for pair in cut(numbered, [row["length"] for row in rows], *setting)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
