"""The cache of what was read: the longest known beginning, whatever was kept and dropped before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.prompt_cache import PromptCache

pytestmark = pytest.mark.fast

SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)


def states(tokens: tuple[int, ...]) -> torch.Tensor:
    """States [2, 1, tokens, 1] that tell their tokens."""
    return torch.tensor(tokens, dtype=torch.float32).view(1, 1, -1, 1).expand(2, 1, -1, 1).clone()


@settings(deadline=None, max_examples=200)
@given(kept=st.lists(SEQUENCES, max_size=12), asked=SEQUENCES)
def test_the_longest_known_beginning(kept, asked):
    cache = PromptCache(2**20)
    for tokens in kept:
        cache.keep("", tokens, lambda tokens=tokens: states(tokens))
    found = cache.find("", asked)
    shared = [next((n for n in range(len(asked) - 1, 0, -1) if tokens[:n] == asked[:n]), 0) for tokens in kept]
    length = max(shared, default=0)
    assert (0 if found is None else found.shape[2]) == length
    if length:
        assert tuple(found[0, 0, :, 0].tolist()) == asked[:length]
    assert cache.find("another adapter", asked) is None


@settings(deadline=None, max_examples=200)
@given(kept=st.lists(SEQUENCES, max_size=30), most=st.integers(0, 200))
def test_no_more_bytes_than_allowed(kept, most):
    cache = PromptCache(most)
    for tokens in kept:
        cache.keep("", tokens, lambda tokens=tokens: states(tokens))
        assert cache.size == sum(one.nbytes for one in cache.kept.values()) <= most
        assert cache.order == sorted(cache.kept)


def test_what_was_used_last_stays():
    cache = PromptCache(3 * states((1, 2)).nbytes)
    for tokens in ((1, 2), (3, 4), (5, 6)):
        cache.keep("", tokens, lambda tokens=tokens: states(tokens))
    assert cache.find("", (1, 2, 3)) is not None
    cache.keep("", (7, 8), lambda: states((7, 8)))
    assert cache.find("", (3, 4, 5)) is None and cache.find("", (1, 2, 3)) is not None
