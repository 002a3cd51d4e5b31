"""A Swin Transformer in plain NumPy float64, read from the published files' own names.

This is the yardstick of the tests: it shares no code with the package and prefers a visible loop to a fast one.
Patches are merged at the end of a stage (`layers.<stage>.downsample`), as in the published files.

Shape letters
    B images    C channels    G patch side (pixels)    I, J rows and columns of a grid    W window side    N = P + W * W
    D width of a stage    H heads    E = D / H    P prompts
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]
Prompts = Mapping[tuple[int, int], Array]  # (stage, block) -> P x D
EPS = 1e-5  # of every LayerNorm

_erf = np.vectorize(math.erf, otypes=[np.float64])


def features(
    weights: Weights,
    images_u8: Array,
    *,
    heads: Sequence[int],
    window: int,
    mean: Sequence[float],
    std: Sequence[float],
    prompts: Prompts | None = None,
    pooling: str = "img_pool",
) -> Array:
    """uint8 images B x C x S x S to features B x D: the mean of the last stage's normalized tokens.

    prompts: what takes the place of the prompts, if there are any, before a block. They go on through the blocks of a
    stage, join the patches of every window in attention and leave it as the mean over the windows; merging drops them.
    pooling: whether patches (img_pool), prompts (prompt_pool) or both (imgprompt_pool) are averaged.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    pixels = images_u8.astype(np.float64) / 255
    pixels = (pixels - np.reshape(mean, (1, -1, 1, 1))) / np.reshape(std, (1, -1, 1, 1))
    return np.stack([_of_one(w, image_CSS, heads, window, prompts or {}, pooling) for image_CSS in pixels])


def _of_one(  # noqa: PLR0917
    w: Weights, image_CSS: Array, heads: Sequence[int], window: int, prompts: Prompts, pooling: str
) -> Array:
    x_IJD = _patches(image_CSS, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"])
    if "patch_embed.norm.weight" in w:
        x_IJD = _norm(x_IJD, w, "patch_embed.norm")
    for stage, stage_heads in enumerate(heads):
        block, p_PD = 0, np.zeros((0, x_IJD.shape[2]))
        while f"layers.{stage}.blocks.{block}.norm1.weight" in w:
            shift = window // 2 if block % 2 and window < x_IJD.shape[0] else 0
            at = f"layers.{stage}.blocks.{block}"
            p_PD = np.asarray(prompts.get((stage, block), p_PD), np.float64)
            x_IJD, p_PD = _block(x_IJD, p_PD, w, at, stage_heads, window=min(window, x_IJD.shape[0]), shift=shift)
            block += 1
        if f"layers.{stage}.downsample.reduction.weight" in w:
            x_IJD = _merge(x_IJD, w, f"layers.{stage}.downsample")
    averaged = {"img_pool": [x_IJD.reshape(-1, x_IJD.shape[2])], "prompt_pool": [p_PD]}
    averaged["imgprompt_pool"] = averaged["img_pool"] + averaged["prompt_pool"]
    return _norm(np.concatenate(averaged[pooling]), w, "norm").mean(axis=0)


def _patches(image_CSS: Array, kernel_DCGG: Array, bias_D: Array) -> Array:
    side = kernel_DCGG.shape[2]
    rows, columns = image_CSS.shape[1] // side, image_CSS.shape[2] // side
    out_IJD = np.zeros((rows, columns, len(bias_D)))
    for i in range(rows):
        for j in range(columns):
            patch_CGG = image_CSS[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
            out_IJD[i, j] = (kernel_DCGG * patch_CGG).sum(axis=(1, 2, 3)) + bias_D
    return out_IJD


def _block(
    x_IJD: Array, p_PD: Array, w: Weights, at: str, heads: int, *, window: int, shift: int
) -> tuple[Array, Array]:
    normed_IJD, normed_PD = (_norm(tokens, w, f"{at}.norm1") for tokens in (x_IJD, p_PD))
    attended = _attention(normed_IJD, normed_PD, w, f"{at}.attn", heads, window=window, shift=shift)
    return tuple(  # type: ignore[return-value]
        _mlp(tokens + branch, w, at) for tokens, branch in zip((x_IJD, p_PD), attended, strict=True)
    )


def _mlp(x: Array, w: Weights, at: str) -> Array:
    return x + _linear(_gelu(_linear(_norm(x, w, f"{at}.norm2"), w, f"{at}.mlp.fc1")), w, f"{at}.mlp.fc2")


def _attention(
    x_IJD: Array, p_PD: Array, w: Weights, at: str, heads: int, *, window: int, shift: int
) -> tuple[Array, Array]:
    """Windows lie on the grid moved up and left by ``shift``, around its edges; what lies on both sides of an edge in
    one window does not see each other. Prompts are seen by all in a window and see all."""
    rows, columns, D = x_IJD.shape
    P, E = len(p_PD), D // heads
    out_IJD, out_PD = np.zeros_like(x_IJD), np.zeros_like(p_PD)
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            places = [(top + a + shift, left + b + shift) for a in range(window) for b in range(window)]
            tokens_ND = np.stack([*p_PD, *(x_IJD[i % rows, j % columns] for i, j in places)])
            q_ND, k_ND, v_ND = np.split(_linear(tokens_ND, w, f"{at}.qkv"), 3, axis=1)
            mixed_ND = np.zeros_like(q_ND)
            for head in range(heads):
                of_head = slice(head * E, (head + 1) * E)
                scores_NN = q_ND[:, of_head] @ k_ND[:, of_head].T / math.sqrt(E)
                for n, (i, j) in enumerate(places):
                    for m, (row, column) in enumerate(places):
                        place = (i - row + window - 1) * (2 * window - 1) + (j - column + window - 1)
                        scores_NN[P + n, P + m] += w[f"{at}.relative_position_bias_table"][place, head]
                        if (i >= rows) != (row >= rows) or (j >= columns) != (column >= columns):
                            scores_NN[P + n, P + m] = -np.inf
                e_NN = np.exp(scores_NN - scores_NN.max(axis=1, keepdims=True))
                mixed_ND[:, of_head] = e_NN / e_NN.sum(axis=1, keepdims=True) @ v_ND[:, of_head]
            attended_ND = _linear(mixed_ND, w, f"{at}.proj")
            out_PD += attended_ND[:P] / (rows * columns / window**2)
            for (i, j), token_D in zip(places, attended_ND[P:], strict=True):
                out_IJD[i % rows, j % columns] = token_D
    return out_IJD, out_PD


def _merge(x_IJD: Array, w: Weights, at: str) -> Array:
    """Four neighbors side by side (down the first column, then down the second), normalized, to twice the width."""
    four = [x_IJD[0::2, 0::2], x_IJD[1::2, 0::2], x_IJD[0::2, 1::2], x_IJD[1::2, 1::2]]
    return _norm(np.concatenate(four, axis=2), w, f"{at}.norm") @ w[f"{at}.reduction.weight"].T


def _linear(x: Array, w: Weights, at: str) -> Array:
    return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]


def _norm(x: Array, w: Weights, at: str) -> Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + EPS) * w[f"{at}.weight"] + w[f"{at}.bias"]


def _gelu(x: Array) -> Array:
    return x * (1 + _erf(x / math.sqrt(2))) / 2
