"""Several labels an image in float64, written for clarity: the loss and its gradient, and thresholds by trying all.

B images, K classes.
"""

import math

import numpy as np

Array = np.ndarray


def loss(
    logits_BK: Array, labels_BK: Array, weights_B: Array, smoothing: float, positive_weights_K: Array
) -> tuple[float, Array]:
    """The weighted mean over images of the mean over classes of the binary cross entropy, and its gradient [B, K]."""
    images, classes = logits_BK.shape
    gradient_BK, total = np.zeros((images, classes)), 0.0
    for b in range(images):
        for k in range(classes):
            z, w = float(logits_BK[b, k]), float(positive_weights_K[k])
            target = float(labels_BK[b, k]) * (1 - smoothing) + smoothing / 2
            probability = 1 / (1 + math.exp(-z))
            value = -(w * target * math.log(probability) + (1 - target) * math.log(1 - probability))
            slope = -w * target * (1 - probability) + (1 - target) * probability
            share = float(weights_B[b]) / float(weights_B.sum()) / classes
            total += share * value
            gradient_BK[b, k] = share * slope
    return total, gradient_BK


def best_f1(probabilities_n: Array, labels_n: Array) -> float:
    """The highest F1 of a class over all thresholds, each probability being tried."""
    found = []
    for threshold in probabilities_n:
        predicted = probabilities_n >= threshold
        right = int((predicted & (labels_n > 0)).sum())
        found.append(2 * right / (int(predicted.sum()) + int(labels_n.sum())))
    return max(found)
