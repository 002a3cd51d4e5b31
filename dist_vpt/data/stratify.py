"""Parts of a split in proportion to the classes where images have several labels.

n images, K classes. Iterative stratification: Sechidis, Tsoumakas, Vlahavas, On the Stratification of Multi-Label Data
(ECML PKDD 2011), section 3.3, for two parts.
"""

import numpy as np

KEPT, HELD_OUT = 0, 1


def stratified_rows(labels_nK: np.ndarray, count: int, order_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows kept and ``count`` rows held out, each class in both as near to its share as possible; both sorted.

    The images of the class with the fewest images left are dealt first, in the order of ``order_n``, each to the part
    that wants more of this class. The last image of a class is never held out, so that fewer than ``count`` may be.
    """
    n, labels = len(labels_nK), labels_nK.astype(bool)
    sizes = [n - count, count]  # images that a part still takes
    wanted_2K = np.outer(np.array(sizes) / n, labels.sum(0))  # positives of each class that it still wants
    found_K = np.zeros(labels.shape[1], np.int64)  # positives among the kept
    left_K, part_n, place_n = labels.sum(0), np.full(n, -1), np.empty(n, np.int64)
    place_n[order_n] = np.arange(n)

    def deal(i: int, wish: np.ndarray) -> None:
        own = np.flatnonzero(labels[i])
        if (found_K[own] == 0).any() or sizes[HELD_OUT] == 0:  # every class needs an image to be trained on
            part = KEPT
        elif sizes[KEPT] <= 0:
            part = HELD_OUT
        else:
            part = HELD_OUT if tuple(wish[HELD_OUT]) > tuple(wish[KEPT]) else KEPT
        part_n[i] = part
        sizes[part] -= 1
        wanted_2K[part, own] -= 1
        left_K[own] -= 1
        found_K[own] += part == KEPT

    while left_K.any():
        k = int(np.argmin(np.where(left_K > 0, left_K, n + 1)))
        rows = np.flatnonzero(labels[:, k] & (part_n < 0))
        for i in rows[np.argsort(place_n[rows])].tolist():
            deal(i, np.stack([wanted_2K[:, k], sizes], axis=1))
    for i in order_n[part_n[order_n] < 0].tolist():  # images without a label
        deal(i, np.array(sizes)[:, None])
    return np.flatnonzero(part_n == KEPT), np.flatnonzero(part_n == HELD_OUT)
