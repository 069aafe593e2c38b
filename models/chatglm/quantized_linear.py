"""Linear layers with 8-bit or 4-bit weights: the scheme of the int8 and int4 releases of ChatGLM, in plain torch.

A quantised layer is frozen: it is the base under LoRA or P-Tuning, or it answers. A row (output) has one scale:

    scale = max|row| / (2^(bits-1) - 1), float16     value = round(w / scale)     w is about value · scale

Eight bits are one int8 a weight; four bits are two weights a byte, the even input column in the high half, the odd one
in the low half, each in two's complement. Nothing here depends on a device: integers become floats again layer by layer,
in the forward pass and once more in the backward pass, so that no float copy of the model exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

BITS = (4, 8)


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> values int8 [out, in] (8 bits) or [out, in / 2] (4 bits), scale float16 [out].

    Values are rounded to the scale as it is stored, so |w - value · scale| <= scale / 2, but for the largest of a row,
    which the rounding of its scale to float16 may add to. A row of zeros gets scale 0. Computed in float32.
    Raises ValueError for bits other than 4 and 8, weights that are not finite, an odd number of inputs with 4 bits.
    """
    largest = largest_value(bits)
    if bits == 4 and weight.shape[-1] % 2:
        raise ValueError(f"4 bits need an even number of inputs to a layer; this one has {weight.shape[-1]}")
    weight = weight.detach().float()
    peak = weight.abs().amax(dim=-1)
    scale = (peak / largest).half()
    if not scale.isfinite().all():
        raise ValueError("weights that are not finite, or beyond float16, cannot be quantised")
    # Below 6e-8, float16's smallest number, a scale would be stored as 0 and the row would be lost.
    scale = torch.where((scale == 0) & (peak > 0), torch.finfo(torch.float16).smallest_normal / 1024, scale)
    divisor = torch.where(scale == 0, 1.0, scale.float())
    # The clamp: scales below 6e-5 have few digits left in float16, and the largest value could leave its range.
    values = (weight / divisor[:, None]).round_().clamp_(-largest, largest).to(torch.int8)
    if bits == 4:
        values = (values[:, 0::2] << 4) | (values[:, 1::2] & 15)
    return values, scale


def dequantize(values: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """values int8 [out, in] or [out, in / 2], scale [out] -> value · scale [out, in], rounded once, to dtype."""
    largest_value(bits)
    if bits == 4:
        # a shift to the right keeps the sign
        values = torch.stack((values >> 4, (values << 4) >> 4), dim=-1).flatten(-2)
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    return torch.mul(values, scale[:, None].float(), out=weight)  # multiplied in float32, where the product is exact


def largest_value(bits: int) -> int:
    """2^(bits-1) - 1; ValueError unless bits is 4 or 8."""
    if bits not in BITS:
        raise ValueError(f"{bits} bits: there are 4 and 8")
    return 2 ** (bits - 1) - 1


class _QuantizedProduct(torch.autograd.Function):
    """x W^T + b for a frozen integer W: keeps the integers for the backward pass, not the floats."""

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x."""
        ctx.save_for_backward(values, scale)
        ctx.bits = bits
        return F.linear(x, dequantize(values, scale, bits, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x is gradient · W; the weights have none."""
        values, scale = ctx.saved_tensors
        of_x = gradient @ dequantize(values, scale, ctx.bits, gradient.dtype) if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[3] else None
        return of_x, None, None, of_bias, None


class QuantizedLinear(nn.Linear):
    """A linear layer with integer weights; a Linear by class, so that peft puts LoRA on it.

    ``weight`` (int8) and ``weight_scale`` (float16) are buffers under the names of the official checkpoints: no
    optimizer sees them, ZeRO-3 leaves them whole on every process, and casting the model leaves both as they are.
    ``bias`` is a frozen parameter. transposed: made from a Conv1D, whose checkpoints store weights as [in, out].
    """

    transposed = False

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = True, device=None, dtype=None) -> None:
        """Make an empty layer: values and scales are 0 until a checkpoint or ``of`` fills them."""
        nn.Module.__init__(self)  # Linear's own would make the float weight first
        largest_value(bits)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        columns = in_features // 2 if bits == 4 else in_features
        self.register_buffer("weight", torch.zeros(out_features, columns, dtype=torch.int8, device=device))
        # inside deepspeed.zero.Init new floats get the training dtype; integers looked at as float16 do not
        scale = torch.zeros(out_features, dtype=torch.int16, device=device).view(torch.float16)
        self.register_buffer("weight_scale", scale)
        empty = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Linear | Conv1D, bits: int) -> QuantizedLinear:
        """Return a quantised layer in place of a float one on the same device, with its bias."""
        transposed = isinstance(layer, Conv1D)
        weight = layer.weight.detach().T if transposed else layer.weight.detach()
        with torch.device("meta"):
            quantized = cls(weight.shape[1], weight.shape[0], bits, bias=False)
        quantized.weight, quantized.weight_scale = quantize(weight, bits)
        quantized.bias, quantized.transposed = layer.bias, transposed
        if quantized.bias is not None:
            quantized.bias.requires_grad_(False)
        return quantized.train(layer.training)

    def reset_parameters(self) -> None:
        """Draw nothing: integers come from a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x."""
        return _QuantizedProduct.apply(x, self.weight, self.weight_scale, self.bias, self.bits)

    def plain_weight(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the float weight as a plain checkpoint stores it, from a state dict's values and scale."""
        weight = dequantize(values, scale, self.bits, dtype)
        return weight.T if self.transposed else weight

    def _apply(self, fn, recurse: bool = True):
        """As of any module, but ``.half()``, ``.bfloat16()``, ``.float()`` leave the scale as it is: bf16 would round it."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


# --- whole models -----------------------------------------------------------------------------------------------------


def block_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, attribute, full name) of each linear layer in the blocks of a network: what the releases quantise.

    A block is an entry of a ModuleList; embeddings, output matrix, scalar head and prefix encoder are in none.
    """
    blocks = (name for name, layer in model.named_modules() if isinstance(layer, nn.ModuleList))
    lists = tuple(f"{name}." if name else "" for name in blocks)
    for parent_name, parent in model.named_modules():
        for name, layer in parent.named_children():
            full_name = f"{parent_name}.{name}" if parent_name else name
            linear = isinstance(layer, (nn.Linear, Conv1D)) and not isinstance(layer, QuantizedLinear)
            if linear and full_name.startswith(lists):
                yield parent, name, full_name


def replace_with_quantized(module: nn.Module, bits: int) -> None:
    """Put empty quantised layers in the place of the linear layers of all blocks, for a checkpoint that holds integers.

    On the meta device too, where from_pretrained builds networks.
    """
    for parent, name, _ in list(block_linears(module)):
        layer = getattr(parent, name)
        bias = layer.bias is not None
        like = layer.bias if bias else layer.weight
        empty = QuantizedLinear(layer.in_features, layer.out_features, bits, bias, device=like.device, dtype=like.dtype)
        setattr(parent, name, empty)
