"""Methods that change a frozen transformer's weights: what they make of the weights, and the chain rule back.

Plain NumPy float64, on top of vit.py: the transformer is computed with the changed weights, and the gradients of the
changed weights are those that vit.py gives.

Shape letters: O outputs and D inputs of a linear layer, r rank.
"""

from collections.abc import Mapping

import numpy as np

from tests.reference.vit import Array, Weights

Rows = tuple[int, int]  # of a weight: the first, and the one after the last
Updates = Mapping[tuple[str, Rows], tuple[Array, Array]]  # (weight's name, rows) -> (A [r, D], B [O, r])
Pairs = Mapping[str, tuple[Array, Array]]  # module's name -> (scale, shift) of its output's channels


def low_rank(weights: Weights, updates: Updates, factor: float) -> dict[str, Array]:
    """W + factor * B A for the rows that an update names."""
    changed = dict(weights)
    for (name, rows), (down_rD, up_Or) in updates.items():
        weight_OD = changed[name].copy()
        weight_OD[slice(*rows)] += factor * up_Or @ down_rD
        changed[name] = weight_OD
    return changed


def low_rank_backward(grads: Weights, updates: Updates, factor: float) -> dict[tuple[str, Rows], tuple[Array, Array]]:
    """Gradients of each A and B from that of the changed weight G: dA = factor B^T G, dB = factor G A^T."""
    found = {}
    for (name, rows), (down_rD, up_Or) in updates.items():
        grad_OD = grads[name][slice(*rows)]
        found[name, rows] = (factor * up_Or.T @ grad_OD, factor * grad_OD @ down_rD.T)
    return found


def scale_shift(weights: Weights, pairs: Pairs) -> dict[str, Array]:
    """scale * (W x + b) + shift = (scale W) x + (scale b + shift), and a norm's likewise."""
    changed = dict(weights)
    for name, (scale, shift) in pairs.items():
        weight = weights[f"{name}.weight"]
        changed[f"{name}.weight"] = _rows(scale, weight) * weight
        changed[f"{name}.bias"] = scale * weights.get(f"{name}.bias", 0.0) + shift
    return changed


def scale_shift_backward(grads: Weights, weights: Weights, pairs: Pairs) -> dict[str, tuple[Array, Array]]:
    """Gradients of each scale and shift; ``weights`` are those before the change."""
    found = {}
    for name, (scale, _) in pairs.items():
        of_weight = (grads[f"{name}.weight"] * weights[f"{name}.weight"]).reshape(len(scale), -1).sum(axis=1)
        of_bias = grads[f"{name}.bias"]
        found[name] = (of_weight + of_bias * weights.get(f"{name}.bias", 0.0), of_bias)
    return found


def _rows(values: Array, weight: Array) -> Array:
    return np.reshape(values, (-1, *[1] * (weight.ndim - 1)))
