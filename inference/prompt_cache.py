"""Keys and values of dialogues that were read lately: a question that begins with one of them is read from there on."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

from models.shared_prompts import shared_length


class PromptCache:
    """States of token sequences, the least recently used ones dropped above ``most`` bytes.

    A key is what the states depend on: a name (the adapter), then the tokens. States: [2 · layers, heads, tokens, dim], as
    inference.cache.RowsCache.states() returns them.
    """

    def __init__(self, most: int) -> None:
        self.most, self.size = most, 0
        self.kept: OrderedDict[tuple, Tensor] = OrderedDict()
        self.order: list[tuple] = []  # sorted: the longest common beginning is that of a neighbour

    def find(self, name: str, tokens: Sequence[int]) -> Tensor | None:
        """Return the states of the longest beginning of these tokens that is known, the last token aside; None without one."""
        key = (name, *tokens)
        place = bisect_left(self.order, key)
        near = self.order[max(0, place - 1) : place + 1]
        length, best = max(((shared_length(one, key), one) for one in near), default=(0, key))
        length = min(length - 1, len(tokens) - 1)  # without the name
        if length < 1:
            return None
        self.kept.move_to_end(best)
        return self.kept[best][:, :, :length]

    def keep(self, name: str, tokens: Sequence[int], states: Callable[[], Tensor]) -> None:
        """Keep the states of a sequence, unless they are known, in the place of its own beginnings and of what was not used for
        longest.
        """
        key = (name, *tokens)
        place = bisect_left(self.order, key)
        if place < len(self.order) and self.order[place][: len(key)] == key:
            self.kept.move_to_end(self.order[place])
            return
        new = states()
        if new.nbytes > self.most:
            return
        while place and self.order[place - 1] == key[: len(self.order[place - 1])]:
            place -= 1
            self._drop(self.order[place])
        insort(self.order, key)
        self.kept[key] = new
        self.size += new.nbytes
        while self.size > self.most:
            self._drop(next(iter(self.kept)))

    def _drop(self, key: tuple) -> None:
        self.size -= self.kept.pop(key).nbytes
        del self.order[bisect_left(self.order, key)]
