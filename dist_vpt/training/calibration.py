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
CHUNK = 2**22  # logits that are in memory in float64 at once
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
    """
    from scipy.optimize import brentq

    if not logits_nK.isfinite().all():
        return _none("logits of val are not finite")

    def slope(log_inverse: float) -> float:
        """The derivative at exp(log_inverse): the mean over images of E_p[z] - z_label."""
        inverse, sums = np.exp(log_inverse), 0.0
        step = max(1, CHUNK // logits_nK.shape[1])
        for logits_bK, labels_b in zip(logits_nK.split(step), labels_n.split(step), strict=True):
            above_bK = logits_bK.double()
            above_bK = above_bK - above_bK.gather(1, labels_b[:, None])
            sums += float(((above_bK * inverse).softmax(1) * above_bK).sum())
        return sums / len(labels_n)

    low, high = -np.log(HOTTEST), -np.log(COLDEST)
    if slope(low) >= 0:
        return _none("val is classified no better than by guessing")
    if slope(high) <= 0:
        return _none("val has no mistake that a lower temperature would not make up for")
    inverse = np.exp(brentq(slope, low, high, xtol=1e-12, rtol=1e-14))
    return {"value": float(1 / inverse), "images": len(labels_n)}


def _none(reason: str) -> dict[str, Any]:
    return {"value": None, "reason": reason}
