"""Linear layers of a network that draws answers on a CPU: a few rows at a time, with the same weights hundreds of times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Up to so many rows oneDNN multiplies, with weights that it has laid out once. Each number of rows costs it half a millisecond
# when it first comes up, so that prompts, of any length, are not among them. 8,192 x 256, one thread, F.linear and this form:
# 4 rows 0.9 and 0.3 ms, 16 rows 1.7 and 0.8, 64 rows 4.8 and 2.8; 4,096 x 1,024: 16 rows 3.1 and 1.6. One row gains nothing.
MOST_ROWS = 64


@contextmanager
def packed_weights(network: nn.Module) -> Iterator[None]:
    """Let the linear layers of a network compute by FewRows, on a CPU in float32. The weights must not change inside, and are in
    memory twice once a pass has few rows.
    """
    layers = [layer for layer in network.modules() if type(layer) is nn.Linear and takes_few_rows(layer)]
    for layer in layers:
        layer.forward = FewRows(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def takes_few_rows(layer: nn.Linear) -> bool:
    """Return True for a layer whose weights are whole, in float32 on a CPU, and whose forward is its own."""
    weight = layer.weight
    whole = weight.dim() == 2 and weight.device.type == "cpu" and weight.dtype == torch.float32  # ZeRO-3 leaves one dimension
    return whole and "forward" not in vars(layer) and torch.backends.mkldnn.is_available()


class FewRows:
    """F.linear of a layer for hidden states [..., width]."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.packed = layer, None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., outputs]."""
        weight, bias = self.layer.weight, self.layer.bias
        if not 1 < hidden.shape[:-1].numel() <= MOST_ROWS:
            return F.linear(hidden, weight, bias)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, bias, "none", [], "")
