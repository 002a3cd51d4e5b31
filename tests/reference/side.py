"""Side-tuning in plain NumPy float64: a convolutional network blended with given features, and the way back by hand.

Shape letters
    B images    C, O channels before and after a convolution    S image side    I, J rows and columns after it
    D width     X = C * 3 * 3
"""

from collections.abc import Mapping

import numpy as np

from tests.reference.vit import Array, Cache

from . import vit


def forward_backward(
    pooled_BD: Array,
    images_BCSS: Array,
    labels_B: Array,
    weights: Mapping[str, Array],
    *,
    smoothing: float = 0.0,
    example_weight: Array | None = None,
) -> vit.Result:
    """Loss of one batch and its gradients.

    pooled_BD: the frozen backbone's features. images_BCSS: normalized. weights: conv<i>.weight (O x C x 3 x 3) and
    conv<i>.bias in order, linear.weight (D x C), linear.bias, head.weight, head.bias, and blend (one number).
    """
    x, conv_caches = images_BCSS, []
    while f"conv{len(conv_caches)}.weight" in weights:
        number = len(conv_caches)
        x, conv_cache = conv_forward(x, weights[f"conv{number}.weight"], weights[f"conv{number}.bias"])
        conv_caches.append((conv_cache, x > 0))
        x = np.maximum(x, 0.0)
    places = x.shape[2] * x.shape[3]
    side_BD, linear_cache = vit.linear_forward(x.mean(axis=(2, 3)), weights["linear.weight"], weights["linear.bias"])
    share = 1.0 / (1.0 + np.exp(-float(weights["blend"][0])))
    features_BD = share * pooled_BD + (1.0 - share) * side_BD
    logits_BK, head_cache = vit.linear_forward(features_BD, weights["head.weight"], weights["head.bias"])
    loss, dlogits_BK = vit.cross_entropy(logits_BK, labels_B, smoothing=smoothing, example_weight=example_weight)

    dfeatures_BD, head_grads = vit.linear_backward(dlogits_BK, head_cache)
    dshare = float((dfeatures_BD * (pooled_BD - side_BD)).sum())
    dmean_BC, linear_grads = vit.linear_backward((1.0 - share) * dfeatures_BD, linear_cache)
    grads = {f"head.{name}": grad for name, grad in head_grads.items()}
    grads |= {f"linear.{name}": grad for name, grad in linear_grads.items()}
    grads["blend"] = np.array([dshare * share * (1.0 - share)])
    dx = np.broadcast_to(dmean_BC[:, :, None, None] / places, x.shape)
    for number, (conv_cache, positive) in reversed(list(enumerate(conv_caches))):
        dx, weight, bias = conv_backward(dx * positive, conv_cache)
        grads |= {f"conv{number}.weight": weight, f"conv{number}.bias": bias}
    return vit.Result(logits=logits_BK, loss=loss, features=features_BD, tokens=np.zeros(0), grads=grads)


def conv_forward(x_BCSS: Array, weight_OC33: Array, bias_O: Array) -> tuple[Array, Cache]:
    """Kernels of 3 x 3 on every second place, with one place of zeros around the image."""
    B, C, S, _ = x_BCSS.shape
    padded = np.zeros((B, C, S + 2, S + 2))
    padded[:, :, 1:-1, 1:-1] = x_BCSS
    side = (S + 1) // 2
    out_BOIJ = np.zeros((B, len(weight_OC33), side, side))
    for i in range(side):
        for j in range(side):
            seen_BX = padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].reshape(B, -1)
            out_BOIJ[:, :, i, j] = seen_BX @ weight_OC33.reshape(len(weight_OC33), -1).T + bias_O
    return out_BOIJ, (padded, weight_OC33)


def conv_backward(dout_BOIJ: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """Gradients of the image, the weight and the bias."""
    padded, weight_OC33 = cache
    dpadded, dweight = np.zeros(padded.shape), np.zeros(weight_OC33.shape)
    for i in range(dout_BOIJ.shape[2]):
        for j in range(dout_BOIJ.shape[3]):
            at = (slice(None), slice(None), slice(2 * i, 2 * i + 3), slice(2 * j, 2 * j + 3))
            dout_BO = dout_BOIJ[:, :, i, j]
            dweight += np.einsum("bo,bcxy->ocxy", dout_BO, padded[at])
            dpadded[at] += np.einsum("bo,ocxy->bcxy", dout_BO, weight_OC33)
    return dpadded[:, :, 1:-1, 1:-1], dweight, dout_BOIJ.sum(axis=(0, 2, 3))
