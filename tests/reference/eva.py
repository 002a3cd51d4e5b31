"""What EVA's blocks have beyond a ViT's, in plain NumPy float64: rotary positions, SwiGLU, biases without keys'.

Shape letters: those of vit.py, and
    J = E / 2 pairs of a head's channels        F width inside a SwiGLU

Every `*_backward` takes the gradient of the output and the cache, as in vit.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]
Cache = Any


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """How patches turn the pairs of a head's channels. Half of the pairs turn by the row, the others by the column."""

    base: float
    """Of the frequencies, which fall from pair to pair."""
    centered: bool
    """True (DINOv3): coordinates from -1 to 1, in turns. False (EVA-02): numbers of rows and columns, in radians."""
    halves: bool
    """True: channels j and j + E / 2 are a pair. False: channels 2 j and 2 j + 1."""
    column_first: bool = False
    """True: the first half of the pairs turns by the column."""
    offset: float = 0.0
    """Added to the numbers of rows and columns."""
    reference: int | None = None
    """Patches of a side for which the numbers are meant; on another grid they are stretched to its extent."""

    def angles(self, grid: int, pairs: int) -> Array:
        """M x J, patches row by row."""
        half = pairs // 2
        angles_MJ = np.zeros((grid * grid, pairs))
        for patch in range(grid * grid):
            row, column = divmod(patch, grid)
            first, second = (column, row) if self.column_first else (row, column)
            for j in range(pairs):
                place, step = (first if j < half else second), j % half
                if self.centered:
                    turns = 2 * (place + 0.5) / grid - 1
                    angles_MJ[patch, j] = 2 * math.pi * turns / self.base ** (step / half)
                else:
                    number = (place + self.offset) * (1 if self.reference is None else self.reference / grid)
                    angles_MJ[patch, j] = number / self.base ** (step / half)
        return angles_MJ


def rotate_forward(x_BNE: Array, rotary: Rotary, patches: slice) -> tuple[Array, Cache]:
    """Turn each pair of the patches' channels by its angle; other tokens stay as they are."""
    M, J = len(range(*patches.indices(x_BNE.shape[1]))), x_BNE.shape[2] // 2
    angles_MJ = rotary.angles(math.isqrt(M), J)
    return _turned(x_BNE, angles_MJ, rotary.halves, patches), (angles_MJ, rotary.halves, patches)


def rotate_backward(dout_BNE: Array, cache: Cache) -> Array:
    """The same turn back."""
    angles_MJ, halves, patches = cache
    return _turned(dout_BNE, -angles_MJ, halves, patches)


def _turned(x_BNE: Array, angles_MJ: Array, halves: bool, patches: slice) -> Array:
    out_BNE, J = x_BNE.copy(), angles_MJ.shape[1]
    for j in range(J):
        a, b = (j, j + J) if halves else (2 * j, 2 * j + 1)
        sin_M, cos_M = np.sin(angles_MJ[:, j]), np.cos(angles_MJ[:, j])
        first_BM, second_BM = x_BNE[:, patches, a], x_BNE[:, patches, b]
        out_BNE[:, patches, a] = first_BM * cos_M - second_BM * sin_M
        out_BNE[:, patches, b] = second_BM * cos_M + first_BM * sin_M
    return out_BNE


def silu_forward(x: Array) -> tuple[Array, Cache]:
    """x * sigmoid(x)."""
    sigmoid = 1.0 / (1.0 + np.exp(-x))
    return x * sigmoid, (x, sigmoid)


def silu_backward(dout: Array, cache: Cache) -> Array:
    x, sigmoid = cache
    return dout * (sigmoid + x * sigmoid * (1.0 - sigmoid))


def product(x: Array, y: Array) -> Array:
    """A function of its own, so that rounding.py can round what it gives."""
    return x * y


def is_swiglu(w: Weights) -> bool:
    """Whether an MLP's first layer has twice as many outputs as its last one has inputs, in one layer or in two."""
    return "fc1_g.weight" in w or len(w["fc1.weight"]) == 2 * w["fc2.weight"].shape[1]


def joint_bias(w: Weights) -> Array | None:
    """Of queries, keys and values: one, or two around zeros."""
    if "q_bias" in w:
        return np.concatenate([w["q_bias"], np.zeros_like(w["q_bias"]), w["v_bias"]])
    return w.get("qkv.bias")


def bias_grads(w: Weights, dbias: Array | None) -> dict[str, Array]:
    """The gradients of `joint_bias`'s weights, from that of its value."""
    if dbias is None:
        return {}
    if "q_bias" not in w:
        return {"qkv.bias": dbias}
    of_queries, _, of_values = np.split(dbias, 3)
    return {"q_bias": of_queries, "v_bias": of_values}
