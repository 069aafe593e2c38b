"""CPU time of a micro-batch with and without what saves it: pairs with their prompt once, no mask, gradient over the logits.

    python -m benchmarks.micro_batches [--rounds 5] [--vocabulary 8192]

Both ways in turn, one thread, float32, an OPT of 4 x 256 with random tokens; medians of CPU time, and the largest difference
of the gradients relative to the largest gradient. Padding of whole epochs is counted, not timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OPTForCausalLM, OPTForSequenceClassification

from benchmarks.runs import opt_config, print_table
from models import heads
from models.heads import TokenLogProbs, TokenScores, at_last_token
from training.utils.data import batching
from training.utils.data.batching import collate_pairs, plan_epoch
from training.utils.loss import bradley_terry_loss

LIMIT = 512


def lengths(rows: int, seed: int = 0) -> list[int]:
    """Draw lengths as chat data has them: lognormal, a median of 130 tokens, cut at 512."""
    return np.random.default_rng(seed).lognormal(np.log(130), 0.7, rows).clip(4, LIMIT).astype(int).tolist()


def pairs(share_of_prompt: float, vocabulary: int, count: int = 8) -> list[dict]:
    """Draw pairs of like lengths whose prompt is this share of the longer answer's row."""
    random = np.random.default_rng(1)
    rows = []
    for length in random.integers(180, 220, count):
        prompt, *answers = (
            random.integers(5, vocabulary, max(2, int(size))).tolist()
            for size in (share_of_prompt * length, *((1 - share_of_prompt) * length * random.uniform(0.6, 1.0, 2)))
        )
        chosen, rejected = (prompt + answer for answer in answers)
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected, "prompt_length": len(prompt), "margin": None})
    return rows


def score_pairs(model: TokenScores, rows: list[dict], share: bool) -> Tensor:
    """Return step 2's loss."""
    batch = collate_pairs(rows, pad_id=1, share=share)
    scores = at_last_token(model(batch.input_ids, batch.attention_mask, batch.shared), batch.attention_mask)
    return bradley_terry_loss(*scores.chunk(2), batch.weight, len(rows))


def compare(model: nn.Module, ways: list[Callable[[], Tensor]], rounds: int) -> tuple[list[float], float]:
    """Time forward and backward of both ways in turn: median CPU seconds, and the relative difference of their gradients."""
    seconds: list[list[float]] = [[] for _ in ways]
    gradients: list[Tensor] = [torch.empty(0)] * len(ways)
    for _ in range(rounds):
        for way, loss in enumerate(ways):
            model.zero_grad()
            start = time.process_time()
            loss().backward()
            seconds[way].append(time.process_time() - start)
            gradients[way] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    difference = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
    return [statistics.median(one) for one in seconds], float(difference)


def autograds_own(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(x)[target] with the gradient that autograd writes."""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)


def measurements(rounds: int, vocabulary: int) -> Iterator[list[str]]:
    """Yield a row for each switch."""
    config = opt_config(256, 4, 4, vocab_size=vocabulary, max_position_embeddings=1024, dropout=0.0, num_labels=1)
    scorer, writer = TokenScores(OPTForSequenceClassification(config)), TokenLogProbs(OPTForCausalLM(config))

    def row(name: str, model: nn.Module, *ways: Callable[[], Tensor]) -> list[str]:
        (before, after), difference = compare(model, list(ways), rounds)
        return [name, f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}", f"{difference:.0e}"]

    for share in (0.3, 0.6):
        rows = pairs(share, vocabulary)
        ways = [lambda way=way, rows=rows: score_pairs(scorer, rows, way) for way in (False, True)]
        yield row(f"8 pairs, prompt {share:.0%} of a row: once", scorer, *ways)
    ids = torch.randint(5, vocabulary, (4, LIMIT), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[2:, -LIMIT // 4 :] = 0

    def log_probs(leading: int) -> Tensor:
        """With a padded column in front the mask is needed, and the loss is of the same tokens."""
        padded = [F.pad(one, (leading, 0)) for one in (ids, mask)]
        return (writer(*padded, keep=LIMIT - 1) * mask[:, 1:]).sum() / mask.sum()

    yield row(f"4 rows of {LIMIT}, padded behind: no mask", writer, lambda: log_probs(1), lambda: log_probs(0))
    hidden = torch.randn(1600, 256, generator=torch.Generator().manual_seed(3))
    head, targets = nn.Linear(256, vocabulary), ids.flatten()[:1600]

    def head_alone(own: bool) -> Tensor:
        with patch.object(heads._TargetLogProbs, "apply", autograds_own if own else heads._TargetLogProbs.apply):
            return -heads.chunk_log_probs(hidden, targets, head.weight, head.bias)[0].mean()

    yield row("head of 1,600 tokens: gradient over the logits", head, lambda: head_alone(True), lambda: head_alone(False))


def padding(rows: int, batch: int, window: int) -> float:
    """Return the share of padding in an epoch whose batches are sorted within windows of so many."""
    sizes = lengths(rows)
    with patch.object(batching, "WINDOW", window):
        batches = plan_epoch(sizes, batch, seed=1, epoch=0)
    return 1 - sum(sizes) / sum(len(one) * max(sizes[place] for place in one) for one in batches)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is measured (5)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens of the vocabulary (8192)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = ["switch", "without, CPU s", "with", "ratio", "difference of gradients"]
    print_table(head, measurements(args.rounds, args.vocabulary))
    print()
    windows = ([f"{window} batches", f"{padding(2400, 16, window):.1%}"] for window in (16, 50, 100))
    print_table(["2,400 rows in batches of 16, sorted within", "padding"], windows)


if __name__ == "__main__":
    main()
