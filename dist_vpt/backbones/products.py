"""Linear layers whose float32 products on a CPU are oneDNN's where a machine has them faster.

I inputs and O outputs of a layer, X any dimensions before them.

torch leaves float32 products on the CPU to MKL, which keeps half of their rate unused on CPUs of other makers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Not public, and what torch's own compiler computes linear layers with on CPUs. None: this torch has no oneDNN.
ONEDNN_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# Numbers of a weight, from which on oneDNN's longer way to a product is worth it. Whatever the batch: else an image's
# logits would depend on the images beside it.
LEAST = 2**15
PLAIN = (Tensor, nn.Parameter)  # tensors of other classes, such as quantized ones, have products of their own

_switch = {"onednn": False}


def use_onednn(on: bool) -> None:
    """Whether from now on the float32 products of this process on the CPU are oneDNN's."""
    _switch["onednn"] = on and ONEDNN_LINEAR is not None


class Linear(nn.Linear):
    """A linear layer of a backbone."""

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(x, self.weight, self.bias)


def take_over_linears(model: nn.Module) -> None:
    """Make the linear layers of a timm model ``Linear``; their tensors, names and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def apply_linear(x_XI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, [X, O], as torch's ``linear``."""
    if _onednn_takes(x_XI, weight_OI):
        return _OneDNNLinear.apply(x_XI, weight_OI, bias_O)
    return F.linear(x_XI, weight_OI, bias_O)


def _onednn_takes(x_XI: Tensor, weight_OI: Tensor) -> bool:
    return (
        _switch["onednn"]
        and type(x_XI) in PLAIN
        and type(weight_OI) in PLAIN
        and x_XI.layout == weight_OI.layout == torch.strided
        and x_XI.device.type == "cpu"
        and x_XI.dtype == weight_OI.dtype == torch.float32
        and weight_OI.numel() >= LEAST
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # nor exporting
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()  # as torch's autograd.Function asks, which would refuse
    )


def onednn_product(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a b^T + bias, [M, N], of float32 tensors on the CPU, of any strides."""
    return ONEDNN_LINEAR(a_MK, b_NK, bias_N, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """Keeps for backward what torch's ``linear`` does: the input only where the weight is trained."""

    @staticmethod
    def forward(ctx: Any, x_XI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x_XI if needs_weight else None, weight_OI if needs_x else None)
        return onednn_product(x_XI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_XI, weight_OI = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if weight_OI is not None:
            of_x = apply_linear(gradients[0], weight_OI.T)  # which has a gradient, too
        if x_XI is not None:  # torch's own: oneDNN is faster in the other order alone, whose result needs a copy
            of_weight = _rows(gradients[0]).T @ _rows(x_XI)
        if ctx.needs_input_grad[2]:
            of_bias = _rows(gradients[0]).sum(0)
        return of_x, of_weight, of_bias


def _rows(x_XI: Tensor) -> Tensor:
    return x_XI.reshape(-1, x_XI.shape[-1])
