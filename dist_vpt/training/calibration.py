"""Temperature scaling: one number by which logits are divided, so that probabilities mean what they say.

Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, section 4.2. n images of val, K classes.
"""

from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from dist_vpt.training.metrics import Scores

COLDEST, HOTTEST = 0.01, 100.0  # temperatures
CHUNK = 2**17  # logits that are in memory in float64 at once: few, so that they stay in a core's cache
SAMPLE = 2**22  # logits at most that the first estimate reads
NEWTON_STEPS = 8
NO_VAL = "there is no val split that is not trained on"


def temperature_on_val(scores: Scores) -> dict[str, Any]:
    """The temperature by the logits that ``scores`` has kept of val, for result.json; a collective call.

    ``value``, and ``images`` that it is fitted on; where there is none, None and the ``reason``.
    """
    logits_nK, labels_n = scores.logits()
    return broadcast_object_list([fit_temperature(logits_nK, labels_n) if PartialState().is_main_process else {}])[0]


def fit_temperature(logits_nK: Tensor, labels_n: Tensor) -> dict[str, Any]:
    """The temperature with the least cross entropy, in float64: the root of its derivative by 1 / temperature.

    The cross entropy is convex in 1 / temperature, so that its derivative rises, and Brent's method finds its root.
    Of many images it finds that of some, and Newton's method goes on from there with all: two or three passes.
    """
    if not logits_nK.isfinite().all():
        return _none("logits of val are not finite")
    every = max(1, logits_nK.numel() // SAMPLE)
    found = _bracketed(logits_nK[::every], labels_n[::every])
    if every > 1:
        near = found if isinstance(found, float) else 0.0
        found = _newton(logits_nK, labels_n, near) or _bracketed(logits_nK, labels_n)
    return _none(found) if isinstance(found, str) else {"value": float(np.exp(-found)), "images": len(labels_n)}


def _newton(logits_nK: Tensor, labels_n: Tensor, log_inverse: float) -> float | None:
    """The logarithm of 1 / temperature by Newton's method from one near it; None where that does not get there."""
    for _ in range(NEWTON_STEPS):
        slope, curvature = _derivatives(logits_nK, labels_n, inverse := np.exp(log_inverse))
        if not curvature > 0:
            return None
        log_inverse -= (step := slope / (curvature * inverse))
        if not -np.log(HOTTEST) < log_inverse < -np.log(COLDEST):
            return None
        if abs(step) < 1e-6:  # the next one would be of the order of its square
            return float(log_inverse)
    return None


def _bracketed(logits_nK: Tensor, labels_n: Tensor) -> float | str:
    """The logarithm of 1 / temperature by Brent's method between the bounds, or why there is none."""
    from scipy.optimize import brentq

    def slope(log_inverse: float) -> float:
        return _derivatives(logits_nK, labels_n, np.exp(log_inverse))[0]

    low, high = -np.log(HOTTEST), -np.log(COLDEST)
    if slope(low) >= 0:
        return "val is classified no better than by guessing"
    if slope(high) <= 0:
        return "val has no mistake that a lower temperature would not make up for"
    return float(brentq(slope, low, high, xtol=1e-12, rtol=1e-14))


def _derivatives(logits_nK: Tensor, labels_n: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the cross entropy by 1 / temperature: means of E_p[z] - z_label and Var_p[z]."""
    first = second = 0.0
    rows = max(1, CHUNK // logits_nK.shape[1])
    for logits_bK, labels_b in zip(logits_nK.split(rows), labels_n.split(rows), strict=True):
        below_bK = logits_bK.double()
        below_bK = below_bK - below_bK.amax(1, keepdim=True)
        weights_bK = (below_bK * inverse).exp_()
        total_b = weights_bK.sum(1)
        mean_b = weights_bK.mul_(below_bK).sum(1) / total_b
        square_b = weights_bK.mul_(below_bK).sum(1) / total_b
        first += float((mean_b - below_bK.gather(1, labels_b[:, None])[:, 0]).sum())
        second += float((square_b - mean_b.square()).sum())
    return first / len(labels_n), second / len(labels_n)


def _none(reason: str) -> dict[str, Any]:
    return {"value": None, "reason": reason}
