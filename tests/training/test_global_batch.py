"""The gradient of a global batch does not depend on how it is cut into micro-batches and processes.

Processes are played one after the other in this one; the two-process runs of test_steps.py repeat it with DeepSpeed. The
reference is each example alone, without padding or masks, token by token.
"""

import pytest
import torch

from models.heads import TokenLogProbs, TokenScores, at_last_token
from models.load import load_causal_lm, load_scalar_model
from training.step2_dpo.reference import answer_log_probs
from training.step3_ppo.objectives import policy_loss, value_loss
from training.utils.data.batching import collate_answer_pairs, collate_pairs, collate_sft, plan_micro_batches
from training.utils.loss import bradley_terry_loss, dpo_loss, implicit_rewards, sft_loss

# processes, examples a micro-batch, tokens a micro-batch
CUTS = [(1, 7, None), (1, 1, None), (1, 3, None), (2, 2, None), (3, 1, None), (5, 4, None), (1, None, 60), (2, None, 45)]
PAD, BETA = 2, 0.5


@pytest.fixture(scope="module")
def rows():
    """Seven examples of ragged lengths, numbered."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    found = []
    for number in range(7):
        prompt, chosen, rejected = ([draw(4, 300) for _ in range(draw(*sizes))] for sizes in ((2, 9), (1, 12), (1, 12)))
        pair = {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "margin": None, "number": number}
        length = len(prompt) + len(chosen)
        found.append(pair | {"input_ids": prompt + chosen, "prompt_length": len(prompt), "length": length})
    return found


def gradients(model, losses) -> torch.Tensor:
    """Add up the gradients of the losses as DeepSpeed would; one flat vector."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def assert_any_cut_is_the_whole(model, rows, alone, micro, pairs: bool = False) -> None:
    """alone: row -> its share of the loss; micro: rows and which of them are real -> the loss of a micro-batch."""
    expected = gradients(model, map(alone, rows))
    assert expected.abs().max() > 1e-3
    lengths = [row["length"] for row in rows]
    if pairs:
        lengths = [2 * max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    for processes, examples, tokens in CUTS:
        plan = plan_micro_batches(lengths, processes, examples, tokens and tokens * (1 + pairs))
        cut = [positions for rank in plan for positions in rank]
        losses = (micro([rows[max(one, 0)] for one in positions], [one >= 0 for one in positions]) for positions in cut)
        torch.testing.assert_close(gradients(model, losses), expected, atol=1e-5, rtol=1e-4)


def token_log_probs(model, ids: list[int], start: int) -> list[torch.Tensor]:
    """log p of each token from start on, of one text alone, from the model's own logits."""
    table = model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0]
    return [table[t - 1, ids[t]] for t in range(start, len(ids))]


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_sft_gradient(llama, rows, loss_on):
    model = TokenLogProbs(load_causal_lm(llama, dtype=torch.float32))
    starts = [row["prompt_length"] if loss_on == "answer" else 1 for row in rows]
    total = sum(row["length"] - start for row, start in zip(rows, starts, strict=True))

    def alone(row):
        return -sum(token_log_probs(model.model, row["input_ids"], starts[row["number"]])) / total

    def micro(part, real):
        batch = collate_sft(part, real, pad_id=PAD, loss_on=loss_on)
        mask = batch.loss_mask[:, 1:]
        return sft_loss(model(batch.input_ids, batch.attention_mask, target_mask=mask), mask, total)

    assert_any_cut_is_the_whole(model, rows, alone, micro)


def test_reward_gradient(llama, rows):
    model = TokenScores(load_scalar_model(llama, dtype=torch.float32, seed=1))

    def alone(row):
        scores = [model.model(input_ids=torch.tensor([row[name]])).logits[0, 0] for name in ("chosen_ids", "rejected_ids")]
        return -(scores[0] - scores[1]).sigmoid().log() / len(rows)

    def micro(part, real):
        batch = collate_pairs(part, real, pad_id=PAD)
        chosen, rejected = at_last_token(model(batch.input_ids, batch.attention_mask), batch.attention_mask).chunk(2)
        return bradley_terry_loss(chosen, rejected, batch.weight, len(rows), margin=batch.margin)

    assert_any_cut_is_the_whole(model, rows, alone, micro, pairs=True)


def test_dpo_gradient(folder_of, llama, rows):
    model = TokenLogProbs(load_causal_lm(llama, dtype=torch.float32))
    other = TokenLogProbs(load_causal_lm(folder_of("llama", 5), dtype=torch.float32))

    def alone(row):
        sums = []
        for name in ("chosen_ids", "rejected_ids"):
            ours, theirs = (sum(token_log_probs(one.model, row[name], row["prompt_length"])) for one in (model, other))
            sums.append(BETA * (ours - theirs.detach()))
        return -(sums[0] - sums[1]).sigmoid().log() / len(rows)

    def micro(part, real):
        batch = collate_answer_pairs(part, real, pad_id=PAD)
        rewards = implicit_rewards(answer_log_probs(model, batch), answer_log_probs(other, batch).detach(), BETA)
        return dpo_loss(*rewards.chunk(2), batch.weight, len(rows))

    assert_any_cut_is_the_whole(model, rows, alone, micro, pairs=True)


@pytest.mark.detail(33)
@pytest.mark.ppo
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_ppo_gradient(llama, rows, role):
    """One denominator for the global minibatch."""
    if role == "actor":
        model = TokenLogProbs(load_causal_lm(llama, dtype=torch.float32))
    else:
        model = TokenScores(load_scalar_model(llama, dtype=torch.float32, seed=1))
    first, second = torch.randn(2, len(rows), 20, generator=torch.Generator().manual_seed(1)) * 0.3
    total = sum(row["length"] - row["prompt_length"] for row in rows)

    def outputs(ids, mask):
        """What is trained, at the columns that predict tokens 1 and later: log-probabilities, or values."""
        return model(ids, mask) if role == "actor" else model(ids, mask)[:, :-1]

    def alone(row):
        ids = torch.tensor([row["input_ids"]])
        found = outputs(ids, torch.ones_like(ids))[0]
        loss = 0.0
        for t in range(row["prompt_length"], row["length"]):
            a, b = first[row["number"], t], second[row["number"], t]
            if role == "actor":
                ratio = (found[t - 1] - (found[t - 1].detach() + a)).exp()
                loss = loss + torch.maximum(-b * ratio, -b * ratio.clamp(0.8, 1.2))
            else:
                clipped = a + (found[t - 1] - a).clamp(-0.2, 0.2)
                loss = loss + 0.5 * torch.maximum((found[t - 1] - b) ** 2, (clipped - b) ** 2)
        return loss / total

    def micro(part, real):
        batch = collate_sft(part, real, pad_id=PAD, loss_on="answer")
        mask, numbers = batch.loss_mask[:, 1:], [row["number"] for row in part]
        a, b = (values[numbers][:, 1 : mask.shape[1] + 1] for values in (first, second))
        found = outputs(batch.input_ids, batch.attention_mask)
        if role == "actor":
            return policy_loss(found, found.detach() + a, b, mask, total)[0]
        return value_loss(found, a, b, mask, total)

    assert_any_cut_is_the_whole(model, rows, alone, micro)
