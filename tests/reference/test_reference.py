"""The reference against finite differences, against timm with autograd, and against PyTorch's optimizers.

Shape letters: see vit.py. Tiny sizes: D = 8, H = 2, L = 3, M = 4 patches of 2 x 2 pixels, K = 5, B = 3.
"""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from tests.evas import EVAS, REFERENCE

from . import inside, optim, schedule, vit

WIDTH, HEADS, DEPTH, SIDE, PATCH, CLASSES, BATCH = 8, 2, 3, 4, 2, 5, 3
PROMPTS, NARROW = 2, 3  # P, and d where a projection widens the prompts

BACKBONES = {
    "plain": {},
    "no_qkv_bias": {"qkv_bias": False},
    "registers": {"reg_tokens": 2},
    "registers_without_position": {"reg_tokens": 2, "no_embed_class": True},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"init_values": 0.1},
    "pre_norm": {"pre_norm": True},
    "token_fc_norm": {"fc_norm": True},
    "avg_fc_norm": {"global_pool": "avg"},
    "avg_norm": {"global_pool": "avg", "fc_norm": False},
    "avg_no_class": {"global_pool": "avg", "class_token": False},
    "avg_no_class_registers": {"global_pool": "avg", "class_token": False, "reg_tokens": 1, "fc_norm": False},
    "everything": {
        "reg_tokens": 2,
        "no_embed_class": True,
        "qk_norm": True,
        "init_values": 0.1,
        "pre_norm": True,
    },
} | EVAS
# timm has the sines and cosines of rotary positions in float32, whatever the weights are.
TOLERANCE = dict.fromkeys(REFERENCE, 1e-6)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny(name):
    """(timm model in float64, its weights as arrays, config), for the caller alone to change."""
    options = BACKBONES[name]
    model = tiny_model(name)
    model.zero_grad()
    weights = {key: value.detach().numpy().copy() for key, value in model.state_dict().items()}
    config = vit.Config(
        num_heads=HEADS,
        patch_size=PATCH,
        mean=MEAN,
        std=STD,
        no_embed_class=options.get("no_embed_class", False),
        pool=model.global_pool,
        **REFERENCE.get(name, {}),
    )
    return model, weights, config


@functools.cache  # building takes longer than most of the tests
def tiny_model(name):
    """No weight is left at a value that would hide a mistake, such as a norm's 1 and 0."""
    torch.manual_seed(0)
    model = (Eva if name in EVAS else VisionTransformer)(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2,
        num_classes=CLASSES,
        **BACKBONES[name],
    )
    model = model.double().eval()
    with torch.no_grad():
        for key, param in model.named_parameters():
            is_scale = "norm" in key and key.endswith("weight")
            param.copy_(0.4 * torch.randn_like(param) + (1.0 if is_scale else 0.0))
    return model


def head_of(weights):
    return {"head_weight": weights["head.weight"], "head_bias": weights["head.bias"]}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors this small threads only wait for each other: seconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def batch(rng):
    """(images, labels, weight per example)."""
    images = rng.integers(0, 256, (BATCH, 3, SIDE, SIDE), dtype=np.uint8)
    return images, np.array([0, 3, 1]), np.array([1.0, 0.5, 2.0])


def to_torch(images_u8):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(images_u8).double() / 255 - mean) / std


def torch_loss(logits, labels, smoothing, example_weight):
    each = F.cross_entropy(logits, torch.from_numpy(labels), reduction="none", label_smoothing=smoothing)
    weight = torch.from_numpy(example_weight)
    return (weight * each).sum() / weight.sum()


def assert_near(actual, expected, tolerance):
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------------
# timm
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_forward_and_all_weight_gradients_equal_timm(name, batch):
    model, weights, config = tiny(name)
    images, labels, example_weight = batch
    tolerance = TOLERANCE.get(name, 1e-10)
    result = vit.forward_backward(
        weights,
        config,
        images,
        labels,
        **head_of(weights),
        smoothing=0.1,
        example_weight=example_weight,
        backbone_grads=True,
    )
    tokens = model.forward_features(to_torch(images))
    logits = model.forward_head(tokens)
    loss = torch_loss(logits, labels, 0.1, example_weight)
    loss.backward()

    assert_near(result.tokens, tokens.detach(), tolerance)
    assert_near(result.features, model.forward_head(tokens, pre_logits=True).detach(), tolerance)
    assert_near(result.logits, logits.detach(), tolerance)
    assert abs(result.loss - loss.item()) < tolerance
    expected = {key: param.grad for key, param in model.named_parameters()}
    assert result.grads.keys() == expected.keys()
    for key, grad in expected.items():
        # A weight without influence would make the comparison empty. The bias of k_norm truly has none: it
        # adds the same number to all scores of a query.
        assert key.endswith("k_norm.bias") or grad.abs().max() > 1e-6, key
        assert_near(result.grads[key], grad, 10 * tolerance)


# How prompts enter, written out for each variant by hand rather than through vit.Prompts.at:
# for each block, the index of the prompt that replaces the old one; None: carry on; "none": no prompts there.
PLACEMENT = {
    "shallow": [0, None, None],
    "deep": [0, 1, 2],
    "first_2": [0, 1, None],
    "first_2_dropped": [0, 1, "none"],
    "last_2": ["none", 0, 1],
    "last_1": ["none", "none", 0],
    "shared": [0, 1, 1],
}


def make_prompts(variant, rng, width=WIDTH):
    values = [rng.normal(size=(PROMPTS, width)) for _ in range(3)]
    return {
        "shallow": lambda: vit.shallow(values[0]),
        "deep": lambda: vit.deep_first(values),
        "first_2": lambda: vit.deep_first(values[:2]),
        "first_2_dropped": lambda: vit.deep_first(values[:2], drop_after_last=True),
        "last_2": lambda: vit.deep_last(values[:2], DEPTH),
        "last_1": lambda: vit.deep_last(values[:1], DEPTH),
        "shared": lambda: vit.deep_shared(values[0], values[1], DEPTH),
    }[variant]()


def torch_embedded(model, images):
    """(tokens before the first block, rotary positions of the patches or None)."""
    found = model._pos_embed(model.patch_embed(to_torch(images)))
    x, rope = found if isinstance(found, tuple) else (found, None)
    return model.norm_pre(x), rope


def torch_block(block, x, rope, *, before=0, behind=0, **options):
    """A block of timm on tokens of which some, before or behind the patches, are not turned: by an angle of zero."""
    if rope is not None:
        still_E = torch.cat([torch.zeros(rope.shape[1] // 2), torch.ones(rope.shape[1] // 2)]).double()
        options["rope"] = torch.cat([still_E.expand(before, -1), rope, still_E.expand(behind, -1)])
    return block(x, **options)


def torch_vpt(model, images, variant, *, values, projection, pooling):
    """VPT through timm's own layers and autograd."""
    if projection is not None:
        values = [F.linear(value, *projection) for value in values]
    x, rope = torch_embedded(model, images)
    R, M = model.num_prefix_tokens, model.patch_embed.num_patches
    for block, placed in zip(model.blocks, PLACEMENT[variant], strict=True):
        if placed == "none":
            x = torch.cat([x[:, :R], x[:, -M:]], dim=1)
        elif placed is not None:
            x = torch.cat([x[:, :R], values[placed].expand(len(x), -1, -1), x[:, -M:]], dim=1)
        x = torch_block(block, x, rope, before=x.shape[1] - R - M)
    x = model.norm(x)
    P = x.shape[1] - R - M
    means = {
        "img_pool": lambda: x[:, R + P :].mean(1),
        "prompt_pool": lambda: x[:, R : R + P].mean(1),
        "imgprompt_pool": lambda: x[:, R:].mean(1),
        "original": lambda: x[:, 0] if model.global_pool == "token" else x[:, R + P :].mean(1),
    }
    return model.head(model.fc_norm(means[pooling]()))


VPT_CASES = [
    *[("plain", variant, False, "original") for variant in PLACEMENT],
    *[("avg_no_class", variant, False, "original") for variant in PLACEMENT],
    *[("everything", variant, True, "original") for variant in ("shallow", "deep", "last_2", "shared")],
    *[("registers", "deep", True, pooling) for pooling in vit.POOLINGS],
    *[("avg_fc_norm", "first_2", True, pooling) for pooling in vit.POOLINGS],
    ("plain", "first_2_dropped", False, "imgprompt_pool"),
    *[(name, "deep", False, "original") for name in EVAS],
    *[("dinov3", variant, True, "imgprompt_pool") for variant in ("shallow", "first_2_dropped", "last_2")],
]


def vpt_arguments(name, variant, projected, rng):
    model, weights, config = tiny(name)
    prompts = make_prompts(variant, rng, NARROW if projected else WIDTH)
    projection = (rng.normal(size=(WIDTH, NARROW)), rng.normal(size=WIDTH)) if projected else None
    return model, weights, config, prompts, projection


@pytest.mark.parametrize(("name", "variant", "projected", "pooling"), VPT_CASES)
def test_vpt_equals_timm_layers_with_autograd(batch, rng, *, name, variant, projected, pooling):
    model, weights, config, prompts, projection = vpt_arguments(name, variant, projected, rng)
    images, labels, example_weight = batch
    result = vit.forward_backward(
        weights,
        config,
        images,
        labels,
        prompts,
        **head_of(weights),
        projection=projection,
        pooling=pooling,
        smoothing=0.1,
        example_weight=example_weight,
        backbone_grads=True,
    )
    leaves = [torch.from_numpy(value).requires_grad_() for value in prompts.values]
    pair = None if projection is None else [torch.from_numpy(p).requires_grad_() for p in projection]
    logits = torch_vpt(model, images, variant, values=leaves, projection=pair, pooling=pooling)
    torch_loss(logits, labels, 0.1, example_weight).backward()

    assert_near(result.logits, logits.detach(), TOLERANCE.get(name, 1e-10))
    expected = {f"prompts.{i}": leaf.grad for i, leaf in enumerate(leaves)}
    if pair is not None:
        expected |= {"projection.weight": pair[0].grad, "projection.bias": pair[1].grad}
    expected |= {
        key: torch.zeros_like(param) if param.grad is None else param.grad for key, param in model.named_parameters()
    }
    assert result.grads.keys() == expected.keys()
    for key, grad in expected.items():
        assert_near(result.grads[key], grad, 10 * TOLERANCE.get(name, 1e-10))


# ------------------------------------------------------------------------------------------------------------
# Finite differences: they know nothing of PyTorch
# ------------------------------------------------------------------------------------------------------------


def assert_slope(loss, tensor, grad, rng, entries):
    """Central differences along one random direction and at some entries of `tensor`, which loss() reads."""
    directions = [rng.normal(size=tensor.shape)]
    for flat in rng.choice(tensor.size, size=min(entries, tensor.size), replace=False):
        direction = np.zeros(tensor.size)
        direction[flat] = 1.0
        directions.append(direction.reshape(tensor.shape))
    step, kept = 1e-6, tensor.copy()
    for direction in directions:
        tensor[...] = kept + step * direction
        above = loss()
        tensor[...] = kept - step * direction
        below = loss()
        tensor[...] = kept
        slope = (grad * direction).sum()
        assert abs((above - below) / (2 * step) - slope) <= 1e-7 * max(1.0, abs(slope))


@pytest.mark.parametrize(
    ("name", "variant", "projected", "pooling", "full"),
    [
        *[("plain", variant, False, "original", False) for variant in PLACEMENT],
        *[("plain", variant, True, "original", False) for variant in ("shallow", "deep", "shared")],
        *[("registers", "deep", False, pooling, False) for pooling in vit.POOLINGS],
        *[("avg_fc_norm", "first_2", True, pooling, False) for pooling in vit.POOLINGS],
        ("avg_no_class", "last_2", False, "original", False),
        *[(name, None, False, "original", True) for name in ("plain", "everything", "avg_no_class_registers")],
        ("everything", "deep", True, "imgprompt_pool", True),
        *[(name, "deep", False, "original", True) for name in EVAS],
    ],
)
def test_gradients_equal_finite_differences(batch, rng, *, name, variant, projected, pooling, full):
    images, labels, example_weight = batch
    if variant is None:
        _, weights, config = tiny(name)
        prompts = projection = None
    else:
        _, weights, config, prompts, projection = vpt_arguments(name, variant, projected, rng)
    head = {"head_weight": weights.pop("head.weight"), "head_bias": weights.pop("head.bias")}
    arguments = (weights, config, images, labels, prompts)
    options = head | {
        "projection": projection,
        "pooling": pooling,
        "smoothing": 0.1,
        "example_weight": example_weight,
    }
    grads = vit.forward_backward(*arguments, **options, backbone_grads=full).grads

    trained = {"head.weight": head["head_weight"], "head.bias": head["head_bias"]}
    trained |= {} if prompts is None else {f"prompts.{i}": v for i, v in enumerate(prompts.values)}
    trained |= {} if projection is None else {"projection.weight": projection[0], "projection.bias": projection[1]}
    trained |= weights if full else {}
    assert grads.keys() == trained.keys()
    for key, tensor in trained.items():
        assert_slope(lambda: vit.loss_only(*arguments, **options), tensor, grads[key], rng, entries=1 if full else 4)


@pytest.mark.parametrize("count", [1, 1 + (SIDE // PATCH) ** 2])
def test_gradients_of_added_prompts_equal_finite_differences(batch, rng, count):
    _, weights, config = tiny("plain")
    values = tuple(rng.normal(size=(count, WIDTH)) for _ in range(2))
    prompts = vit.Prompts(values=values, at={0: 0, 1: 1, 2: 1}, add=True)
    arguments = (weights, config, *batch[:2], prompts)
    grads = vit.forward_backward(*arguments, **head_of(weights)).grads
    for index, value in enumerate(values):
        grad = grads[f"prompts.{index}"]
        assert_slope(lambda: vit.loss_only(*arguments, **head_of(weights)), value, grad, rng, entries=4)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_gradients_of_pixels_beside_the_image_equal_finite_differences(batch, rng, name):
    _, weights, config = tiny(name)
    images, inside = batch[0][:, :, 3:-3, 3:-3], slice(3, SIDE - 3)
    tensors = {
        "frame": rng.uniform(size=(3, SIDE, SIDE)),
        "channels": rng.normal(size=(2, SIDE, SIDE)),
        "kernel": 0.3 * rng.normal(size=(WIDTH, 2, PATCH, PATCH)),
        "bias": rng.normal(size=WIDTH),
    }
    pixels = vit.Pixels(
        frame_CTT=tensors["frame"],
        channels_PSS=tensors["channels"],
        kernel_DPGG=tensors["kernel"],
        bias_D=tensors["bias"],
    )
    arguments, options = (weights, config, images, batch[1]), {**head_of(weights), "pixels": pixels}
    grads = vit.forward_backward(*arguments, **options).grads
    assert grads.keys() == {"head.weight", "head.bias", *tensors}
    assert not grads["frame"][:, inside, inside].any()
    for key, tensor in tensors.items():
        assert np.abs(grads[key]).max() > 1e-6
        assert_slope(lambda: vit.loss_only(*arguments, **options), tensor, grads[key], rng, entries=4)


@pytest.mark.parametrize("name", ["plain", "layer_scale"])
@pytest.mark.parametrize("kinds", [("mlp",), ("attn", "mlp"), ("beside",), ("attn", "mlp", "beside")], ids="+".join)
def test_gradients_with_adapters_equal_finite_differences(batch, rng, kinds, name):
    """Of every weight: what flows on through an adapter is told by those of the blocks below it."""
    _, weights, config = tiny(name)
    config = dataclasses.replace(config, beside_scale=0.3)
    for block in range(DEPTH):
        for kind in kinds:
            shapes = {
                "down.weight": (NARROW, WIDTH),
                "down.bias": NARROW,
                "up.weight": (WIDTH, NARROW),
                "up.bias": WIDTH,
            }
            for part, shape in shapes.items():
                weights[f"blocks.{block}.adapter_{kind}.{part}"] = rng.normal(size=shape)
    head = {"head_weight": weights.pop("head.weight"), "head_bias": weights.pop("head.bias")}
    arguments = (weights, config, *batch[:2])
    grads = vit.forward_backward(*arguments, **head, backbone_grads=True).grads
    assert weights.keys() <= grads.keys()
    for key, tensor in weights.items():
        assert_slope(lambda: vit.loss_only(*arguments, **head), tensor, grads[key], rng, entries=1)


@pytest.mark.parametrize("name", ["plain", "no_qkv_bias", "everything"])
def test_gradients_of_changed_weights_equal_finite_differences(batch, rng, name):
    _, weights, config = tiny(name)
    head = {"head_weight": weights.pop("head.weight"), "head_bias": weights.pop("head.bias")}
    updates = {
        ("blocks.0.attn.qkv.weight", (WIDTH, 2 * WIDTH)): (rng.normal(size=(2, WIDTH)), rng.normal(size=(WIDTH, 2))),
        ("blocks.2.mlp.fc1.weight", (0, 2 * WIDTH)): (rng.normal(size=(2, WIDTH)), rng.normal(size=(2 * WIDTH, 2))),
    }
    pairs = {
        name.removesuffix(".weight"): (1 + 0.3 * rng.normal(size=len(w)), rng.normal(size=len(w)))
        for name, w in weights.items()
        if name.endswith(".weight")
    }

    def changed():
        return inside.low_rank(inside.scale_shift(weights, pairs), updates, 0.7)

    grads = vit.forward_backward(changed(), config, *batch[:2], **head, backbone_grads=True).grads
    found = {**inside.low_rank_backward(grads, updates, 0.7), **inside.scale_shift_backward(grads, weights, pairs)}
    for key, tensors in (updates | pairs).items():
        for tensor, grad in zip(tensors, found[key], strict=True):
            assert_slope(lambda: vit.loss_only(changed(), config, *batch[:2], **head), tensor, grad, rng, entries=2)


def test_adapters_of_zero_change_nothing(batch, rng):
    _, weights, config = tiny("plain")
    for kind in ("attn", "mlp", "beside"):
        down = {"down.weight": rng.normal(size=(NARROW, WIDTH)), "down.bias": rng.normal(size=NARROW)}
        up = {"up.weight": np.zeros((WIDTH, NARROW)), "up.bias": np.zeros(WIDTH)}
        for part, value in (down | up).items():
            weights[f"blocks.1.adapter_{kind}.{part}"] = value
    images, labels, _ = batch
    found = vit.forward_backward(weights, config, images, labels, **head_of(weights))
    np.testing.assert_array_equal(found.logits, run(batch, None).logits)


@pytest.mark.parametrize("function", ["norm", "gelu", "cross_entropy"])
def test_elementary_backward_equals_finite_differences(function, rng):
    x, probe = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5))
    weight, bias = rng.normal(size=5), rng.normal(size=5)
    if function == "norm":
        dx, grads = vit.norm_backward(probe, vit.norm_forward(x, weight, bias, 1e-6)[1])

        def loss():
            return (probe * vit.norm_forward(x, weight, bias, 1e-6)[0]).sum()

        assert_slope(loss, weight, grads["weight"], rng, 5)
        assert_slope(loss, bias, grads["bias"], rng, 5)
    elif function == "gelu":
        dx = vit.gelu_backward(probe, vit.gelu_forward(x)[1])

        def loss():
            return (probe * vit.gelu_forward(x)[0]).sum()
    else:
        x, labels = x[0], np.array([4, 0, 0])
        options = {"smoothing": 0.2, "example_weight": np.array([0.0, 1.0, 3.0])}
        dx = vit.cross_entropy(x, labels, **options)[1]

        def loss():
            return vit.cross_entropy(x, labels, **options)[0]

    assert_slope(loss, x, dx, rng, 10)


# ------------------------------------------------------------------------------------------------------------
# Identities between the variants
# ------------------------------------------------------------------------------------------------------------


def run(batch, prompts, **options):
    _, weights, config = tiny("plain")
    images, labels, _ = batch
    return vit.forward_backward(weights, config, images, labels, prompts, **head_of(weights), **options)


def test_linear_probe_trains_the_head_only(batch):
    assert run(batch, None).grads.keys() == {"head.weight", "head.bias"}


def test_empty_prompts_change_nothing(batch):
    empty = vit.deep_first([np.zeros((0, WIDTH))] * DEPTH)
    np.testing.assert_array_equal(run(batch, empty).logits, run(batch, None).logits)


def test_shared_is_deep_with_equal_prompts_and_summed_gradients(batch, rng):
    first, later = rng.normal(size=(2, PROMPTS, WIDTH))
    shared = run(batch, vit.deep_shared(first, later, DEPTH))
    deep = run(batch, vit.deep_first([first, later, later]))
    np.testing.assert_array_equal(shared.logits, deep.logits)
    total = deep.grads["prompts.1"] + deep.grads["prompts.2"]
    np.testing.assert_allclose(shared.grads["prompts.1"], total, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(shared.grads["prompts.0"], deep.grads["prompts.0"])


def test_first_all_and_last_all_are_deep(batch, rng):
    values = list(rng.normal(size=(DEPTH, PROMPTS, WIDTH)))
    first, last = run(batch, vit.deep_first(values)), run(batch, vit.deep_last(values, DEPTH))
    np.testing.assert_array_equal(first.logits, last.logits)
    np.testing.assert_array_equal(run(batch, vit.deep_first(values, drop_after_last=True)).logits, first.logits)


def test_identity_projection_changes_nothing(batch, rng):
    prompts = vit.shallow(rng.normal(size=(PROMPTS, WIDTH)))
    projected = run(batch, prompts, projection=(np.eye(WIDTH), np.zeros(WIDTH)))
    np.testing.assert_allclose(projected.logits, run(batch, prompts).logits, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (None, {"pooling": "mean"}, "none of original"),
        (None, {"pooling": "prompt_pool"}, "needs prompts"),
        (None, {"example_weight": np.zeros(BATCH)}, "sum > 0"),
        (vit.shallow(np.zeros((1, NARROW))), {}, "pass a projection"),
        (vit.deep_first([np.zeros((1, WIDTH))] * (DEPTH + 1)), {}, "blocks 0..2"),
        (vit.Prompts(values=(np.zeros((1, WIDTH)),), at={}), {}, "1 prompt values"),
    ],
)
def test_mistakes_are_refused(batch, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        run(batch, prompts, **options)


def test_unknown_weights_are_refused(batch):
    _, weights, config = tiny("plain")
    with pytest.raises(ValueError, match="dist_token"):
        vit.features_forward(weights | {"dist_token": np.zeros((1, 1, WIDTH))}, config, batch[0])


# ------------------------------------------------------------------------------------------------------------
# Schedule and optimizers
# ------------------------------------------------------------------------------------------------------------


def test_schedule_at_points_known_by_heart():
    assert schedule.multiplier(0, 10, 100) == 0
    assert schedule.multiplier(2.5, 10, 100) == 0.25
    assert schedule.multiplier(10, 10, 100) == 1
    assert schedule.multiplier(40, 10, 100) == pytest.approx(0.75, abs=1e-15)  # a third of the way: cos 60 degrees
    assert schedule.multiplier(55, 10, 100) == pytest.approx(0.5, abs=1e-15)
    assert schedule.multiplier(100, 10, 100) == 0
    assert schedule.multiplier(0, 0, 3) == 1
    assert schedule.per_epoch(2, 6) == schedule.per_step(2, 6, 4)[::4]
    with pytest.raises(ValueError, match="warmup"):
        schedule.multiplier(0, 5, 5)
    with pytest.raises(ValueError, match="outside"):
        schedule.multiplier(5.5, 1, 5)


OPTIMIZERS = [
    (optim.sgd_step, torch.optim.SGD, {}),
    (optim.sgd_step, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (optim.sgd_step, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    (optim.adam_step, torch.optim.Adam, {"weight_decay": 0.1}),
    (optim.adam_step, torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-3}),
    (optim.adamw_step, torch.optim.AdamW, {"weight_decay": 0.1}),
]


@pytest.mark.parametrize(("step", "torch_class", "options"), OPTIMIZERS)
def test_optimizers_equal_pytorch(step, torch_class, options, rng):
    param, state = rng.normal(size=(3, 4)), None
    theirs = torch.from_numpy(param.copy()).requires_grad_()
    optimizer = torch_class([theirs], lr=1.0, **options)
    for turn in range(6):
        lr, grad = 0.3 * math.cos(turn / 4), rng.normal(size=(3, 4))  # the rate changes, as under a schedule
        param, state = step(param, grad, state, lr=lr, **options)
        optimizer.param_groups[0]["lr"] = lr
        theirs.grad = torch.from_numpy(grad)
        optimizer.step()
        np.testing.assert_allclose(param, theirs.detach().numpy(), rtol=0, atol=1e-13)


def test_first_optimizer_steps_by_hand():
    one, two = np.array([1.0]), np.array([2.0])
    # g = 2 + 0.5 * 1; v = g; Nesterov looks ahead: g + 0.9 * g.
    param, _ = optim.sgd_step(one, two, None, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5)
    assert param[0] == pytest.approx(1 - 0.1 * 1.9 * 2.5)
    # Adam's first step has length lr, whatever the size of the gradient.
    assert optim.adam_step(one, two, None, lr=0.1, weight_decay=7.0)[0][0] == pytest.approx(0.9)
    assert optim.adamw_step(one, two, None, lr=0.1, weight_decay=0.5)[0][0] == pytest.approx(0.9 - 0.05)


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_equals_pytorch(max_norm, rng):
    grads = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)}
    params = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for g in grads.values()]
    for param, grad in zip(params, grads.values(), strict=True):
        param.grad = torch.from_numpy(grad.copy())
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    clipped, ours = optim.clip_by_global_norm(grads, max_norm, eps=1e-6)
    assert ours == pytest.approx(norm.item(), abs=1e-13)
    for param, grad in zip(params, clipped.values(), strict=True):
        np.testing.assert_allclose(grad, param.grad.numpy(), rtol=0, atol=1e-14)
    exact, _ = optim.clip_by_global_norm(grads, max_norm)
    assert optim.global_norm(exact) == pytest.approx(min(max_norm, ours), rel=1e-14)
