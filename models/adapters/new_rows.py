"""The last rows of embedding and output matrix, trained beside LoRA while all others are frozen.

Where a tokenizer has more ids than the embedding has rows, load.fit_embeddings adds rows near the mean of the others. Left
there, a new end token is hardly ever produced: 0 of 12 answers ended (docs/lab-log.md). Here the new rows are a parameter
[new, width] of the two modules, one parameter where these are tied. It takes the place of the frozen rows in what they compute.

peft's trainable_token_indices means the same and opens what lora.save_adapter writes. Its own training is not used: it copies
the whole matrix at every forward pass, and reads weights that ZeRO-3 has split.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.zero3 import gathered

NAME = "new_rows"


def add_new_rows(network: nn.Module, first: int) -> list[str]:
    """Train the rows from ``first`` on of the embedding and of the output matrix, starting as they are.

    Returns the names of the modules that hold them: one where the matrices are tied, or where there is no output matrix.
    """
    embedding, output = network.get_input_embeddings(), network.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    owners = [embedding] if output is None or tied else [embedding, output]
    for layer in owners:
        with gathered([layer.weight]):
            put_new_rows(layer, nn.Parameter(layer.weight.detach()[first:].clone()))
    if tied:
        put_new_rows(output, embedding.new_rows)
    names = {layer: name for name, layer in network.named_modules()}
    return [names[layer] for layer in owners]


def put_new_rows(layer: nn.Module, rows: nn.Parameter) -> None:
    """Let an embedding or an output matrix compute with these rows [new, width] in the place of its last ones."""
    layer.register_parameter(NAME, rows)
    layer.new_rows_count, layer.new_rows_active = len(rows), True  # under ZeRO-3 the parameter itself may be empty
    layer.register_forward_hook(_looked_up if isinstance(layer, nn.Embedding) else _projected)


def _looked_up(layer: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if not layer.new_rows_active:
        return output
    places = inputs[0] - (layer.num_embeddings - layer.new_rows_count)
    return torch.where(places[..., None] < 0, output, F.embedding(places.clamp(min=0), layer.new_rows))


def _projected(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return with_new_logits(output, inputs[0], active_rows(layer), layer.bias)


def active_rows(layer: nn.Module) -> nn.Parameter | None:
    """Return the new rows that an output matrix computes with; None if it has none."""
    return layer.new_rows if getattr(layer, "new_rows_active", False) else None


def with_new_logits(logits: Tensor, hidden: Tensor, rows: Tensor | None, bias: Tensor | None) -> Tensor:
    """[..., vocab], [..., width] -> the logits, the last of them computed with new rows [new, width]."""
    if rows is None:
        return logits
    return torch.cat([logits[..., : -len(rows)], F.linear(hidden, rows, None if bias is None else bias[-len(rows) :])], dim=-1)


@contextmanager
def new_rows_disabled(model: nn.Module) -> Iterator[None]:
    """Let the model compute inside with the frozen rows."""
    layers = [layer for layer in model.modules() if active_rows(layer) is not None]
    for layer in layers:
        layer.new_rows_active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.new_rows_active = True


def with_rows_in_place(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without new rows of their own: they are the last rows of the weights."""
    plain = {name: tensor for name, tensor in state_dict.items() if not name.endswith(f".{NAME}")}
    for name in state_dict.keys() - plain.keys():
        weight, rows = f"{name.removesuffix(NAME)}weight", state_dict[name]
        plain[weight] = torch.cat([plain[weight][: -len(rows)], rows.to(plain[weight])])
    return plain
