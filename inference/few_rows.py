"""Layers and norms of a network that draws answers on a CPU: a few rows at a time, with the same weights hundreds of times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sizes import MOST_PACKED

# One thread, microseconds of F.linear / of it with weights by columns / of oneDNN with weights that it has laid out:
#                 1 row          4 rows         16 rows         64 rows
# 192 x 192       20 20 25       25 18 25       32 25 31        68 60 65
# 512 x 192       54 38 47       74 50 49       98 73 66        185 163 154
# 1,024 x 256     133 67 94      179 142 86     249 200 142     498 473 383
# 256 x 1,024     80 131 99      122 117 89     182 178 136     424 419 363
# 8,192 x 256     1060 395 696   1693 1285 586  2315 1784 1026  5298 4727 2894
# 8 x 192         2 2 14         3 3 14         4 6 15          8 16 17
# oneDNN takes half a millisecond when a number of rows first comes up, so that prompts, of any length, stay with F.linear.
MOST_ROWS = 64
BY_COLUMNS = 2**16  # elements of a weight up to which columns are as quick as oneDNN
TALL = 4  # outputs to one input from which oneDNN gains with one row
WIDE = 2  # inputs to one output above which a small weight, such as those of adapters, stays as it is


@contextmanager
def packed_weights(network: nn.Module) -> Iterator[None]:
    """Let the linear layers of a network compute by few_rows, and its root mean square norms as decoder.normed() does, on a CPU in
    float32. The weights must not change inside, and those of linear layers are in memory twice once a pass has few rows; networks
    of more than MOST_PACKED weights keep them once.
    """
    small = sum(weight.numel() for weight in network.parameters()) <= MOST_PACKED
    layers = [layer for layer in network.modules() if small and type(layer) is nn.Linear and takes_few_rows(layer)]
    norms = [module for module in network.modules() if takes_scaled(module)]
    for layer in layers:
        layer.forward = few_rows(layer)
    for norm in norms:
        width = norm.weight.numel()
        norm.scaled = norm.weight.detach() * width**0.5, torch.tensor((width * norm.variance_epsilon) ** 0.5)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        for norm in norms:
            del norm.scaled


def on_cpu(weight: Tensor) -> bool:
    """Return True for weights in float32 on a CPU, all of them here: ZeRO-3 leaves one element or none."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 1


def takes_scaled(module: nn.Module) -> bool:
    """Return True for a root mean square norm with a weight of its own: what peft wraps around one may change it."""
    own = "variance_epsilon" in vars(module) and "weight" in module._parameters and "scaled" not in vars(module)
    return own and on_cpu(module.weight)


def takes_few_rows(layer: nn.Linear) -> bool:
    """Return True for a layer that gains by it: its weights are whole, in float32 on a CPU, and its forward is its own."""
    weight = layer.weight
    if weight.dim() < 2 or not on_cpu(weight) or "forward" in vars(layer) or not torch.backends.mkldnn.is_available():
        return False
    return weight.numel() > BY_COLUMNS or weight.shape[1] <= WIDE * weight.shape[0]


def few_rows(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return F.linear of a layer, [..., width] -> [..., outputs], in the form that is quickest for the number of rows."""
    weight, bias, (outputs, width), packed = layer.weight, layer.bias, layer.weight.shape, None
    columns = weight.numel() <= BY_COLUMNS
    least = width if columns or outputs >= TALL * width else 2 * width

    def forward(hidden: Tensor) -> Tensor:
        nonlocal packed
        if not least <= hidden.numel() <= MOST_ROWS * width:
            return F.linear(hidden, weight, bias)
        if packed is None:
            data = weight.detach()
            packed = data.t().contiguous().t() if columns else torch.ops.mkldnn._reorder_linear_weight(data, 16)
        if columns:
            return F.linear(hidden, packed, bias)
        return torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")

    return forward
