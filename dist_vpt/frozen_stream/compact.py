"""A frozen stream in 8 bits: the numbers of a token as multiples of a scale of its own.

n images, X tokens (and heads), D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_vpt.frozen_stream.config import StreamDtype

LARGEST = {"int8": 127.0, "fp8": 448.0}  # of int8 and of float8_e4m3fn
KEPT_AS = {"int8": torch.int8, "fp8": torch.uint8}  # float8's bits: few operations know the type itself


class Packed(NamedTuple):
    """What a cache keeps in place of a tensor [n, X, D] of ``dtype``."""

    values: Tensor  # [n, X, D], one byte each
    scale: Tensor  # [n, X, 1] float32
    dtype: torch.dtype

    def rows(self, index_B: Tensor) -> "Packed":
        """Those of some images."""
        return Packed(self.values.index_select(0, index_B), self.scale.index_select(0, index_B), self.dtype)

    def unpack(self) -> Tensor:
        """The tensor, [n, X, D], on the device of its parts."""
        values = self.values if self.values.dtype == torch.int8 else self.values.view(torch.float8_e4m3fn)
        return (values.float() * self.scale).to(self.dtype)


def pack(rows: Tensor, dtype: StreamDtype) -> tuple[Tensor, Tensor]:
    """Values [B, X, D] and scale [B, X, 1]: the largest number of a token becomes the largest that 8 bits hold."""
    wide = rows.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
    values = wide / scale
    if dtype == "int8":
        return values.round().to(torch.int8), scale
    return values.to(torch.float8_e4m3fn).view(torch.uint8), scale
