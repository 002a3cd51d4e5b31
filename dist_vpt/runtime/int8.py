"""Frozen weights of linear layers in 8 bits, quantized by torchao and applied to a backbone from outside.

B images, N tokens, D inputs and O outputs of a linear layer.

A layer holds its weight as int8 levels with a float32 scale a row: half the size of bf16. Forward and backward each
dequantize it while the layer is computed; nothing dequantized is kept for backward.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vpt.backbones.blocks import bias_of, unpack_block
from dist_vpt.backbones.products import Linear
from dist_vpt.errors import UserError

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone

KEY = "runtime.quantize = int8"
EPSILON = torch.finfo(torch.float32).eps  # the least scale, of a row of zeros


def apply_int8(backbone: "Backbone") -> None:
    """Hold the weights of the blocks' linear layers in int8. After the method has been attached.

    Raises UserError without torchao, and for blocks that use such a weight other than by calling its layer.
    """
    from dist_vpt.backbones.swin import SwinBackbone

    if not isinstance(backbone, SwinBackbone):
        for number, block in enumerate(backbone.blocks):
            try:
                unpack_block(block, number)
            except UserError as error:
                raise UserError(
                    f"{KEY}: only for timm's pre-norm ViT, EVA and Swin blocks; set runtime.quantize=none ({error})"
                ) from error
    for module in backbone.blocks.modules():
        if isinstance(module, Linear):
            _hold_in_int8(module)
    backbone.chosen["frozen weights"] = "int8"


def _hold_in_int8(linear: nn.Linear) -> None:
    levels_OD, scale_O1 = quantize_rows(linear.weight.detach())
    linear.weight = nn.Parameter(levels_OD, requires_grad=False)
    linear.register_buffer("scale_O1", scale_O1, persistent=False)
    linear.forward = partial(_forward, linear)  # type: ignore[method-assign]


def quantize_rows(weight_OD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 levels [O, D] and float32 scales [O, 1], whose product is about the weight."""
    quantize, row = require_torchao(), (1, weight_OD.shape[1])
    scale_O1, zero_O1 = quantize.choose_qparams_affine(
        weight_OD, quantize.MappingType.SYMMETRIC, row, torch.int8, -127, 127, EPSILON,
        scale_dtype=torch.float32, zero_point_dtype=torch.int8, keepdim=True,
    )  # fmt: skip
    return quantize.quantize_affine(weight_OD, row, scale_O1, zero_O1, torch.int8, -127, 127), scale_O1


def require_torchao(wanted: str = KEY, instead: str = "set runtime.quantize=none") -> Any:
    """What quantizes. Raises UserError where it is not installed, about the setting or option that ``wanted`` it."""
    try:
        from torchao.quantization import quant_primitives
    except ImportError as error:
        raise UserError(
            f"{wanted}: torchao is not installed ({error}); pip install 'dist-vpt[int8]', or {instead}"
        ) from error
    return quant_primitives


def _forward(linear: nn.Linear, x_BND: Tensor) -> Tensor:
    return _Linear.apply(x_BND, linear)


class _Linear(torch.autograd.Function):
    """x W^T + b and its gradient in x alone; keeps the layer, but no tensor, for backward."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, linear: nn.Linear) -> Tensor:
        ctx.linear = linear
        return F.linear(x_BND, _dequantized(linear, x_BND.dtype), bias_of(linear))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ _dequantized(ctx.linear, grads[0].dtype), None


def _dequantized(linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    scale_O1: Any = linear.scale_O1
    # Multiplied in float32: a scale in bf16 would be off by the same factor in its whole row.
    return torch.mul(linear.weight, scale_O1, out=torch.empty_like(linear.weight, dtype=dtype))
