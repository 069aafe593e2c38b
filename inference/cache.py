"""The key-value cache of a batch of answers: columns to spare, rows that leave, join, or give their place to another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from models.sizes import SPARE_COLUMNS

# Up to so many columns and elements, one layer's keys or values stand column by column where attend_once() reads them
# (decoder.py): a column to spare is then no gap between the heads. Further on the stride of a head costs more than gaps.
MOST_COLUMNS, MOST_ELEMENTS = 192, 2**21


class RowsLayer(DynamicLayer):
    """One layer's keys and values, [batch, heads, columns, dim], in buffers with columns to spare.

    ``keys`` and ``values``, which the network sees, are views of what is used: the columns from ``begin`` on.
    by_columns: in memory as [columns, batch, heads, dim], while they are few.
    """

    def __init__(self, by_columns: bool = False) -> None:
        super().__init__()
        self.by_columns = by_columns

    def store(self, like: Tensor, *shape: int) -> Tensor:
        """Return an empty buffer [..., batch, heads, columns, dim] for such keys or values."""
        *outer, rows, heads, columns, dim = shape
        few = columns <= MOST_COLUMNS and rows * heads * columns * dim <= MOST_ELEMENTS
        if self.by_columns and few and like.device.type == "cpu" and like.dtype == torch.float32:
            return like.new_empty(*outer, columns, rows, heads, dim).movedim(-4, -2)
        return like.new_empty(shape)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Put new columns behind the others; returns all of them."""
        used = self.get_seq_length()
        if not used:
            self.lazy_initialization(key_states, value_states)
            self.begin, self.stores = 0, []
        width = used + key_states.shape[-2]
        if not self.stores or self.begin + width > self.stores[0].shape[-2]:
            states = key_states, value_states
            self.stores = [self.store(new, *new.shape[:2], width + SPARE_COLUMNS, new.shape[3]) for new in states]
            if used:
                self.stores[0][:, :, :used], self.stores[1][:, :, :used] = self.keys, self.values
            self.begin = 0
        end = self.begin + width
        for store, new in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, self.begin + used : end] = new
        self._show(width)
        return self.keys, self.values

    def rebuild(self, rows: Tensor, front: int, drop: int) -> None:
        """Keep only these rows (they may repeat), without ``drop`` columns behind the first ``front``."""
        end = self.get_seq_length()
        for number, old in enumerate((self.keys, self.values)):
            new = self.store(old, len(rows), old.shape[1], self.stores[number].shape[2], old.shape[3])
            new[:, :, :front] = old[rows, :, :front]
            torch.index_select(old[:, :, front + drop :], 0, rows, out=new[:, :, front : end - drop])
            self.stores[number] = new
        self.begin = 0
        self._show(end - drop)

    def trim(self, drop: int) -> None:
        """Forget the first ``drop`` columns; nothing is copied."""
        self.begin += drop
        self._show(self.get_seq_length() - drop)

    def replace(self, rows: Tensor | slice, other: RowsLayer, front: int) -> None:
        """Put other's rows in the place of these: its first ``front`` columns in front, the rest at the right end."""
        end = self.get_seq_length()
        begin = end - (other.get_seq_length() - front)
        for mine, new in ((self.keys, other.keys), (self.values, other.values)):
            mine[rows, :, front:begin] = 0.0  # masked, but an infinity left there would make NaN
            mine[rows, :, begin:end] = new[:, :, front:]
            if front:
                mine[rows, :, :front] = new[:, :, :front]

    def join(self, other: RowsLayer, front: int) -> None:
        """Put other's rows below these, both with their first ``front`` columns in front and the rest at the right end."""
        ends = self.get_seq_length(), other.get_seq_length()
        end, rows = max(ends), len(self.keys)
        for number, (mine, new) in enumerate(((self.keys, other.keys), (self.values, other.values))):
            store = self.store(mine, rows + len(new), mine.shape[1], end + SPARE_COLUMNS, mine.shape[3])
            for part, old in ((store[:rows], mine), (store[rows:], new)):
                begin = end - old.shape[2] + front
                part[:, :, :front] = old[:, :, :front]
                part[:, :, front:begin] = 0.0
                part[:, :, begin:end] = old[:, :, front:]
            self.stores[number] = store
        self.begin = 0
        self._show(end)

    def fill(self, stores: Sequence[Tensor], columns: int) -> None:
        """Begin with ``columns`` columns that stand in two buffers."""
        self.lazy_initialization(*stores)
        self.begin, self.stores = 0, list(stores)
        self._show(columns)

    def _show(self, width: int) -> None:
        self.keys, self.values = (store[:, :, self.begin : self.begin + width] for store in self.stores)


class RowsCache(Cache):
    """RowsLayers. All rows end in the same column; the first ``front`` columns hold a prefix, the same in every row."""

    def __init__(self, front: int = 0, by_columns: bool = False) -> None:
        super().__init__(layer_class_to_replicate=partial(RowsLayer, by_columns))
        self.front = front

    def rebuild(self, rows: Tensor, drop: int = 0) -> None:
        """Keep only these rows (they may repeat), without their first ``drop`` columns behind the prefix."""
        for layer in self.layers:
            layer.rebuild(rows, self.front, drop)

    def trim(self, drop: int) -> None:
        """Forget the first ``drop`` columns, where no prefix stands before them."""
        for layer in self.layers:
            layer.trim(drop)

    def replace(self, rows: Tensor | slice, other: RowsCache) -> None:
        """Put the rows of other, which is not wider, in the place of these rows; the attention mask must hide what stands left."""
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.replace(rows, new, self.front)

    def states(self, row: int, length: int) -> Tensor:
        """Return a copy of a row's last ``length`` keys and values, [2 · layers, heads, length, dim]."""
        return torch.stack([part[row, :, -length:] for layer in self.layers for part in (layer.keys, layer.values)])

    def fill(self, states: Sequence[Tensor | None], columns: int, room: int) -> None:
        """Begin an empty cache of ``columns`` columns, and ``room`` for more, with states() of other caches at the right end of its
        rows; None: nothing.
        """
        known = next(one for one in states if one is not None)
        parts, heads, _, dim = known.shape
        self.layers = [self.layer_class_to_replicate() for _ in range(parts // 2)]
        stores = self.layers[0].store(known, parts, len(states), heads, columns + room + SPARE_COLUMNS, dim)
        for row, one in enumerate(states):  # one copy a row, not one a layer, too
            begin = columns - (0 if one is None else one.shape[2])
            stores[:, row, :, :begin] = 0.0
            if one is not None:
                stores[:, row, :, begin:columns] = one
        for layer, pair in zip(self.layers, stores.unflatten(0, (-1, 2)), strict=True):
            layer.fill(tuple(pair), columns)

    def join(self, other: RowsCache) -> None:
        """Put the rows of other below these; the attention mask must hide what stands left of the narrower ones."""
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.join(new, self.front)


_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def rows_cache(network: nn.Module, prefix: Cache | None, prefix_length: int, by_columns: bool = False) -> Cache | None:
    """Return an empty RowsCache for a network, or one with the prefix in it that peft holds. by_columns: attend_once() reads it.

    A network with sliding windows, or other layers that keep more or less than keys and values, gets what transformers would
    use: the prefix, or None, and the network makes its own.
    """
    if not isinstance(network, PreTrainedModel):
        return prefix
    if network not in _plain:  # transformers takes a tenth of a millisecond for the answer
        _plain[network] = all(type(layer) is DynamicLayer for layer in DynamicCache(config=network.config).layers)
    if not _plain[network]:
        return prefix
    own = network.config.pre_seq_len if hasattr(network.base_model, "prefix_encoder") else 0  # ChatGLM's
    cache = RowsCache(prefix_length + own, by_columns)
    for number, layer in enumerate(prefix.layers if prefix is not None else []):
        cache.update(layer.keys, layer.values, number)
    return cache
