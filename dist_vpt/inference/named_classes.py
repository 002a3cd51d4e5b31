"""Which classes of an image are named: the most likely ones, or of several labels all that reach their thresholds.

B batch, K classes.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dist_vpt.recipe.schema import Recipe
from dist_vpt.training.multi_label import DEFAULT_THRESHOLD

TOP = 5  # classes of an image that has one label
DIGITS = 6  # of a probability


def thresholds_of(recipe: Recipe, facts: dict[str, Any], classes: Sequence[str]) -> list[float] | None:
    """The threshold of each class by the head of an adapter file; None where images have one label."""
    if recipe.data.labels == "single":
        return None
    return facts.get("thresholds") or [DEFAULT_THRESHOLD] * len(classes)


def probabilities_of(logits_BK: Tensor, thresholds: Sequence[float] | None) -> Tensor:
    """Of each class, [B, K], float32 on the CPU: they sum to 1, or with thresholds each is its own."""
    logits_BK = logits_BK.float()
    return (logits_BK.softmax(1) if thresholds is None else logits_BK.sigmoid()).cpu()


def named_classes(
    probabilities_K: Tensor, classes: Sequence[str], top: int | None, thresholds: Sequence[float] | None
) -> list[dict[str, Any]]:
    """``{"class": name, "probability": p}`` of the classes to name, the most likely first.

    ``top``: so many; None: TOP, or with thresholds all that reach theirs, which may be none.
    """
    values, order = probabilities_K.sort(descending=True, stable=True)
    ranked = list(zip(order.tolist(), values.tolist(), strict=True))
    if top is None and thresholds is not None:
        ranked = [(k, p) for k, p in ranked if p >= thresholds[k]]
    else:
        ranked = ranked[: top or TOP]
    return [{"class": classes[k], "probability": round(p, DIGITS)} for k, p in ranked]
