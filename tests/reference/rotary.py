"""DINOv3's transformer in plain NumPy float64, read from the published files' own names, with prompts.

It shares no code with the package and prefers a visible loop to a fast one.

Shape letters
    B images    C channels    G patch side (pixels)    M patches    R prefix tokens (class token, registers)
    P prompts    N = R + P + M    D width    H heads    E = D / H
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

Array = np.ndarray
EPS = 1e-5  # of every LayerNorm
BASE = 100.0  # of the periods

_erf = np.vectorize(math.erf, otypes=[np.float64])


def features(
    weights: Mapping[str, Array],
    images_u8: Array,
    *,
    heads: int,
    mean: Sequence[float],
    std: Sequence[float],
    prompts: Sequence[Array] = (),
) -> Array:
    """uint8 images B x C x S x S to features B x D: the class token after the last norm.

    prompts: one P x D for each block, put behind the prefix tokens in the place of the last ones; none: no prompts.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    pixels = images_u8.astype(np.float64) / 255
    pixels = (pixels - np.reshape(mean, (1, -1, 1, 1))) / np.reshape(std, (1, -1, 1, 1))
    return np.stack([_of_one(w, image_CSS, heads, prompts) for image_CSS in pixels])


def _of_one(w: Mapping[str, Array], image_CSS: Array, heads: int, prompts: Sequence[Array]) -> Array:
    kernel_DCGG = w["patch_embed.proj.weight"]
    side = kernel_DCGG.shape[2]
    grid = image_CSS.shape[1] // side
    patches = []
    for i in range(grid):
        for j in range(grid):
            patch_CGG = image_CSS[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
            patches.append((kernel_DCGG * patch_CGG).sum(axis=(1, 2, 3)) + w["patch_embed.proj.bias"])
    prefix_RD = np.concatenate([w["cls_token"][0], w["storage_tokens"][0]])
    R, D = prefix_RD.shape
    x_ND = np.concatenate([prefix_RD, np.stack(patches)])
    E, inserted, block = D // heads, 0, 0
    while f"blocks.{block}.norm1.weight" in w:
        at = f"blocks.{block}"
        if len(prompts):
            x_ND = np.concatenate([x_ND[:R], prompts[block], x_ND[R + inserted :]])
            inserted = len(prompts[block])
        qkv = _norm(x_ND, w, f"{at}.norm1") @ w[f"{at}.attn.qkv.weight"].T
        mixed_ND = np.zeros_like(x_ND)
        for head in range(heads):
            q_NE, k_NE, v_NE = (qkv[:, part * D + head * E : part * D + (head + 1) * E].copy() for part in range(3))
            for place in range(grid * grid):
                n = R + inserted + place
                q_NE[n], k_NE[n] = (_turned(x_NE[n], place // grid, place % grid, grid) for x_NE in (q_NE, k_NE))
            scores_NN = q_NE @ k_NE.T / math.sqrt(E)
            e_NN = np.exp(scores_NN - scores_NN.max(axis=1, keepdims=True))
            mixed_ND[:, head * E : (head + 1) * E] = e_NN / e_NN.sum(axis=1, keepdims=True) @ v_NE
        x_ND = x_ND + w[f"{at}.ls1.gamma"] * _linear(mixed_ND, w, f"{at}.attn.proj")
        hidden = _linear(_norm(x_ND, w, f"{at}.norm2"), w, f"{at}.mlp.fc1")
        hidden = hidden * (1 + _erf(hidden / math.sqrt(2))) / 2
        x_ND = x_ND + w[f"{at}.ls2.gamma"] * _linear(hidden, w, f"{at}.mlp.fc2")
        block += 1
    return _norm(x_ND, w, "norm")[0]


def _turned(x_E: Array, row: int, column: int, grid: int) -> Array:
    """Pairs (e, e + E/2) turned: the first quarter's by the row, the second's by the column, both in [-1, 1]."""
    E = len(x_E)
    out_E = x_E.copy()
    for e in range(E // 2):
        place = (row, column)[e // (E // 4)]
        period = BASE ** (2 * (e % (E // 4)) / (E // 2))
        angle = 2 * math.pi * (2 * (place + 0.5) / grid - 1) / period
        a, b = x_E[e], x_E[e + E // 2]
        out_E[e] = a * math.cos(angle) - b * math.sin(angle)
        out_E[e + E // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out_E


def _linear(x: Array, w: Mapping[str, Array], at: str) -> Array:
    return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]


def _norm(x: Array, w: Mapping[str, Array], at: str) -> Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + EPS) * w[f"{at}.weight"] + w[f"{at}.bias"]
