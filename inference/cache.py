"""The key-value cache of a batch of answers: columns to spare, rows that leave, join, or give their place to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from models.sizes import SPARE_COLUMNS


class RowsLayer(DynamicLayer):
    """One layer's keys and values, [batch, heads, columns, dim], at the front of buffers with columns to spare.

    ``keys`` and ``values``, which the network sees, are views of what is used.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Put new columns behind the others; returns all of them."""
        used = self.get_seq_length()
        if not used:
            self.lazy_initialization(key_states, value_states)
            self.stores = [None, None]
        end = used + key_states.shape[-2]
        for number, new in enumerate((key_states, value_states)):
            store = self.stores[number]
            if store is None or end > store.shape[-2]:
                store = new.new_empty(*new.shape[:2], end + SPARE_COLUMNS, new.shape[3])
                if used:
                    store[:, :, :used] = self.stores[number][:, :, :used]
                self.stores[number] = store
            store[:, :, used:end] = new
        self._show(end)
        return self.keys, self.values

    def rebuild(self, rows: Tensor, front: int, drop: int) -> None:
        """Keep only these rows (they may repeat), without ``drop`` columns behind the first ``front``."""
        end = self.get_seq_length()
        for number, store in enumerate(self.stores):
            new = store.new_empty(len(rows), *store.shape[1:])
            new[:, :, :front] = store[rows, :, :front]
            torch.index_select(store[:, :, front + drop : end], 0, rows, out=new[:, :, front : end - drop])
            self.stores[number] = new
        self._show(end - drop)

    def replace(self, rows: Tensor, other: RowsLayer, front: int) -> None:
        """Put other's rows in the place of these: its first ``front`` columns in front, the rest at the right end."""
        end = self.get_seq_length()
        begin = end - (other.get_seq_length() - front)
        for mine, new in zip(self.stores, (other.keys, other.values), strict=True):
            mine[rows, :, front:begin] = 0.0  # never seen, but an infinity left there would be felt
            mine[rows, :, begin:end] = new[:, :, front:]
            mine[rows, :, :front] = new[:, :, :front]

    def join(self, other: RowsLayer, front: int) -> None:
        """Put other's rows below these, both with their first ``front`` columns in front and the rest at the right end."""
        ends = self.get_seq_length(), other.get_seq_length()
        end, rows = max(ends), len(self.keys)
        for number, (mine, new) in enumerate(((self.keys, other.keys), (self.values, other.values))):
            store = mine.new_zeros(rows + len(new), mine.shape[1], end + SPARE_COLUMNS, mine.shape[3])
            for part, old in ((store[:rows], mine), (store[rows:], new)):
                part[:, :, :front] = old[:, :, :front]
                part[:, :, end - old.shape[2] + front : end] = old[:, :, front:]
            self.stores[number] = store
        self._show(end)

    def fill(self, states: Sequence[Tensor | None], number: int, columns: int, like: Tensor) -> None:
        """Begin with ``columns`` columns whose right end holds states [2 · layers, heads, n, dim] of each row; None: nothing."""
        self.lazy_initialization(like, like)
        self.stores = []
        for part in (2 * number, 2 * number + 1):
            store = like.new_zeros(len(states), like.shape[1], columns + SPARE_COLUMNS, like.shape[3])
            for row, one in enumerate(states):
                if one is not None:
                    store[row, :, columns - one.shape[2] : columns] = one[part]
            self.stores.append(store)
        self._show(columns)

    def _show(self, end: int) -> None:
        self.keys, self.values = (store[:, :, :end] for store in self.stores)


class RowsCache(Cache):
    """RowsLayers. All rows end in the same column; the first ``front`` columns hold a prefix, the same in every row."""

    def __init__(self, front: int = 0) -> None:
        super().__init__(layer_class_to_replicate=RowsLayer)
        self.front = front

    def rebuild(self, rows: Tensor, drop: int = 0) -> None:
        """Keep only these rows (they may repeat), without their first ``drop`` columns behind the prefix."""
        for layer in self.layers:
            layer.rebuild(rows, self.front, drop)

    def replace(self, rows: Tensor, other: RowsCache) -> None:
        """Put the rows of other, which is not wider, in the place of these rows. What stands left of them is not cleared
        for the eye: the attention mask must hide it.
        """
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.replace(rows, new, self.front)

    def states(self, row: int, length: int) -> Tensor:
        """Return a copy of a row's last ``length`` keys and values, [2 · layers, heads, length, dim]."""
        return torch.stack([part[row, :, -length:] for layer in self.layers for part in (layer.keys, layer.values)])

    def fill(self, states: Sequence[Tensor | None], columns: int) -> None:
        """Begin an empty cache of ``columns`` columns with states() of other caches, at the right end of a row; None: nothing."""
        known = next(one for one in states if one is not None)
        for number in range(len(known) // 2):
            self.layers.append(self.layer_class_to_replicate())
            self.layers[number].fill(states, number, columns, known)

    def join(self, other: RowsCache) -> None:
        """Put the rows of other below these; the attention mask must hide what stands left of the narrower ones."""
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.join(new, self.front)


def rows_cache(network: nn.Module, prefix: Cache | None, prefix_length: int) -> Cache | None:
    """Return an empty RowsCache for a network, or one with the prefix in it that peft holds.

    A network with sliding windows, or other layers that keep more or less than keys and values, gets what transformers would
    use: the prefix, or None, and the network makes its own.
    """
    if not isinstance(network, PreTrainedModel):
        return prefix
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=network.config).layers):
        return prefix
    own = network.config.pre_seq_len if hasattr(network.base_model, "prefix_encoder") else 0  # ChatGLM's
    cache = RowsCache(prefix_length + own)
    for number, layer in enumerate(prefix.layers if prefix is not None else []):
        cache.update(layer.keys, layer.values, number)
    return cache
