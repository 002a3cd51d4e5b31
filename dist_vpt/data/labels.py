"""Labels of images: the number of a class each, or for several labels an image a 0 or 1 for each class.

n images, b of a batch, K classes. Labels are int64 [n], or uint8 [n, K] where an image has several or none.
"""

from collections.abc import Hashable, Sequence

import numpy as np


def are_multiple(labels: np.ndarray) -> bool:
    """Whether each image has a 0 or 1 for each class."""
    return labels.ndim == 2


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """Images of each class, int64 [K]; an image with several labels counts for each of them."""
    if are_multiple(labels):
        return labels.sum(0, dtype=np.int64)
    return np.bincount(labels, minlength=classes)


def batch_labels(labels: np.ndarray, index_b: np.ndarray) -> np.ndarray:
    """The labels of some images: int64 [b], or float32 [b, K] of several labels an image; 0 where the index is -1."""
    found, real_b = labels[np.maximum(index_b, 0)], index_b >= 0
    if are_multiple(labels):
        return np.where(real_b[:, None], found, 0).astype(np.float32)
    return np.where(real_b, found, 0)


def label_key(labels: np.ndarray, i: int) -> Hashable:
    """The label of the i-th image, to be compared: a class's number, or the numbers of all its classes."""
    return tuple(np.flatnonzero(labels[i]).tolist()) if are_multiple(labels) else int(labels[i])


def class_names(labels: np.ndarray, i: int, classes: Sequence[str]) -> list[str]:
    """The names of the classes of the i-th image."""
    found = label_key(labels, i)
    return [classes[k] for k in (found if isinstance(found, tuple) else (found,))]  # type: ignore[call-overload]
