"""The last layer's MLP at the places whose states somebody reads: no other state depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# By model type: the first and the last module of an MLP, from a layer. They take one tensor [..., width].
MLP = {"opt": ("fc1", "fc2")} | dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "glm", "glm4"), ("mlp", "mlp")
)
MOST_READ = 0.9  # above this share of the places, picking them costs what it saves


@contextmanager
def last_layer_at(decoder: nn.Module, read: Tensor | None) -> Iterator[None]:
    """Let the last layer of a decoder compute its MLP only where ``read`` is true, a bool a token in the order in which the decoder
    has them; other states are without it. No effect on networks that are not in MLP, and where activations are recomputed.
    """
    names = MLP.get(decoder.config.model_type)
    if read is None or names is None or not 0 < int(read.sum()) <= MOST_READ * read.numel():
        yield
        return
    stack = getattr(decoder, "decoder", decoder)
    layer = (stack.h if hasattr(stack, "h") else stack.layers)[-1]
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        yield
        return
    places = read.flatten().nonzero().squeeze(1)
    shape = torch.Size()

    def pick(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal shape
        shape = given[0].shape[:-1]
        return (given[0].flatten(0, -2).index_select(0, places),)

    def put_back(module: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
        everywhere = output.new_zeros(shape.numel(), output.shape[-1])
        return everywhere.index_copy(0, places, output).unflatten(0, shape)

    first, last = (layer.get_submodule(name) for name in names)
    hooks = first.register_forward_pre_hook(pick), last.register_forward_hook(put_back)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
