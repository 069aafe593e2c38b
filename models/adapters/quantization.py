"""Models with integer weights (chatglm/quantized_linear.py) of any family: made from float weights, and stored as float weights."""

import torch
from torch import Tensor, nn

from errors import UserError
from models.chatglm.quantized_linear import QuantizedLinear, block_linears


def quantize_linears(model: nn.Module, bits: int) -> None:
    """Quantise the linear layers of all blocks in place, one after another: at no time is there a second copy."""
    for parent, name, full_name in list(block_linears(model)):
        try:
            setattr(parent, name, QuantizedLinear.of(getattr(parent, name), bits))
        except ValueError as error:
            raise UserError(f"--quantization_bit {bits}: the layer {full_name} cannot be quantised: {error}.") from error


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantised layers of a model by name; empty for a plain model."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def model_bits(model: nn.Module) -> int:
    """Return 4 or 8 for a model with quantised layers, else 0."""
    return next((layer.bits for layer in quantized_layers(model).values()), 0)


def plain_state_dict(model: nn.Module, state_dict: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state dict (named as in model.state_dict()) with float weights instead of values and scales.

    They are computed in host memory: on a card that holds a quantised model there may be no room for the plain one.
    """
    plain = dict(state_dict)
    for name, layer in quantized_layers(model).items():
        scale = plain.pop(f"{name}.weight_scale")
        plain[f"{name}.weight"] = layer.plain_weight(plain[f"{name}.weight"].cpu(), scale.cpu(), dtype)
    return plain
