"""The order in which an epoch shows the images of a split: each once, or drawn so that all classes come alike.

n images of the split.
"""

from typing import Literal

import numpy as np

from dist_vpt.data.pieces import in_windows, pieces_of
from dist_vpt.data.splits import Split, shuffled

Sampling = Literal["shuffle", "balanced"]


def epoch_order(sampling: Sampling, split: Split, seed: int, epoch: int) -> np.ndarray:
    """Positions in the split in the order of an epoch, int64 [n]: a pure function of labels, seed and epoch.

    And of the pieces, where records are fetched together.
    """
    pieces = pieces_of(split.source)
    if sampling == "balanced":
        drawn = balanced(split.labels, seed, epoch)
        return drawn if pieces is None else in_windows(pieces, drawn, seed, epoch, 1)  # another key than the draws'
    if pieces is None:
        return shuffled(len(split), seed, epoch)
    return in_windows(pieces, np.arange(len(split)), seed, epoch)


def balanced(labels: np.ndarray, *key: int) -> np.ndarray:
    """n independent draws with replacement, int64 [n]: a class, all being equally likely, then one of its images.

    An image has the probability of torch's WeightedRandomSampler with weights 1 / (images of its class). ``key``: as of
    ``shuffled``, so that it is the same on every machine.
    """
    _, counts_K = np.unique(labels, return_counts=True)  # of the classes that have images
    by_class = np.argsort(labels, kind="stable")
    first_K = np.cumsum(counts_K) - counts_K
    random_2n = np.random.PCG64(np.random.SeedSequence(key)).random_raw(2 * len(labels)).reshape(2, -1)
    class_n = (random_2n[0] % np.uint64(len(counts_K))).astype(np.int64)
    image_n = (random_2n[1] % counts_K[class_n].astype(np.uint64)).astype(np.int64)
    return by_class[first_K[class_n] + image_n]


def earlier_draws(order: np.ndarray) -> np.ndarray:
    """How often the image at each position of an order has been drawn before it, int64 [n]."""
    sorted_n = np.argsort(order, kind="stable")
    rank_n = np.arange(len(order)) - np.searchsorted(order[sorted_n], order[sorted_n])
    earlier_n = np.empty(len(order), np.int64)
    earlier_n[sorted_n] = rank_n
    return earlier_n
