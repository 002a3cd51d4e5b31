"""Visual Query Tuning in its published, joint form, in plain NumPy float64, with derivatives written by hand.

The yardstick for every faster form of VQT. Before a block its queries are put behind the image's tokens, the
ordinary block runs on all of them under a mask, and the queries are taken off again. Nothing here makes use of
the fact that the image's tokens do not depend on the queries: the gradient goes back through all tokens of all
blocks, as autograd would send it.

Shape letters: those of vit.py, but
    N = R + M tokens of the image        Q queries of one block        A = N + Q, both together
    J blocks that have queries           X numbers of one group        F numbers that the head reads, all X

The mask, A x A: image tokens look at image tokens only, and so do queries: no query is seen by anyone,
not even by itself. Rotary positions turn the image's patches, and no query.

Groups of features, each brought to length 1 on its own and then joined: first the backbone's own pooled
features (after `norm`, pooling and `fc_norm`), then for each block with queries their outputs, as the block
leaves them (no `norm`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.reference.vit import Array, Cache, Config, Weights

from . import vit

POOLINGS = ("none", "mean", "weighted")

_LENGTH_EPS = 1e-12  # a shorter vector is divided by this instead of by its length


@dataclass(frozen=True, kw_only=True)
class Result:
    """Outcome of `forward_backward_vqt`."""

    logits: Array
    """B x K."""
    loss: float
    """Weighted mean over the images."""
    features: Array
    """B x F, what the head reads: the groups side by side."""
    groups: tuple[Array, ...]
    """1 + J arrays B x X, normalized if asked for: the pooled features, then one group for each block."""
    outputs: Array
    """B x J x Q x D, what the blocks made of their queries: neither pooled nor normalized."""
    stream: tuple[Array, ...]
    """L + 1 arrays B x N x D: the image's tokens before each block and after the last one, without `norm`."""
    grads: dict[str, Array] = field(default_factory=dict)
    """By name: queries, head.<i>.weight, head.<i>.bias, and pool_weights where the pooling is 'weighted'."""


def forward_backward_vqt(
    weights: Weights,
    config: Config,
    images_u8: Array,
    labels: Array,
    *,
    queries: Array,
    blocks: Sequence[int] | None = None,
    pooling: str = "none",
    pool_weights: Array | None = None,
    normalize: bool = True,
    dropout_factors: Array | None = None,
    head: Sequence[tuple[Array, Array]],
    smoothing: float = 0.0,
    example_weight: Array | None = None,
) -> Result:
    """Loss of one batch and its gradient with respect to everything that VQT trains; the backbone is frozen.

    weights: timm state dict as arrays; `head.*` in it is ignored, the head is given on its own.
    images_u8: B x C x S x S. labels: B class indices.
    queries: J x Q x D, queries[j] for block blocks[j]. blocks: ascending; None means every block.
    pooling: see `group_forward`. pool_weights: J x Q, for 'weighted' only.
    normalize: False leaves every group at the length it has.
    dropout_factors: B x J x Q x D, 0 or 1 / (1 - p), multiplied into the queries of each image.
    head: (weight out x in, bias out) of its linear layers, with GELU in between; a single pair is a linear head.
    smoothing and example_weight: see `vit.cross_entropy`.
    """
    features_BF, cache = features_forward(
        weights,
        config,
        images_u8,
        queries=queries,
        blocks=blocks,
        pooling=pooling,
        pool_weights=pool_weights,
        normalize=normalize,
        dropout_factors=dropout_factors,
    )
    logits_BK, head_cache = head_forward(features_BF, head)
    loss, dlogits_BK = vit.cross_entropy(logits_BK, labels, smoothing=smoothing, example_weight=example_weight)

    dfeatures_BF, grads = head_backward(dlogits_BK, head_cache)
    grads |= features_backward(dfeatures_BF, cache)
    return Result(
        logits=logits_BK,
        loss=loss,
        features=features_BF,
        groups=cache["groups"],
        outputs=cache["outputs_BJQD"],
        stream=cache["stream"],
        grads=grads,
    )


def loss_only_vqt(
    weights: Weights,
    config: Config,
    images_u8: Array,
    labels: Array,
    *,
    queries: Array,
    blocks: Sequence[int] | None = None,
    pooling: str = "none",
    pool_weights: Array | None = None,
    normalize: bool = True,
    dropout_factors: Array | None = None,
    head: Sequence[tuple[Array, Array]],
    smoothing: float = 0.0,
    example_weight: Array | None = None,
) -> float:
    """The loss of `forward_backward_vqt` without the backward pass."""
    features_BF, _ = features_forward(
        weights,
        config,
        images_u8,
        queries=queries,
        blocks=blocks,
        pooling=pooling,
        pool_weights=pool_weights,
        normalize=normalize,
        dropout_factors=dropout_factors,
    )
    logits_BK, _ = head_forward(features_BF, head)
    return vit.cross_entropy(logits_BK, labels, smoothing=smoothing, example_weight=example_weight)[0]


# ------------------------------------------------------------------------------------------------------------
# Backbone with queries, up to the features that the head reads
# ------------------------------------------------------------------------------------------------------------


def features_forward(
    weights: Weights,
    config: Config,
    images_u8: Array,
    *,
    queries: Array,
    blocks: Sequence[int] | None = None,
    pooling: str = "none",
    pool_weights: Array | None = None,
    normalize: bool = True,
    dropout_factors: Array | None = None,
) -> tuple[Array, Cache]:
    """Images to features (B x F): embed, blocks with queries, then the groups."""
    w = {name: vit._f64(value) for name, value in weights.items()}
    vit._check_names(w)
    depth = vit.depth_of(w)
    blocks = list(range(depth) if blocks is None else blocks)
    queries_JQD = vit._f64(queries)
    weights_JQ = None if pool_weights is None else vit._f64(pool_weights)

    x_BND, embed_cache = vit.embed_forward(vit.normalize_images(images_u8, config.mean, config.std), w, config)
    B, N, D = x_BND.shape
    _check_blocks(blocks, queries_JQD, depth, D)
    _check_pooling(pooling, weights_JQ, queries_JQD.shape[:2])
    factors_BJQD = np.ones((B, *queries_JQD.shape)) if dropout_factors is None else vit._f64(dropout_factors)
    if factors_BJQD.shape != (B, *queries_JQD.shape):
        raise ValueError(f"dropout_factors have shape {factors_BJQD.shape}; need {(B, *queries_JQD.shape)}")

    mask_AA, patches = query_mask(N, queries_JQD.shape[1]), slice(embed_cache["num_prefix"], N)
    outputs_BJQD = np.zeros((B, *queries_JQD.shape))
    stream, block_caches, join_caches = [x_BND], [], {}
    for block in range(depth):
        w_block = vit._local(w, f"blocks.{block}.")
        if block in blocks:
            j = blocks.index(block)
            joined_BAD, join_caches[block] = join_forward(x_BND, queries_JQD[j], factors_BJQD[:, j])
            joined_BAD, block_cache = vit.block_forward(joined_BAD, w_block, config, mask_AA, patches)
            x_BND, outputs_BJQD[:, j] = joined_BAD[:, :N], joined_BAD[:, N:]
        else:
            x_BND, block_cache = vit.block_forward(x_BND, w_block, config, patches=patches)
        block_caches.append(block_cache)
        stream.append(x_BND)

    tokens_BND, norm_cache = vit.optional_norm_forward(x_BND, w, "norm", config.eps)
    pooled_BD, pool_cache = vit.pool_forward(
        tokens_BND, embed_cache["num_prefix"], 0, "original", config.pool, has_class_token="cls_token" in w
    )
    pooled_BD, fc_norm_cache = vit.optional_norm_forward(pooled_BD, w, "fc_norm", config.eps)

    groups, group_caches = [pooled_BD], []
    for j in range(len(blocks)):
        group_BX, group_cache = group_forward(
            outputs_BJQD[:, j], pooling, None if weights_JQ is None else weights_JQ[j]
        )
        groups.append(group_BX)
        group_caches.append(group_cache)
    unit_caches = []
    if normalize:
        for i, group_BX in enumerate(groups):
            groups[i], unit_cache = unit_forward(group_BX)
            unit_caches.append(unit_cache)

    return np.concatenate(groups, axis=1), {
        "queries_shape": queries_JQD.shape,
        "blocks": blocks,
        "joins": join_caches,
        "block_caches": block_caches,
        "norm": norm_cache,
        "pool": pool_cache,
        "fc_norm": fc_norm_cache,
        "group_caches": group_caches,
        "unit_caches": unit_caches,
        "groups": tuple(groups),
        "outputs_BJQD": outputs_BJQD,
        "stream": tuple(stream),
    }


def features_backward(dfeatures_BF: Array, cache: Cache) -> dict[str, Array]:
    """Gradients of the queries and, where they are weighted, of the weights of the pooling."""
    ends = np.cumsum([group_BX.shape[1] for group_BX in cache["groups"]])
    dgroups = np.split(dfeatures_BF, ends[:-1], axis=1)
    if cache["unit_caches"]:
        dgroups = [unit_backward(dgroup_BX, c) for dgroup_BX, c in zip(dgroups, cache["unit_caches"], strict=True)]

    dpooled_BD, _ = vit.optional_norm_backward(dgroups[0], cache["fc_norm"])
    dx_BND, _ = vit.optional_norm_backward(vit.pool_backward(dpooled_BD, cache["pool"]), cache["norm"])

    doutputs, dweights = [], []
    for dgroup_BX, group_cache in zip(dgroups[1:], cache["group_caches"], strict=True):
        doutput_BQD, dweight_Q = group_backward(dgroup_BX, group_cache)
        doutputs.append(doutput_BQD)
        dweights.append(dweight_Q)

    blocks, block_caches = cache["blocks"], cache["block_caches"]
    dqueries_JQD = np.zeros(cache["queries_shape"])
    for block in reversed(range(min(blocks, default=len(block_caches)), len(block_caches))):
        if block in blocks:
            j = blocks.index(block)
            djoined_BAD = np.concatenate([dx_BND, doutputs[j]], axis=1)
            djoined_BAD, _ = vit.block_backward(djoined_BAD, block_caches[block])
            dx_BND, dqueries_JQD[j] = join_backward(djoined_BAD, cache["joins"][block])
        else:
            dx_BND, _ = vit.block_backward(dx_BND, block_caches[block])

    grads = {"queries": dqueries_JQD}
    if dweights and dweights[0] is not None:
        grads["pool_weights"] = np.stack(dweights)
    return grads


def query_mask(num_tokens: int, num_queries: int) -> Array:
    """A x A, added to the scores: nobody looks at the last Q."""
    total = num_tokens + num_queries
    mask_AA = np.zeros((total, total))
    mask_AA[:, num_tokens:] = -np.inf
    return mask_AA


def join_forward(x_BND: Array, query_QD: Array, factors_BQD: Array) -> tuple[Array, Cache]:
    """The image's tokens, then the queries: the same for all images up to the dropout."""
    return np.concatenate([x_BND, query_QD * factors_BQD], axis=1), (x_BND.shape[1], factors_BQD)


def join_backward(djoined_BAD: Array, cache: Cache) -> tuple[Array, Array]:
    """(gradient of the image's tokens, gradient of the queries)."""
    num_tokens, factors_BQD = cache
    return djoined_BAD[:, :num_tokens], (djoined_BAD[:, num_tokens:] * factors_BQD).sum(axis=0)


# ------------------------------------------------------------------------------------------------------------
# Outputs of one block's queries to one group; the head
# ------------------------------------------------------------------------------------------------------------


def group_forward(z_BQD: Array, pooling: str, weight_Q: Array | None) -> tuple[Array, Cache]:
    """B x Q x D to B x X. none: one query behind the other, X = Q * D. mean, weighted: over Q, X = D.

    The weights are used as they are: no softmax, and their sum is free.
    """
    if pooling == "none":
        group_BX = z_BQD.reshape(len(z_BQD), -1)
    elif pooling == "mean":
        group_BX = z_BQD.mean(axis=1)
    else:
        group_BX = (z_BQD * weight_Q[:, None]).sum(axis=1)
    return group_BX, (z_BQD, pooling, weight_Q)


def group_backward(dgroup_BX: Array, cache: Cache) -> tuple[Array, Array | None]:
    """(gradient of the outputs, gradient of the weights or None)."""
    z_BQD, pooling, weight_Q = cache
    if pooling == "none":
        return dgroup_BX.reshape(z_BQD.shape), None
    if pooling == "mean":
        return np.broadcast_to(dgroup_BX[:, None], z_BQD.shape) / z_BQD.shape[1], None
    return dgroup_BX[:, None] * weight_Q[:, None], (dgroup_BX[:, None] * z_BQD).sum(axis=(0, 2))


def unit_forward(x_BX: Array) -> tuple[Array, Cache]:
    """x / max(|x|, 1e-12), per image."""
    length_B1 = np.sqrt((x_BX**2).sum(axis=1, keepdims=True))
    unit_BX = x_BX / np.maximum(length_B1, _LENGTH_EPS)
    return unit_BX, (unit_BX, length_B1)


def unit_backward(dunit_BX: Array, cache: Cache) -> Array:
    unit_BX, length_B1 = cache
    # The length depends on x: it takes out what is along x, unless the constant is divided by instead.
    along_B1 = np.where(length_B1 > _LENGTH_EPS, (dunit_BX * unit_BX).sum(axis=1, keepdims=True), 0.0)
    return (dunit_BX - unit_BX * along_B1) / np.maximum(length_B1, _LENGTH_EPS)


def head_forward(features_BF: Array, head: Sequence[tuple[Array, Array]]) -> tuple[Array, Cache]:
    """Linear layers with GELU between them, none after the last."""
    if not head:
        raise ValueError("head has no layer; give at least one (weight, bias)")
    x, layers = features_BF, []
    for i, (weight, bias) in enumerate(head):
        x, linear_cache = vit.linear_forward(x, vit._f64(weight), vit._f64(bias))
        gelu_cache = None
        if i < len(head) - 1:
            x, gelu_cache = vit.gelu_forward(x)
        layers.append((linear_cache, gelu_cache))
    return x, layers


def head_backward(dlogits_BK: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    dx, grads = dlogits_BK, {}
    for i, (linear_cache, gelu_cache) in reversed(list(enumerate(cache))):
        if gelu_cache is not None:
            dx = vit.gelu_backward(dx, gelu_cache)
        dx, layer_grads = vit.linear_backward(dx, linear_cache)
        grads |= vit._named(f"head.{i}.", layer_grads)
    return dx, grads


# ------------------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------------------


def _check_blocks(blocks: list[int], queries_JQD: Array, depth: int, width: int) -> None:
    if blocks != sorted(set(blocks)) or not set(blocks) <= set(range(depth)):
        raise ValueError(f"blocks {blocks}; need ascending numbers of 0..{depth - 1}, each at most once")
    if queries_JQD.ndim != 3 or len(queries_JQD) != len(blocks) or queries_JQD.shape[2] != width:
        raise ValueError(f"queries have shape {queries_JQD.shape}; need ({len(blocks)}, Q, {width})")
    if queries_JQD.shape[1] == 0:
        raise ValueError("queries have Q = 0; leave a block out of `blocks` to give it none")


def _check_pooling(pooling: str, weights_JQ: Array | None, shape: tuple[int, int]) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is none of {', '.join(POOLINGS)}")
    if (pooling == "weighted") != (weights_JQ is not None):
        raise ValueError("pooling 'weighted' needs pool_weights, and no other pooling takes them")
    if weights_JQ is not None and weights_JQ.shape != shape:
        raise ValueError(f"pool_weights have shape {weights_JQ.shape}; need {shape}")
