"""The weight of each class in the loss. K classes."""

import numpy as np
import torch
from torch import Tensor

from dist_vpt.data.labels import are_multiple, class_counts


def class_weights(kind: str, labels: np.ndarray, classes: int) -> Tensor:
    """Weight of each class in the loss from the counts of ``labels``, float32 [K]; the mean over images is 1.

    Of several labels an image, the weight of a class's positives: with ``inv`` its negatives / its positives, so that
    both weigh the same.
    """
    counts = class_counts(labels, classes).astype(np.float64)
    if are_multiple(labels):
        weights = (len(labels) - counts) / np.maximum(counts, 1)
        balanced = (kind == "inv") & (counts > 0) & (weights > 0)
        return torch.from_numpy(np.where(balanced, weights, 1.0)).float()
    power = {"none": 0.0, "inv": 1.0, "inv_sqrt": 0.5}[kind]
    weights = np.where(counts > 0, np.maximum(counts, 1) ** -power, 0.0)
    return torch.from_numpy(weights * counts.sum() / (weights * counts).sum()).float()
