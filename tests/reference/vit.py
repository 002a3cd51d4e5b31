"""A vision transformer, VPT and a linear head in plain NumPy float64, with derivatives written by hand.

This is the yardstick of the tests: it shares no code with the package, uses no autograd and prefers a
visible loop to a fast one. The architecture is timm's pre-norm `VisionTransformer` or `Eva` (of which eva.py has what a
ViT does not), read from its state dict.

Shape letters
    B images        S image side     C color channels   G patch side (pixels)   M patches per image
    R prefix tokens (class token, then registers)        P prompts               N = R + P + M tokens
    D width         H heads          E = D / H           F MLP width             L blocks       K classes
    d prompt width (D unless projected)

Every `*_forward` returns (output, cache); the `*_backward` of the same name takes the gradient of the loss
with respect to that output, and the cache, and returns the gradient with respect to the input, with a dict of
the gradients of its weights where it has any.

Adapters are weights of a block beyond timm's: `adapter_attn` and `adapter_mlp` stand after a branch (GELU), and
`adapter_beside` beside the MLP (ReLU). An absent one changes nothing.

Token order, in all blocks: [class token, registers, prompts, patches]; an absent kind has length 0. Prompts
join after the position embedding and after `norm_pre`, so they pass through neither.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.reference.eva import (
    Rotary,
    bias_grads,
    is_swiglu,
    joint_bias,
    product,
    rotate_backward,
    rotate_forward,
    silu_backward,
    silu_forward,
)

Array = np.ndarray
Weights = Mapping[str, Array]
Cache = Any

POOLINGS = ("original", "img_pool", "prompt_pool", "imgprompt_pool")

# A name outside this list is a layer this file does not compute; ignoring it would make a wrong yardstick.
_KNOWN_NAMES = re.compile(
    r"cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm_pre|norm|fc_norm)\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(qkv|[qkv]_proj|proj|q_norm|k_norm|norm)\.(weight|bias)"
    r"|attn\.[qv]_bias|gamma_[12]"
    r"|ls[12]\.gamma|mlp\.(fc[12]|fc1_[gx]|norm)\.(weight|bias)|adapter_(attn|mlp|beside)\.(down|up)\.(weight|bias))"
    r"|head\.(weight|bias)"
)

_erf = np.vectorize(math.erf, otypes=[np.float64])  # the C library's, so that SciPy is not needed


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the weights alone do not tell about the backbone."""

    num_heads: int
    patch_size: int
    """Patch side in pixels (kernel = stride)."""
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    """Per channel, for pixel values scaled to 0..1."""
    std: Sequence[float] = (0.5, 0.5, 0.5)
    """Per channel, for pixel values scaled to 0..1."""
    eps: float = 1e-6
    """Of every LayerNorm, q_norm and k_norm included."""
    no_embed_class: bool = False
    """True: `pos_embed` has entries for the patches only."""
    pool: str = "token"
    """The backbone's own pooling: 'token' (class token) or 'avg' (mean of the image's patches)."""
    rotary: Rotary | None = None
    """How blocks turn queries and keys by a patch's position."""
    beside_scale: float = 1.0
    """Multiplies what `adapter_beside` gives."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Trained prompts and the blocks they enter. Use the constructors below for the published variants.

    `at[l] = i` puts `values[i]` (P x d) at the prompt positions of block l's input, in place of whatever
    stands there. A block that is not in `at` receives the prompt positions as the block before it left them.
    A value named by several blocks is one parameter, and its gradient is the sum over these blocks.
    """

    values: tuple[Array, ...]
    at: Mapping[int, int]
    drop_after_last: bool = False
    """True: the prompt positions are removed from the input of the block after the last prompted one."""
    add: bool = False
    """True: values[i] (N x d, or 1 x d for all tokens alike) is added to the tokens; there are no positions of it."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What is trained beside an image's pixels, the same for all images: a frame around it, or channels beside its own.

    Either may be absent. The frame is given as the whole framed image, in 0..1 like pixels; where the image itself lies
    its values are not read, and its gradient is zero.
    """

    frame_CTT: Array | None = None
    channels_PSS: Array | None = None
    kernel_DPGG: Array | None = None
    """Of the channels: what the patch projection makes of them, with bias_D added."""
    bias_D: Array | None = None


def shallow(prompt_Pd: Array) -> Prompts:
    """One prompt before block 0 that flows on through all blocks."""
    return Prompts(values=(prompt_Pd,), at={0: 0})


def deep_first(prompts: Sequence[Array], *, drop_after_last: bool = False) -> Prompts:
    """Blocks 0..n-1 each with their own prompt; later blocks carry the last one on. n = L is VPT-Deep."""
    at = {block: block for block in range(len(prompts))}
    return Prompts(values=tuple(prompts), at=at, drop_after_last=drop_after_last)


def deep_last(prompts: Sequence[Array], depth: int) -> Prompts:
    """Blocks L-n..L-1 each with their own prompt; no prompt positions exist before block L-n."""
    start = depth - len(prompts)
    return Prompts(values=tuple(prompts), at={start + i: i for i in range(len(prompts))})


def deep_shared(first_Pd: Array, later_Pd: Array, depth: int) -> Prompts:
    """One prompt for block 0 and a single other one for every later block."""
    return Prompts(values=(first_Pd, later_Pd), at={block: min(block, 1) for block in range(depth)})


@dataclass(frozen=True, kw_only=True)
class Result:
    """Outcome of `forward_backward`."""

    logits: Array
    """B x K."""
    loss: float
    """Weighted mean over the images."""
    features: Array
    """B x D, what the head reads."""
    tokens: Array
    """B x N x D, after the backbone's `norm` where it has one; prompts included where they still exist."""
    grads: dict[str, Array] = field(default_factory=dict)
    """By name: head.weight, head.bias, prompts.<i> (index into `Prompts.values`), projection.weight,
    projection.bias, frame, channels, kernel and bias (of `Pixels`), and with `backbone_grads` every backbone
    weight under its timm name."""


def forward_backward(
    weights: Weights,
    config: Config,
    images_u8: Array,
    labels: Array,
    prompts: Prompts | None = None,
    *,
    head_weight: Array,
    head_bias: Array,
    projection: tuple[Array, Array] | None = None,
    pooling: str = "original",
    smoothing: float = 0.0,
    example_weight: Array | None = None,
    backbone_grads: bool = False,
    pixels: Pixels | None = None,
) -> Result:
    """Loss of one batch and its gradient with respect to everything that a method may train.

    weights: timm state dict as arrays; `head.*` in it is ignored, the head is given on its own.
    images_u8: B x C x S x S. labels: B class indices.
    prompts: None for a linear probe or full fine-tuning. head_weight: K x D. head_bias: K.
    projection: (weight D x d, bias D), shared by all prompts.
    pooling: see `pool_forward`. smoothing and example_weight: see `cross_entropy`.
    backbone_grads: True for full fine-tuning. pixels: what is trained beside the image's own.
    """
    features_BD, cache = features_forward(
        weights, config, images_u8, prompts, projection=projection, pooling=pooling, pixels=pixels
    )
    logits_BK, head_cache = linear_forward(features_BD, _f64(head_weight), _f64(head_bias))
    loss, dlogits_BK = cross_entropy(logits_BK, labels, smoothing=smoothing, example_weight=example_weight)

    dfeatures_BD, head_grads = linear_backward(dlogits_BK, head_cache)
    grads = _named("head.", head_grads)
    grads |= features_backward(dfeatures_BD, cache, backbone_grads=backbone_grads)
    return Result(logits=logits_BK, loss=loss, features=features_BD, tokens=cache["tokens_BND"], grads=grads)


def loss_only(
    weights: Weights,
    config: Config,
    images_u8: Array,
    labels: Array,
    prompts: Prompts | None = None,
    *,
    head_weight: Array,
    head_bias: Array,
    projection: tuple[Array, Array] | None = None,
    pooling: str = "original",
    smoothing: float = 0.0,
    example_weight: Array | None = None,
    pixels: Pixels | None = None,
) -> float:
    """The loss of `forward_backward` without the backward pass."""
    features_BD, _ = features_forward(
        weights, config, images_u8, prompts, projection=projection, pooling=pooling, pixels=pixels
    )
    logits_BK, _ = linear_forward(features_BD, _f64(head_weight), _f64(head_bias))
    return cross_entropy(logits_BK, labels, smoothing=smoothing, example_weight=example_weight)[0]


def normalize_images(images_u8: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """uint8 pixels to (x / 255 - mean) / std, per channel."""
    if images_u8.dtype != np.uint8:
        raise ValueError(f"images have dtype {images_u8.dtype}; pass uint8 pixels, normalization happens here")
    mean_C11 = np.asarray(mean, np.float64)[:, None, None]
    std_C11 = np.asarray(std, np.float64)[:, None, None]
    return (images_u8.astype(np.float64) / 255.0 - mean_C11) / std_C11


# ------------------------------------------------------------------------------------------------------------
# Backbone with prompts, up to the features that the head reads
# ------------------------------------------------------------------------------------------------------------


def features_forward(
    weights: Weights,
    config: Config,
    images_u8: Array,
    prompts: Prompts | None = None,
    *,
    projection: tuple[Array, Array] | None = None,
    pooling: str = "original",
    pixels: Pixels | None = None,
) -> tuple[Array, Cache]:
    """Images to pooled features (B x D): embed, blocks with prompts, `norm`, pool, `fc_norm`."""
    w = {name: _f64(value) for name, value in weights.items()}
    _check_names(w)
    depth = depth_of(w)
    prompts = prompts or Prompts(values=(), at={})
    _check_prompts(prompts, depth)

    inserted, projection_caches = [], []
    for value_Pd in prompts.values:
        value_PD, projection_cache = projection_forward(_f64(value_Pd), projection)
        inserted.append(value_PD)
        projection_caches.append(projection_cache)

    images_BCSS, w, pixels_cache = pixels_forward(images_u8, w, config, pixels)
    x_BND, embed_cache = embed_forward(images_BCSS, w, config)
    num_prefix = embed_cache["num_prefix"]
    num_prompts = 0
    block_caches, placements = [], []
    for block in range(depth):
        new_PD = _prompt_before(block, prompts, inserted, width=x_BND.shape[2])
        placement = None
        if new_PD is not None and prompts.add:
            x_BND, placement = x_BND + new_PD, new_PD.shape
        elif new_PD is not None:
            x_BND, placement = place_prompts_forward(x_BND, new_PD, num_prefix, num_prompts)
            num_prompts = len(new_PD)
        placements.append(placement)
        patches = slice(num_prefix + num_prompts, None)
        x_BND, block_cache = block_forward(x_BND, _local(w, f"blocks.{block}."), config, patches=patches)
        block_caches.append(block_cache)

    tokens_BND, norm_cache = optional_norm_forward(x_BND, w, "norm", config.eps)
    pooled_BD, pool_cache = pool_forward(
        tokens_BND, num_prefix, num_prompts, pooling, config.pool, has_class_token="cls_token" in w
    )
    features_BD, fc_norm_cache = optional_norm_forward(pooled_BD, w, "fc_norm", config.eps)

    return features_BD, {
        "prompts": prompts,
        "projection": projection_caches,
        "pixels": pixels_cache,
        "embed": embed_cache,
        "placements": placements,
        "blocks": block_caches,
        "norm": norm_cache,
        "tokens_BND": tokens_BND,
        "pool": pool_cache,
        "fc_norm": fc_norm_cache,
    }


def features_backward(dfeatures_BD: Array, cache: Cache, *, backbone_grads: bool) -> dict[str, Array]:
    """Gradients of prompts and projection, and of every backbone weight if asked for."""
    prompts: Prompts = cache["prompts"]
    backbone: dict[str, Array] = {}

    dpooled_BD, fc_norm_grads = optional_norm_backward(dfeatures_BD, cache["fc_norm"])
    backbone |= _named("fc_norm.", fc_norm_grads)
    dtokens_BND = pool_backward(dpooled_BD, cache["pool"])
    dx_BND, norm_grads = optional_norm_backward(dtokens_BND, cache["norm"])
    backbone |= _named("norm.", norm_grads)

    # Below the first trained thing no gradient is wanted: the backward pass of a linear probe ends here.
    depth = len(cache["blocks"])
    to_pixels = cache["pixels"] is not None
    lowest = 0 if backbone_grads or to_pixels else min(prompts.at, default=depth)
    dinserted: list[Array | float] = [0.0] * len(prompts.values)
    for block in reversed(range(lowest, depth)):
        dx_BND, block_grads = block_backward(dx_BND, cache["blocks"][block])
        backbone |= _named(f"blocks.{block}.", block_grads)
        if cache["placements"][block] is not None:
            if prompts.add:
                dtokens_ND = dx_BND.sum(axis=0)
                alike = cache["placements"][block][0] == 1
                dprompt_PD = dtokens_ND.sum(axis=0, keepdims=True) if alike else dtokens_ND
            else:
                dx_BND, dprompt_PD = place_prompts_backward(dx_BND, cache["placements"][block])
            if block in prompts.at:
                # One parameter may stand before many blocks (deep-shared): its gradients add.
                dinserted[prompts.at[block]] = dinserted[prompts.at[block]] + dprompt_PD
    grads: dict[str, Array] = {}
    if backbone_grads or to_pixels:
        embed_grads, dimages_BCSS = embed_backward(dx_BND, cache["embed"])
        if to_pixels:
            grads |= pixels_backward(dimages_BCSS, embed_grads, cache["pixels"])
        backbone |= embed_grads

    for index, (dvalue_PD, projection_cache) in enumerate(zip(dinserted, cache["projection"], strict=True)):
        grads[f"prompts.{index}"], projection_grads = projection_backward(dvalue_PD, projection_cache)
        for name, grad in _named("projection.", projection_grads).items():
            grads[name] = grads.get(name, 0.0) + grad  # one projection serves all prompts
    return grads | backbone if backbone_grads else grads


def pixels_forward(images_u8: Array, w: Weights, config: Config, pixels: Pixels | None) -> tuple[Array, Weights, Cache]:
    """Normalized images with what is trained beside them, and weights with a kernel for all of their channels."""
    images_BCSS = normalize_images(images_u8, config.mean, config.std)
    if pixels is None:
        return images_BCSS, w, None
    B, C, S, _ = images_BCSS.shape
    std_C11 = np.asarray(config.std, np.float64)[:, None, None]
    inside = slice(None)
    if pixels.frame_CTT is not None:
        margin = (pixels.frame_CTT.shape[1] - S) // 2
        inside = slice(margin, margin + S)
        mean_C11 = np.asarray(config.mean, np.float64)[:, None, None]
        framed_BCTT = np.repeat((_f64(pixels.frame_CTT) - mean_C11)[None] / std_C11, B, axis=0)
        framed_BCTT[:, :, inside, inside] = images_BCSS
        images_BCSS = framed_BCTT
    if pixels.channels_PSS is not None:
        channels_BPSS = np.repeat(_f64(pixels.channels_PSS)[None], B, axis=0)
        images_BCSS = np.concatenate([images_BCSS, channels_BPSS], axis=1)
        kernel = np.concatenate([w["patch_embed.proj.weight"], _f64(pixels.kernel_DPGG)], axis=1)
        bias_D = w.get("patch_embed.proj.bias", 0.0) + _f64(pixels.bias_D)
        w = {**w, "patch_embed.proj.weight": kernel, "patch_embed.proj.bias": bias_D}
    return images_BCSS, w, (pixels, C, std_C11, inside)


def pixels_backward(dimages_BCSS: Array, embed_grads: Mapping[str, Array], cache: Cache) -> dict[str, Array]:
    pixels, C, std_C11, inside = cache
    grads = {}
    if pixels.frame_CTT is not None:
        grads["frame"] = dimages_BCSS[:, :C].sum(axis=0) / std_C11
        grads["frame"][:, inside, inside] = 0.0
    if pixels.channels_PSS is not None:
        grads["channels"] = dimages_BCSS[:, C:].sum(axis=0)
        grads["kernel"] = embed_grads["patch_embed.proj.weight"][:, C:]
        grads["bias"] = embed_grads["patch_embed.proj.bias"]
    return grads


def _prompt_before(block: int, prompts: Prompts, inserted: Sequence[Array], width: int) -> Array | None:
    """What replaces the prompt positions of this block's input; None leaves them as they are."""
    if block in prompts.at:
        return inserted[prompts.at[block]]
    if prompts.drop_after_last and prompts.at and block == max(prompts.at) + 1:
        return np.zeros((0, width))
    return None


def place_prompts_forward(x_BND: Array, prompt_PD: Array, num_prefix: int, num_old: int) -> tuple[Array, Cache]:
    """Replace the `num_old` tokens after the prefix by the prompt, the same for all images."""
    if prompt_PD.shape[1] != x_BND.shape[2]:
        raise ValueError(f"prompt width {prompt_PD.shape[1]} is not the backbone's {x_BND.shape[2]}; pass a projection")
    prompt_BPD = np.broadcast_to(prompt_PD, (len(x_BND), *prompt_PD.shape))
    prefix_BRD, patches_BMD = x_BND[:, :num_prefix], x_BND[:, num_prefix + num_old :]
    out_BND = np.concatenate([prefix_BRD, prompt_BPD, patches_BMD], axis=1)
    return out_BND, (num_prefix, num_old, len(prompt_PD))


def place_prompts_backward(dout_BND: Array, cache: Cache) -> tuple[Array, Array]:
    """(gradient of the tokens, gradient of the prompt). The replaced tokens were not used: theirs is zero."""
    num_prefix, num_old, num_new = cache
    dreplaced_BPD = np.zeros((len(dout_BND), num_old, dout_BND.shape[2]))
    dprompt_BPD = dout_BND[:, num_prefix : num_prefix + num_new]
    dprefix_BRD, dpatches_BMD = dout_BND[:, :num_prefix], dout_BND[:, num_prefix + num_new :]
    return np.concatenate([dprefix_BRD, dreplaced_BPD, dpatches_BMD], axis=1), dprompt_BPD.sum(axis=0)


def projection_forward(value_Pd: Array, projection: tuple[Array, Array] | None) -> tuple[Array, Cache]:
    """P x d to P x D; the identity without a projection."""
    if projection is None:
        return value_Pd, None
    weight_Dd, bias_D = projection
    return linear_forward(value_Pd, _f64(weight_Dd), _f64(bias_D))


def projection_backward(dvalue_PD: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    return (dvalue_PD, {}) if cache is None else linear_backward(dvalue_PD, cache)


# ------------------------------------------------------------------------------------------------------------
# Images to tokens, tokens to one vector
# ------------------------------------------------------------------------------------------------------------


def embed_forward(images_BCSS: Array, w: Weights, config: Config) -> tuple[Array, Cache]:
    """Patch projection, prefix tokens in front, position embedding, `norm_pre` if present."""
    weight_DCGG = w["patch_embed.proj.weight"]
    side = config.patch_size
    if weight_DCGG.shape[2:] != (side, side):
        raise ValueError(f"patch_size {side} does not fit patch_embed.proj.weight of shape {weight_DCGG.shape}")
    B, _, height, width = images_BCSS.shape

    # Patches are numbered row by row; a patch is flattened channel first, as the convolution's kernel is.
    pixels = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            pixels.append(images_BCSS[:, :, top : top + side, left : left + side].reshape(B, -1))
    pixels_BMX = np.stack(pixels, axis=1)  # X = C * G * G
    kernel_DX = weight_DCGG.reshape(len(weight_DCGG), -1)
    patches_BMD, patch_cache = linear_forward(pixels_BMX, kernel_DX, w.get("patch_embed.proj.bias"))

    prefix_names = [name for name in ("cls_token", "reg_token") if name in w]
    prefix = [np.broadcast_to(w[name], (B, *w[name].shape[1:])) for name in prefix_names]
    num_prefix = sum(tokens.shape[1] for tokens in prefix)

    x_BND = np.concatenate([*prefix, patches_BMD], axis=1)
    if "pos_embed" in w:
        first = num_prefix if config.no_embed_class else 0  # the first token that has a position
        if w["pos_embed"].shape[1] != x_BND.shape[1] - first:
            raise ValueError(
                f"pos_embed has {w['pos_embed'].shape[1]} entries for {x_BND.shape[1] - first} tokens; "
                f"check no_embed_class and the image size"
            )
        x_BND[:, first:] += w["pos_embed"]
    x_BND, norm_cache = optional_norm_forward(x_BND, w, "norm_pre", config.eps)

    return x_BND, {
        "patch": patch_cache,
        "images_shape": images_BCSS.shape,
        "kernel_shape": weight_DCGG.shape,
        "prefix": [(name, w[name].shape[1]) for name in prefix_names],
        "num_prefix": num_prefix,
        "pos_shape": w["pos_embed"].shape if "pos_embed" in w else None,
        "norm": norm_cache,
    }


def embed_backward(dx_BND: Array, cache: Cache) -> tuple[dict[str, Array], Array]:
    """Gradients of the embedding's weights, and of the images that it was given."""
    dx_BND, norm_grads = optional_norm_backward(dx_BND, cache["norm"])
    grads = _named("norm_pre.", norm_grads)
    if cache["pos_shape"] is not None:
        grads["pos_embed"] = dx_BND[:, -cache["pos_shape"][1] :].sum(axis=0, keepdims=True)
    start = 0
    for name, count in cache["prefix"]:
        grads[name] = dx_BND[:, start : start + count].sum(axis=0, keepdims=True)
        start += count
    dpixels_BMX, patch_grads = linear_backward(dx_BND[:, cache["num_prefix"] :], cache["patch"])
    patch_grads["weight"] = patch_grads["weight"].reshape(cache["kernel_shape"])
    dimages_BCSS, side = np.zeros(cache["images_shape"]), cache["kernel_shape"][2]
    for patch, dpixels_BX in enumerate(dpixels_BMX.swapaxes(0, 1)):
        row, column = divmod(patch, dimages_BCSS.shape[3] // side)
        at = (slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
        dimages_BCSS[:, :, *at] = dpixels_BX.reshape(len(dpixels_BX), -1, side, side)
    return grads | _named("patch_embed.proj.", patch_grads), dimages_BCSS


def pool_forward(
    tokens_BND: Array, num_prefix: int, num_prompts: int, pooling: str, pool: str, *, has_class_token: bool
) -> tuple[Array, Cache]:
    """Tokens to one vector per image.

    original: the backbone's own pooling, which never looks at the prompts ('token': the class token, 'avg':
    the mean of the patches). img_pool: mean of the patches. prompt_pool: mean of the prompts. imgprompt_pool:
    mean of prompts and patches. Class token and registers are part of no mean.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is none of {', '.join(POOLINGS)}")
    if pool not in ("token", "avg"):
        raise ValueError(f"pool {pool!r} is neither 'token' nor 'avg'")
    if pooling == "original" and pool == "token" and not has_class_token:
        raise ValueError("pool 'token' needs a cls_token; use 'avg' for this backbone")
    if pooling == "prompt_pool" and num_prompts == 0:
        raise ValueError("prompt_pool needs prompts among the last block's tokens")

    N = tokens_BND.shape[1]
    prompts = slice(num_prefix, num_prefix + num_prompts)
    patches = slice(num_prefix + num_prompts, N)
    averaged = {
        "original": slice(0, 1) if pool == "token" else patches,
        "img_pool": patches,
        "prompt_pool": prompts,
        "imgprompt_pool": slice(num_prefix, N),
    }[pooling]
    return tokens_BND[:, averaged].mean(axis=1), (averaged, tokens_BND.shape)


def pool_backward(dpooled_BD: Array, cache: Cache) -> Array:
    averaged, shape = cache
    dtokens_BND = np.zeros(shape)
    count = len(range(*averaged.indices(shape[1])))
    dtokens_BND[:, averaged] = dpooled_BD[:, None] / count
    return dtokens_BND


# ------------------------------------------------------------------------------------------------------------
# One block; its weights are named as in timm, without the "blocks.<l>." in front
# ------------------------------------------------------------------------------------------------------------


def block_forward(
    x_BND: Array, w: Weights, config: Config, mask_NN: Array | None = None, patches: slice = slice(0, 0)
) -> tuple[Array, Cache]:
    """x' = x + a(ls1(attn(norm1(x)))), then x' + m(ls2(mlp(norm2(x')))) + b(x'), with adapters a, m and b where the
    block has them. mask_NN and patches: see `attention_forward`.
    """
    normed_BND, norm1_cache = norm_forward(x_BND, w["norm1.weight"], w["norm1.bias"], config.eps)
    attended_BND, attn_cache = attention_forward(normed_BND, _local(w, "attn."), config, mask_NN, patches)
    scaled_BND, ls1_cache = layer_scale_forward(attended_BND, w.get("ls1.gamma", w.get("gamma_1")))
    branch_BND, after_attn_cache = after_forward(scaled_BND, _local(w, "adapter_attn."))
    middle_BND = residual(x_BND, branch_BND)

    normed_BND, norm2_cache = norm_forward(middle_BND, w["norm2.weight"], w["norm2.bias"], config.eps)
    mixed_BND, mlp_cache = mlp_forward(normed_BND, _local(w, "mlp."), config.eps)
    scaled_BND, ls2_cache = layer_scale_forward(mixed_BND, w.get("ls2.gamma", w.get("gamma_2")))
    branch_BND, after_mlp_cache = after_forward(scaled_BND, _local(w, "adapter_mlp."))
    out_BND, beside_cache = residual(middle_BND, branch_BND), None
    if "adapter_beside.down.weight" in w:
        beside_BND, beside_cache = adapter_forward(middle_BND, _local(w, "adapter_beside."), relu=True)
        out_BND = out_BND + config.beside_scale * beside_BND
    names = ("ls1.gamma", "ls2.gamma") if "ls1.gamma" in w else ("gamma_1", "gamma_2")
    first = (names, norm1_cache, attn_cache, ls1_cache, after_attn_cache)
    return out_BND, (*first, norm2_cache, mlp_cache, ls2_cache, after_mlp_cache, config.beside_scale, beside_cache)


def block_backward(dout_BND: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    (ls1, ls2), norm1_cache, attn_cache, ls1_cache, after_attn_cache, norm2_cache, mlp_cache, ls2_cache, *last = cache
    after_mlp_cache, beside_scale, beside_cache = last
    dscaled_BND, after_mlp_grads = after_backward(dout_BND, after_mlp_cache)
    dmixed_BND, ls2_grads = layer_scale_backward(dscaled_BND, ls2_cache)
    dnormed_BND, mlp_grads = mlp_backward(dmixed_BND, mlp_cache)
    dbranch_BND, norm2_grads = norm_backward(dnormed_BND, norm2_cache)
    dmiddle_BND, beside_grads = residual(dout_BND, dbranch_BND), {}
    if beside_cache is not None:
        dbeside_BND, beside_grads = adapter_backward(beside_scale * dout_BND, beside_cache)
        dmiddle_BND = dmiddle_BND + dbeside_BND

    dscaled_BND, after_attn_grads = after_backward(dmiddle_BND, after_attn_cache)
    dattended_BND, ls1_grads = layer_scale_backward(dscaled_BND, ls1_cache)
    dnormed_BND, attn_grads = attention_backward(dattended_BND, attn_cache)
    dbranch_BND, norm1_grads = norm_backward(dnormed_BND, norm1_cache)
    grads = (
        _named("norm1.", norm1_grads)
        | _named("attn.", attn_grads)
        | _renamed(ls1_grads, ls1)
        | _named("norm2.", norm2_grads)
        | _named("mlp.", mlp_grads)
        | _renamed(ls2_grads, ls2)
        | _named("adapter_attn.", after_attn_grads)
        | _named("adapter_mlp.", after_mlp_grads)
        | _named("adapter_beside.", beside_grads)
    )
    return dmiddle_BND + dbranch_BND, grads


def _renamed(grads: Mapping[str, Array], name: str) -> dict[str, Array]:
    """The only gradient, if there is one, under a name."""
    return {name: grads["gamma"]} if grads else {}


def residual(x_BND: Array, branch_BND: Array) -> Array:
    """The sum of a stream and a branch: a function of its own, so that rounding.py can round what it gives."""
    return x_BND + branch_BND


def adapter_forward(x_BND: Array, w: Weights, *, relu: bool) -> tuple[Array, Cache]:
    """up(GELU(down(x))), or with ReLU in its place."""
    hidden_BNr, down_cache = linear_forward(x_BND, w["down.weight"], w["down.bias"])
    if relu:
        active_BNr, active_cache = np.maximum(hidden_BNr, 0.0), None
    else:
        active_BNr, active_cache = gelu_forward(hidden_BNr)
    out_BND, up_cache = linear_forward(active_BNr, w["up.weight"], w["up.bias"])
    return out_BND, (down_cache, hidden_BNr, active_cache, up_cache)


def adapter_backward(dout_BND: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    down_cache, hidden_BNr, active_cache, up_cache = cache
    dactive_BNr, up_grads = linear_backward(dout_BND, up_cache)
    relu = active_cache is None
    dhidden_BNr = dactive_BNr * (hidden_BNr > 0) if relu else gelu_backward(dactive_BNr, active_cache)
    dx_BND, down_grads = linear_backward(dhidden_BNr, down_cache)
    return dx_BND, _named("down.", down_grads) | _named("up.", up_grads)


def after_forward(branch_BND: Array, w: Weights) -> tuple[Array, Cache]:
    """A branch with its adapter behind it, h + adapter(h); the branch alone where `w` is empty."""
    if not w:
        return branch_BND, None
    out_BND, cache = adapter_forward(branch_BND, w, relu=False)
    return branch_BND + out_BND, cache


def after_backward(dout_BND: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    if cache is None:
        return dout_BND, {}
    dbranch_BND, grads = adapter_backward(dout_BND, cache)
    return dout_BND + dbranch_BND, grads


def attention_forward(
    x_BND: Array, w: Weights, config: Config, mask_NN: Array | None = None, patches: slice = slice(0, 0)
) -> tuple[Array, Cache]:
    """Softmax attention, one head after the other; q_norm and k_norm act on E and serve all heads.

    mask_NN (row: who asks, column: who is asked) is added to the scores: 0, or -inf where it may not look.
    patches: the tokens whose queries and keys `config.rotary` turns.
    """
    D = x_BND.shape[2]
    if D % config.num_heads:
        raise ValueError(f"width {D} is not divisible by num_heads {config.num_heads}")
    E = D // config.num_heads
    scale = 1.0 / math.sqrt(E)

    qkv_BNX, qkv_cache = projections_forward(x_BND, w)  # X = 3 * D: all q, all k, all v
    head_outputs, head_caches = [], []
    for head in range(config.num_heads):
        columns = [slice(part * D + head * E, part * D + (head + 1) * E) for part in range(3)]
        q_BNE, k_BNE, v_BNE = (qkv_BNX[:, :, column] for column in columns)
        q_BNE, q_cache = optional_norm_forward(q_BNE, w, "q_norm", config.eps)
        k_BNE, k_cache = optional_norm_forward(k_BNE, w, "k_norm", config.eps)
        q_turn = k_turn = None
        if config.rotary is not None:
            q_BNE, q_turn = rotate_forward(q_BNE, config.rotary, patches)
            k_BNE, k_turn = rotate_forward(k_BNE, config.rotary, patches)
        score_BNN = scale * q_BNE @ k_BNE.transpose(0, 2, 1)
        prob_BNN = softmax(score_BNN if mask_NN is None else score_BNN + mask_NN)
        head_outputs.append(prob_BNN @ v_BNE)
        head_caches.append((columns, q_BNE, k_BNE, v_BNE, (q_cache, q_turn), (k_cache, k_turn), prob_BNN))
    inner_BND, inner_cache = optional_norm_forward(np.concatenate(head_outputs, axis=2), w, "norm", config.eps)
    out_BND, proj_cache = linear_forward(inner_BND, w["proj.weight"], w.get("proj.bias"))
    return out_BND, (scale, qkv_cache, qkv_BNX.shape, head_caches, inner_cache, proj_cache)


def attention_backward(dout_BND: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    scale, qkv_cache, qkv_shape, head_caches, inner_cache, proj_cache = cache
    dinner_BND, proj_grads = linear_backward(dout_BND, proj_cache)
    dheads_BND, inner_grads = optional_norm_backward(dinner_BND, inner_cache)
    dqkv_BNX = np.zeros(qkv_shape)
    grads = _named("proj.", proj_grads) | _named("norm.", inner_grads)
    for columns, q_BNE, k_BNE, v_BNE, q_caches, k_caches, prob_BNN in head_caches:
        dhead_BNE = dheads_BND[:, :, columns[0]]  # a head's output lies where its query lies: part 0
        dv_BNE = prob_BNN.transpose(0, 2, 1) @ dhead_BNE
        dprob_BNN = dhead_BNE @ v_BNE.transpose(0, 2, 1)
        # Softmax: ds_j = p_j * (dp_j - sum_i p_i dp_i), within each query's row.
        dscore_BNN = prob_BNN * (dprob_BNN - (prob_BNN * dprob_BNN).sum(axis=2, keepdims=True))
        dq_BNE, q_grads = _query_backward(scale * dscore_BNN @ k_BNE, q_caches)
        dk_BNE, k_grads = _query_backward(scale * dscore_BNN.transpose(0, 2, 1) @ q_BNE, k_caches)
        for name, grad in (_named("q_norm.", q_grads) | _named("k_norm.", k_grads)).items():
            grads[name] = grads.get(name, 0.0) + grad  # the heads share these weights
        for column, dpart_BNE in zip(columns, (dq_BNE, dk_BNE, dv_BNE), strict=True):
            dqkv_BNX[:, :, column] = dpart_BNE
    dx_BND, qkv_grads = projections_backward(dqkv_BNX, qkv_cache)
    return dx_BND, grads | qkv_grads


def _query_backward(dturned_BNE: Array, caches: tuple[Cache, Cache]) -> tuple[Array, dict[str, Array]]:
    """Back through the turn and the norm of one head's queries, or keys."""
    norm_cache, turn = caches
    return optional_norm_backward(dturned_BNE if turn is None else rotate_backward(dturned_BNE, turn), norm_cache)


def projections_forward(x_BND: Array, w: Weights) -> tuple[Array, Cache]:
    """Queries, keys and values side by side, from one layer or from three."""
    if "qkv.weight" in w:
        out_BNX, cache = linear_forward(x_BND, w["qkv.weight"], joint_bias(w))
        return out_BNX, (w, cache)
    found = [linear_forward(x_BND, w[f"{part}_proj.weight"], w.get(f"{part}_proj.bias")) for part in "qkv"]
    return np.concatenate([out_BND for out_BND, _ in found], axis=2), (w, [cache for _, cache in found])


def projections_backward(dout_BNX: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    w, caches = cache
    if "qkv.weight" in w:
        dx_BND, grads = linear_backward(dout_BNX, caches)
        return dx_BND, {"qkv.weight": grads["weight"]} | bias_grads(w, grads.get("bias"))
    dx_BND, named = 0.0, {}
    for part, dpart_BND, of_part in zip("qkv", np.split(dout_BNX, 3, axis=2), caches, strict=True):
        dinput_BND, grads = linear_backward(dpart_BND, of_part)
        dx_BND, named = residual(dx_BND, dinput_BND), named | _named(f"{part}_proj.", grads)
    return dx_BND, named


def mlp_forward(x_BND: Array, w: Weights, eps: float) -> tuple[Array, Cache]:
    """fc2(norm(gelu(fc1(x)))), or with silu(gate(x)) * value(x) in place of the GELU; the norm where there is one."""
    if is_swiglu(w):
        active_BNF, inner_cache = swiglu_forward(x_BND, w)
    else:
        hidden_BNF, fc1_cache = linear_forward(x_BND, w["fc1.weight"], w.get("fc1.bias"))
        active_BNF, gelu_cache = gelu_forward(hidden_BNF)
        inner_cache = (fc1_cache, gelu_cache)
    normed_BNF, norm_cache = optional_norm_forward(active_BNF, w, "norm", eps)
    out_BND, fc2_cache = linear_forward(normed_BNF, w["fc2.weight"], w.get("fc2.bias"))
    return out_BND, (is_swiglu(w), inner_cache, norm_cache, fc2_cache)


def mlp_backward(dout_BND: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    swiglu, inner_cache, norm_cache, fc2_cache = cache
    dnormed_BNF, fc2_grads = linear_backward(dout_BND, fc2_cache)
    dactive_BNF, norm_grads = optional_norm_backward(dnormed_BNF, norm_cache)
    if swiglu:
        dx_BND, inner_grads = swiglu_backward(dactive_BNF, inner_cache)
    else:
        fc1_cache, gelu_cache = inner_cache
        dx_BND, fc1_grads = linear_backward(gelu_backward(dactive_BNF, gelu_cache), fc1_cache)
        inner_grads = _named("fc1.", fc1_grads)
    return dx_BND, inner_grads | _named("norm.", norm_grads) | _named("fc2.", fc2_grads)


def swiglu_forward(x_BND: Array, w: Weights) -> tuple[Array, Cache]:
    """silu(gate(x)) * value(x), with gate and value two layers, or the first and the last rows of one."""
    if "fc1_g.weight" in w:
        gate_BNF, gate_cache = linear_forward(x_BND, w["fc1_g.weight"], w.get("fc1_g.bias"))
        value_BNF, value_cache = linear_forward(x_BND, w["fc1_x.weight"], w.get("fc1_x.bias"))
        caches = (gate_cache, value_cache)
    else:
        both_BNX, cache = linear_forward(x_BND, w["fc1.weight"], w.get("fc1.bias"))
        (gate_BNF, value_BNF), caches = np.split(both_BNX, 2, axis=2), (cache,)
    active_BNF, silu_cache = silu_forward(gate_BNF)
    return product(active_BNF, value_BNF), (caches, active_BNF, value_BNF, silu_cache)


def swiglu_backward(dout_BNF: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    caches, active_BNF, value_BNF, silu_cache = cache
    dgate_BNF = silu_backward(product(dout_BNF, value_BNF), silu_cache)
    dvalue_BNF = product(dout_BNF, active_BNF)
    if len(caches) == 1:
        dx_BND, grads = linear_backward(np.concatenate([dgate_BNF, dvalue_BNF], axis=2), caches[0])
        return dx_BND, _named("fc1.", grads)
    of_gate_BND, gate_grads = linear_backward(dgate_BNF, caches[0])
    of_value_BND, value_grads = linear_backward(dvalue_BNF, caches[1])
    return residual(of_gate_BND, of_value_BND), _named("fc1_g.", gate_grads) | _named("fc1_x.", value_grads)


# ------------------------------------------------------------------------------------------------------------
# Elementary functions; "..." is any number of leading axes
# ------------------------------------------------------------------------------------------------------------


def linear_forward(x: Array, weight: Array, bias: Array | None) -> tuple[Array, Cache]:
    """x (..., in) to (..., out); weight is out x in."""
    out = x @ weight.T
    return (out if bias is None else out + bias), (x, weight, bias is not None)


def linear_backward(dout: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    x, weight, has_bias = cache
    rows_out, rows_in = dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
    grads = {"weight": rows_out.T @ rows_in}
    if has_bias:
        grads["bias"] = rows_out.sum(axis=0)
    return dout @ weight, grads


def norm_forward(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Cache]:
    """LayerNorm over the last axis, with the biased variance."""
    centered = x - x.mean(axis=-1, keepdims=True)
    rstd = 1.0 / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + eps)
    unit = centered * rstd
    return unit * weight + bias, (unit, rstd, weight)


def norm_backward(dout: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    unit, rstd, weight = cache
    leading = tuple(range(dout.ndim - 1))
    grads = {"weight": (dout * unit).sum(axis=leading), "bias": dout.sum(axis=leading)}
    dunit = dout * weight
    # Mean and variance depend on x: they take out of dunit what is constant and what is along unit.
    constant = dunit.mean(axis=-1, keepdims=True)
    along = (dunit * unit).mean(axis=-1, keepdims=True)
    return rstd * (dunit - constant - unit * along), grads


def optional_norm_forward(x: Array, w: Weights, name: str, eps: float) -> tuple[Array, Cache]:
    """LayerNorm `name` where the backbone has it, else the identity."""
    if f"{name}.weight" not in w:
        return x, None
    return norm_forward(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def optional_norm_backward(dout: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    return (dout, {}) if cache is None else norm_backward(dout, cache)


def layer_scale_forward(x_BND: Array, gamma_D: Array | None) -> tuple[Array, Cache]:
    return (x_BND, None) if gamma_D is None else (x_BND * gamma_D, (x_BND, gamma_D))


def layer_scale_backward(dout_BND: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    if cache is None:
        return dout_BND, {}
    x_BND, gamma_D = cache
    return dout_BND * gamma_D, {"gamma": (dout_BND * x_BND).sum(axis=(0, 1))}


def gelu_forward(x: Array) -> tuple[Array, Cache]:
    """x * Phi(x) with the exact normal distribution function, not its tanh approximation."""
    cdf = 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))
    return x * cdf, (x, cdf)


def gelu_backward(dout: Array, cache: Cache) -> Array:
    x, cdf = cache
    density = np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)
    return dout * (cdf + x * density)


def softmax(scores: Array) -> Array:
    """Over the last axis; the maximum is taken off first, which changes nothing but avoids overflow."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def cross_entropy(
    logits_BK: Array, labels_B: Array, *, smoothing: float = 0.0, example_weight: Array | None = None
) -> tuple[float, Array]:
    """(loss, gradient of the logits) of sum(w_i * ce_i) / sum(w_i).

    The target of image i is (1 - smoothing) at its label plus smoothing / K at every class. The weight is per
    image and multiplies all of ce_i; to weight classes, pass class_weight[labels].
    """
    B, K = logits_BK.shape
    weight_B = np.ones(B) if example_weight is None else _f64(example_weight)
    if weight_B.shape != (B,) or weight_B.sum() <= 0:
        raise ValueError(f"example_weight of shape {weight_B.shape}, sum {weight_B.sum()}; need ({B},), sum > 0")
    share_B1 = (weight_B / weight_B.sum())[:, None]

    target_BK = np.full((B, K), smoothing / K)
    target_BK[np.arange(B), labels_B] += 1.0 - smoothing
    shifted_BK = logits_BK - logits_BK.max(axis=1, keepdims=True)
    log_prob_BK = shifted_BK - np.log(np.exp(shifted_BK).sum(axis=1, keepdims=True))
    loss = -float((share_B1 * target_BK * log_prob_BK).sum())
    return loss, share_B1 * (np.exp(log_prob_BK) - target_BK)


# ------------------------------------------------------------------------------------------------------------
# Names and checks
# ------------------------------------------------------------------------------------------------------------


def depth_of(weights: Weights) -> int:
    """Number of blocks in a timm state dict."""
    return 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))


def _check_names(weights: Weights) -> None:
    unknown = sorted(name for name in weights if not _KNOWN_NAMES.fullmatch(name))
    if unknown:
        raise ValueError(f"weights that this reference does not compute with: {', '.join(unknown)}")


def _check_prompts(prompts: Prompts, depth: int) -> None:
    outside = sorted(block for block in prompts.at if not 0 <= block < depth)
    if outside:
        raise ValueError(f"prompts before blocks {outside}, but the backbone has blocks 0..{depth - 1}")
    if set(prompts.at.values()) != set(range(len(prompts.values))):
        raise ValueError(f"{len(prompts.values)} prompt values, but the blocks use {dict(prompts.at)}")


def _local(weights: Weights, prefix: str) -> dict[str, Array]:
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def _named(prefix: str, grads: Mapping[str, Array]) -> dict[str, Array]:
    return {prefix + name: grad for name, grad in grads.items()}


def _f64(values: Array) -> Array:
    return np.asarray(values, np.float64)
