"""What rounding alone costs: vit.py with every number rounded to bfloat16 that a kernel would read or write.

Sums inside a kernel stay exact: matrix products, norms, softmax. So does the head, which is float32 in the package.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.reference.vit import Array, Cache

from . import vit

# Each takes tokens or their gradients first, and gives them, alone or first of two.
KERNELS = ("gelu", "silu", "rotate", "layer_scale", "after", "adapter", "block", "mlp", "attention")
ROUNDED = [f"{kernel}_{way}" for kernel in KERNELS for way in ("forward", "backward")]
ROUNDED += ["linear_backward", "norm_backward", "softmax", "product"]


def to_bfloat16(x: Array) -> Array:
    """The nearest numbers with 8 bits of mantissa, of equally near ones the even one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


@contextmanager
def in_bfloat16(*, shift_apart: bool) -> Iterator[None]:
    """vit.py computes so within. ``shift_apart``: biases are added to what has been written already."""

    def linear(x: Array, weight: Array, bias: Array | None) -> tuple[Array, Cache]:
        if x.ndim < 3:
            return of_vit["linear_forward"](x, weight, bias)
        x, weight = to_bfloat16(x), to_bfloat16(weight)
        out, _ = of_vit["linear_forward"](x, weight, None)
        out = out if bias is None else (to_bfloat16(out) if shift_apart else out) + to_bfloat16(bias)
        return to_bfloat16(out), (x, weight, bias is not None)

    def norm(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Cache]:
        out, cache = of_vit["norm_forward"](to_bfloat16(x), to_bfloat16(weight), np.zeros_like(bias), eps)
        return to_bfloat16((to_bfloat16(out) if shift_apart else out) + to_bfloat16(bias)), cache

    def residual(x_BND: Array, branch_BND: Array) -> Array:
        return to_bfloat16(of_vit["residual"](x_BND, branch_BND))

    of_vit = {name: getattr(vit, name) for name in ("linear_forward", "norm_forward", "residual")}
    changed = {"linear_forward": linear, "norm_forward": norm, "residual": residual}
    with patch.multiple(vit, **changed, **{name: _rounded(getattr(vit, name)) for name in ROUNDED}):
        yield


def _rounded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Array, *others: Any, **options: Any) -> Any:
        if x.ndim < 3:
            return kernel(x, *others, **options)
        given = kernel(to_bfloat16(x), *others, **options)
        return (to_bfloat16(given[0]), given[1]) if isinstance(given, tuple) else to_bfloat16(given)

    return run
