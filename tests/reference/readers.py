"""Readers of all blocks in plain NumPy float64, with derivatives written by hand.

Each reader is computed alone and image by image where that is plainer, from the tokens between the backbone's blocks,
which `token_stream` computes with vit.py. Shape letters: those of vit.py, and
    W width of a reader's tokens    r rank    A = 1 + M or N tokens of a reader    J blocks that are read
"""

from collections.abc import Sequence

import numpy as np

from tests.reference.vit import Array, Cache, Config, Weights

from . import vit

EPS = 1e-5  # of the readers' own norms
UNIT_EPS = 1e-12  # of what is standardized without weights


def token_stream(weights: Weights, config: Config, images_u8: Array) -> list[Array]:
    """L + 1 arrays B x N x D: the tokens before each block, and after the last one without `norm`."""
    images_BCSS = vit.normalize_images(images_u8, config.mean, config.std)
    x_BND, embedded = vit.embed_forward(images_BCSS, weights, config)
    states, patches = [x_BND], slice(embedded["num_prefix"], None)
    for block in range(vit.depth_of(weights)):
        x_BND, _ = vit.block_forward(x_BND, vit._local(weights, f"blocks.{block}."), config, patches=patches)
        states.append(x_BND)
    return states


def linear(features_BF: Array, labels_B: Array, weights: Weights, share: Array, smoothing: float) -> vit.Result:
    """Loss of one batch and the gradients of a linear head on given features."""
    logits_BK, head = vit.linear_forward(features_BF, weights["head.weight"], weights["head.bias"])
    loss, dlogits_BK = vit.cross_entropy(logits_BK, labels_B, smoothing=smoothing, example_weight=share)
    grads = vit._named("head.", vit.linear_backward(dlogits_BK, head)[1])
    return vit.Result(logits=logits_BK, loss=loss, features=features_BF, tokens=np.zeros(0), grads=grads)


def combo(
    inputs: Sequence[Array],
    direct: Sequence[Array],
    labels_B: Array,
    weights: Weights,
    *,
    depth: int,
    heads: int,
    smoothing: float,
    share: Array,
) -> vit.Result:
    """Loss of one batch and its gradients.

    inputs: J arrays B x M x D, standardized. direct: what the head reads besides, arrays B x D. weights: projection,
    class_token (1 x W), positions (A x W), layers.<i>.<norm1, qkv, proj, norm2, fc1, fc2>, norm and head. share: of
    each image in the loss.
    """
    joined_BMF = np.concatenate(inputs, axis=2)
    narrow_BMW, projection = vit.linear_forward(joined_BMF, weights["projection.weight"], weights["projection.bias"])
    first_B1W = np.repeat(weights["class_token"][None], len(narrow_BMW), axis=0)
    x_BAW = np.concatenate([first_B1W, narrow_BMW], axis=1) + weights["positions"]
    layers = []
    for number in range(depth):
        x_BAW, cache = layer_forward(x_BAW, vit._local(weights, f"layers.{number}."), heads)
        layers.append(cache)
    features_BW, norm = vit.norm_forward(x_BAW[:, 0], weights["norm.weight"], weights["norm.bias"], EPS)
    joined_BX = np.concatenate([features_BW, *direct], axis=1)
    logits_BK, head = vit.linear_forward(joined_BX, weights["head.weight"], weights["head.bias"])
    loss, dlogits_BK = vit.cross_entropy(logits_BK, labels_B, smoothing=smoothing, example_weight=share)

    djoined_BX, of_head = vit.linear_backward(dlogits_BK, head)
    grads = vit._named("head.", of_head)
    dx_BAW = np.zeros(x_BAW.shape)
    dx_BAW[:, 0], of_norm = vit.norm_backward(djoined_BX[:, : features_BW.shape[1]], norm)
    grads |= vit._named("norm.", of_norm)
    for number, cache in reversed(list(enumerate(layers))):
        dx_BAW, of_layer = layer_backward(dx_BAW, cache)
        grads |= vit._named(f"layers.{number}.", of_layer)
    grads["positions"] = dx_BAW.sum(axis=0)
    grads["class_token"] = dx_BAW[:, :1].sum(axis=0)
    _, of_projection = vit.linear_backward(dx_BAW[:, 1:], projection)
    grads |= vit._named("projection.", of_projection)
    return vit.Result(logits=logits_BK, loss=loss, features=features_BW, tokens=x_BAW, grads=grads)


def ladder(
    states: Sequence[Array],
    pooled_BD: Array,
    token: slice,
    labels_B: Array,
    weights: Weights,
    *,
    kind: str,
    heads: int,
    smoothing: float,
    share: Array,
) -> vit.Result:
    """Loss of one batch and its gradients.

    states: L + 1 arrays B x N x D, as `token_stream` gives them. pooled_BD: the backbone's features, as the head reads
    them. token: the tokens whose mean is the reader's pooling. share: of each image in the loss.
    """
    units = [unit(state_BND) for state_BND in states]
    climb, descend = (_lst_forward, _lst_backward) if kind == "lst" else (_last_forward, _last_backward)
    correction_BD, cache = climb(units, token, weights, heads)
    features_BD = pooled_BD + correction_BD
    logits_BK, head = vit.linear_forward(features_BD, weights["head.weight"], weights["head.bias"])
    loss, dlogits_BK = vit.cross_entropy(logits_BK, labels_B, smoothing=smoothing, example_weight=share)
    dfeatures_BD, of_head = vit.linear_backward(dlogits_BK, head)
    grads = vit._named("head.", of_head) | descend(dfeatures_BD, token, cache)
    return vit.Result(logits=logits_BK, loss=loss, features=features_BD, tokens=np.zeros(0), grads=grads)


def _lst_forward(units: Sequence[Array], token: slice, weights: Weights, heads: int) -> tuple[Array, Cache]:
    y_BNW, rungs = 0.0, []
    for number, unit_BND in enumerate(units[1:]):
        gate = 1.0 / (1.0 + np.exp(-float(weights["gates"][number])))
        below_BNW = y_BNW
        down_BNW, down = vit.linear_forward(unit_BND, weights[f"down.{number}.weight"], weights[f"down.{number}.bias"])
        mixed_BNW = gate * down_BNW + (1.0 - gate) * below_BNW
        y_BNW, layer = layer_forward(mixed_BNW, vit._local(weights, f"layers.{number}."), heads)
        rungs.append((gate, down_BNW, below_BNW, down, layer))
    normed_BNW, norm = vit.norm_forward(y_BNW, weights["norm.weight"], weights["norm.bias"], EPS)
    correction_BD, up = vit.linear_forward(normed_BNW[:, token].mean(axis=1), weights["up.weight"], weights["up.bias"])
    return correction_BD, (rungs, normed_BNW.shape, norm, up)


def _lst_backward(dcorrection_BD: Array, token: slice, cache: Cache) -> dict[str, Array]:
    rungs, shape, norm, up = cache
    dpooled_BW, of_up = vit.linear_backward(dcorrection_BD, up)
    dy_BNW, of_norm = vit.norm_backward(_spread(dpooled_BW, token, shape), norm)
    grads = vit._named("up.", of_up) | vit._named("norm.", of_norm)
    dgates = np.zeros(len(rungs))
    for number, (gate, down_BNW, below_BNW, down, layer) in reversed(list(enumerate(rungs))):
        dmixed_BNW, of_layer = layer_backward(dy_BNW, layer)
        dgates[number] = (dmixed_BNW * (down_BNW - below_BNW)).sum() * gate * (1.0 - gate)
        _, of_down = vit.linear_backward(gate * dmixed_BNW, down)
        grads |= vit._named(f"layers.{number}.", of_layer) | vit._named(f"down.{number}.", of_down)
        dy_BNW = (1.0 - gate) * dmixed_BNW
    return grads | {"gates": dgates}


def _last_forward(units: Sequence[Array], token: slice, weights: Weights, heads: int) -> tuple[Array, Cache]:
    """With the published sum of the states before the last one taken off at the end, not left out on the way."""
    u_BND, rungs = units[0], []
    for number, unit_BND in enumerate(units[1:]):
        w = vit._local(weights, f"layers.{number}.")
        normed_BND, norm = vit.norm_forward(u_BND, w["norm.weight"], w["norm.bias"], EPS)
        change_BND, attention = _attention_forward(normed_BND, w["qkv.weight"], None, w["up.weight"], None, heads)
        u_BND = unit_BND + u_BND + change_BND
        rungs.append((norm, attention))
    correction_BND = u_BND - sum(units)  # all but what the attentions changed
    return correction_BND[:, token].mean(axis=1), (rungs, u_BND.shape)


def _last_backward(dcorrection_BD: Array, token: slice, cache: Cache) -> dict[str, Array]:
    rungs, shape = cache
    du_BND = _spread(dcorrection_BD, token, shape)
    grads: dict[str, Array] = {}
    for number, (norm, attention) in reversed(list(enumerate(rungs))):
        dnormed_BND, of_attention = _attention_backward(du_BND, attention)
        dinput_BND, of_norm = vit.norm_backward(dnormed_BND, norm)
        du_BND = du_BND + dinput_BND
        own = {"qkv.weight": of_attention["qkv.weight"], "up.weight": of_attention["proj.weight"]}
        grads |= vit._named(f"layers.{number}.", own | vit._named("norm.", of_norm))
    return grads


def unit(x: Array) -> Array:
    """Each token with mean 0 and deviation 1."""
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + UNIT_EPS)


def sum_of_units(states: Sequence[Array]) -> Array:
    """One map: the sum of all states, whose tokens have mean 0 and deviation 1."""
    total = np.zeros(states[0].shape)
    for state in states:
        total = total + unit(state)
    return total


def per_channel(seen: Array, x: Array) -> Array:
    """Each channel of x with the mean and deviation of the tokens seen (... x D); none here hardly varies."""
    flat = seen.reshape(-1, seen.shape[-1])
    return (x - flat.mean(axis=0)) / np.sqrt(((flat - flat.mean(axis=0)) ** 2).mean(axis=0))


def resample(x_BMD: Array, grid: int) -> Array:
    """Patches of a square map to a grid x grid map: each new one's center lies between four old ones, whose weights
    fall linearly with the distance along each axis; outside the outermost centers the map is constant.
    """
    side = round(np.sqrt(x_BMD.shape[1]))
    out = np.zeros((len(x_BMD), grid * grid, x_BMD.shape[2]))

    def neighbors(i: int) -> list[tuple[int, float]]:
        at = min(max((i + 0.5) * side / grid - 0.5, 0.0), side - 1.0)
        low = int(np.floor(at))
        return [(low, 1.0 - (at - low)), (min(low + 1, side - 1), at - low)]

    for i in range(grid):
        for j in range(grid):
            for row, of_row in neighbors(i):
                for column, of_column in neighbors(j):
                    out[:, i * grid + j] += of_row * of_column * x_BMD[:, row * side + column]
    return out


def maps_on_one_grid(
    each: Sequence[Sequence[Array]], prefixes: Sequence[int], *, grid: int, tokens: str, summed: bool, by_token: bool
) -> list[Array]:
    """Combo's inputs from several backbones, in their order: all maps on one grid, standardized.

    each: of each backbone the outputs of the blocks that are read, B x N x D. prefixes: tokens before the patches of
    each, which `tokens = all` keeps.
    """
    found = []
    for states, prefix in zip(each, prefixes, strict=True):
        for state in [sum_of_units(states)] if summed else states:
            patches = resample(state[:, prefix:], grid)
            kept = np.concatenate([state[:, :prefix], patches], axis=1) if tokens == "all" else patches
            found.append(unit(kept) if by_token else per_channel(kept, kept))
    return found


def group_penalty(weight_WF: Array, columns: Sequence[int], rate: float) -> tuple[float, Array]:
    """rate times the sum of the Frobenius norms of groups of columns, and its gradient."""
    value, grad_WF, start = 0.0, np.zeros(weight_WF.shape), 0
    for number in columns:
        part = weight_WF[:, start : start + number]
        norm = np.sqrt((part**2).sum())
        value += rate * norm
        grad_WF[:, start : start + number] = rate * part / norm
        start += number
    return value, grad_WF


def layer_forward(x_BNW: Array, w: Weights, heads: int) -> tuple[Array, Cache]:
    normed, norm1 = vit.norm_forward(x_BNW, w["norm1.weight"], w["norm1.bias"], EPS)
    attended, attention = _attention_forward(
        normed, w["qkv.weight"], w["qkv.bias"], w["proj.weight"], w["proj.bias"], heads
    )
    x_BNW = x_BNW + attended
    normed, norm2 = vit.norm_forward(x_BNW, w["norm2.weight"], w["norm2.bias"], EPS)
    out, mlp = vit.mlp_forward(normed, w, EPS)
    return x_BNW + out, (norm1, attention, norm2, mlp)


def layer_backward(dout_BNW: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    norm1, attention, norm2, mlp = cache
    dnormed, grads = vit.mlp_backward(dout_BNW, mlp)
    dbranch, of_norm2 = vit.norm_backward(dnormed, norm2)
    dx_BNW = dout_BNW + dbranch
    dnormed, of_attention = _attention_backward(dx_BNW, attention)
    dbranch, of_norm1 = vit.norm_backward(dnormed, norm1)
    grads |= of_attention | vit._named("norm1.", of_norm1) | vit._named("norm2.", of_norm2)
    return dx_BNW + dbranch, grads


def _attention_forward(  # noqa: PLR0917 (the two layers' weights)
    x_BNI: Array, qkv: Array, qkv_bias: Array | None, out: Array, out_bias: Array | None, heads: int
) -> tuple[Array, Cache]:
    """Head by head; the inner width is a third of qkv's rows, whatever the tokens' width."""
    inner = len(qkv) // 3
    each = inner // heads
    all_BNX, qkv_cache = vit.linear_forward(x_BNI, qkv, qkv_bias)
    outputs, caches = [], []
    for head in range(heads):
        columns = [slice(part * inner + head * each, part * inner + (head + 1) * each) for part in range(3)]
        q, k, v = (all_BNX[:, :, c] for c in columns)
        probability = vit.softmax(q @ k.transpose(0, 2, 1) / np.sqrt(each))
        outputs.append(probability @ v)
        caches.append((columns, q, k, v, probability))
    result, out_cache = vit.linear_forward(np.concatenate(outputs, axis=2), out, out_bias)
    return result, (qkv_cache, all_BNX.shape, caches, out_cache)


def _attention_backward(dout: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    qkv_cache, shape, caches, out_cache = cache
    dheads, of_out = vit.linear_backward(dout, out_cache)
    dall = np.zeros(shape)
    for head, (columns, q, k, v, probability) in enumerate(caches):
        each = q.shape[2]
        dhead = dheads[:, :, head * each : (head + 1) * each]
        dprobability = dhead @ v.transpose(0, 2, 1)
        dscore = probability * (dprobability - (probability * dprobability).sum(axis=2, keepdims=True))
        dall[:, :, columns[0]] = dscore @ k / np.sqrt(each)
        dall[:, :, columns[1]] = dscore.transpose(0, 2, 1) @ q / np.sqrt(each)
        dall[:, :, columns[2]] = probability.transpose(0, 2, 1) @ dhead
    dx, of_qkv = vit.linear_backward(dall, qkv_cache)
    return dx, vit._named("qkv.", of_qkv) | vit._named("proj.", of_out)


def _spread(dpooled_BW: Array, token: slice, shape: tuple[int, ...]) -> Array:
    """Backward of the mean of some tokens."""
    dtokens_BNW = np.zeros(shape)
    dtokens_BNW[:, token] = dpooled_BW[:, None] / dtokens_BNW[:, token].shape[1]
    return dtokens_BNW
