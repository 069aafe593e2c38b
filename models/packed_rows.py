"""Rows without their padding: everything but attention computes on real tokens alone, one row after another.

    attention_mask [ 1  1  1  0 ]        input_ids  [ a  b  c  d  e  f  g ]
                   [ 1  1  0  0 ]   ->   positions  [ 0  1  2  0  1  0  1 ]
                   [ 1  1  0  0 ]

Attention puts its queries, keys and values back into rows. Products, norms and activations are the larger part by far.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# Pack where real tokens are less than this share of the places. Putting them back costs attention about a tenth of itself.
MOST_REAL = 0.9


@dataclass(frozen=True)
class PackedRows:
    """Where the real tokens of rows stand. A network's forward hands it to the attention of every layer."""

    shape: torch.Size  # [batch, time] of the rows
    places: Tensor  # [tokens] int64 into [batch x time], in order

    @property
    def no_mask(self) -> Tensor:
        """Return a mask that is not read. Without one, transformers would make [tokens, tokens] to part the rows."""
        return self.places.new_zeros(1, 1, 1, 1, dtype=torch.bool)

    def pack(self, rows: Tensor) -> Tensor:
        """Pack [batch, time, ...] into [1, tokens, ...]."""
        return rows.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """Unpack [1, tokens, ...] into [batch, time, ...], 0 where padding is."""
        inner = packed.shape[2:]
        return packed.new_zeros(self.shape.numel(), *inner).index_copy(0, self.places, packed[0]).view(*self.shape, *inner)


def packed_rows(network: nn.Module, attention_mask: Tensor) -> PackedRows | None:
    """Return how to pack rows with this mask [batch, time]; None where it does not pay, or the network cannot.

    A network can whose attention is transformers' interface with torch's kernels, over all earlier places.
    """
    config = network.config
    can = getattr(network, "_supports_attention_backend", False) and config._attn_implementation == "sdpa"
    if not can or getattr(config, "sliding_window", None) is not None:
        return None
    if attention_mask.sum() >= MOST_REAL * attention_mask.numel():
        return None
    teach_attention()
    return PackedRows(attention_mask.shape, attention_mask.flatten().nonzero().squeeze(1))


@cache
def teach_attention() -> None:
    """Let transformers' attention take ``packed``: PackedRows among the arguments of a forward."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module, query, key, value, attention_mask, *, packed: PackedRows | None = None, **settings: Any):
        if packed is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        query, key, value = (packed.unpack(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value))
        output, _ = sdpa_attention_forward(module, query, key, value, None, **settings)  # padding is behind: causal hides it
        return packed.pack(output), None

    AttentionInterface.register("sdpa", attention)
