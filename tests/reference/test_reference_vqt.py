"""The reference of VQT against finite differences and against timm's layers with autograd.

Shape letters: see vqt.py. Backbones and sizes: see test_reference.py.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.evas import EVAS
from tests.reference.test_reference import (
    BATCH,
    CLASSES,
    DEPTH,
    SIDE,
    TOLERANCE,
    WIDTH,
    assert_near,
    assert_slope,
    tiny,
    torch_block,
    torch_embedded,
    torch_loss,
)

from . import vit, vqt

QUERIES, HIDDEN = 2, 6  # Q, and the width of the MLP head
LABELS, EXAMPLE_WEIGHT = np.array([0, 3, 1]), np.array([1.0, 0.5, 2.0])
ALL = tuple(range(DEPTH))

# Backbone, blocks with queries, pooling, normalize, dropout, hidden layers of the head.
CASES = [
    ("plain", None, "none", True, False, 0),
    ("plain", None, "none", False, False, 0),
    ("plain", None, "mean", True, False, 0),
    ("plain", None, "weighted", True, False, 0),
    ("plain", None, "weighted", False, True, 1),
    ("plain", (0, 2), "none", True, True, 2),
    ("plain", (1,), "weighted", True, True, 0),
    ("no_qkv_bias", None, "mean", False, True, 0),
    ("token_fc_norm", (2,), "none", True, False, 0),
    ("avg_fc_norm", (1, 2), "none", True, False, 0),
    ("avg_norm", None, "mean", True, True, 1),
    ("avg_no_class", None, "none", True, True, 0),
    ("avg_no_class", (0, 1), "weighted", True, False, 1),
    ("avg_no_class_registers", None, "none", True, False, 0),
    ("everything", None, "none", True, False, 0),  # registers, q_norm and k_norm, LayerScale, norm_pre
    ("everything", (0, 2), "weighted", True, True, 1),
    *[(name, None, "none", True, False, 0) for name in EVAS],
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors this small threads only wait for each other: seconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (BATCH, 3, SIDE, SIDE), dtype=np.uint8)


def make_options(rng, *, blocks=None, pooling="none", normalize=True, dropout=False, hidden=0, num_queries=QUERIES):
    """Arguments of `forward_backward_vqt`, each at random."""
    J = DEPTH if blocks is None else len(blocks)
    shape = (J, num_queries, WIDTH)
    widths = [WIDTH + J * WIDTH * (num_queries if pooling == "none" else 1), *[HIDDEN] * hidden, CLASSES]
    keep = 0.7
    return {
        "queries": rng.normal(size=shape),
        "blocks": blocks,
        "pooling": pooling,
        "pool_weights": rng.normal(size=shape[:2]) if pooling == "weighted" else None,
        "normalize": normalize,
        "dropout_factors": (rng.random((BATCH, *shape)) < keep) / keep if dropout else None,
        "head": [(rng.normal(size=(b, a)), rng.normal(size=b)) for a, b in itertools.pairwise(widths)],
    }


def trained_of(options):
    """The trained arrays themselves, by the name of their gradient."""
    trained = {"queries": options["queries"]}
    if options["pool_weights"] is not None:
        trained["pool_weights"] = options["pool_weights"]
    for i, (weight, bias) in enumerate(options["head"]):
        trained |= {f"head.{i}.weight": weight, f"head.{i}.bias": bias}
    return trained


def run(name, images, options, **changed):
    _, weights, config = tiny(name)
    return vqt.forward_backward_vqt(weights, config, images, LABELS, **options | changed)


# ------------------------------------------------------------------------------------------------------------
# timm
# ------------------------------------------------------------------------------------------------------------


def torch_joint(model, images, leaves, options):
    """(logits, image tokens after each block, outputs of the queries), through timm's own blocks."""
    x, rope = torch_embedded(model, images)
    B, N, _ = x.shape
    blocks = ALL if options["blocks"] is None else options["blocks"]
    allowed = torch.tensor([True] * N + [False] * leaves["queries"].shape[1]).expand(N + leaves["queries"].shape[1], -1)
    stream, outputs, groups = [x], [], []
    for number, block in enumerate(model.blocks):
        if number in blocks:
            j = blocks.index(number)
            z = leaves["queries"][j].expand(B, -1, -1)
            if options["dropout_factors"] is not None:
                z = z * torch.from_numpy(options["dropout_factors"])[:, j]
            joined = torch.cat([x, z], dim=1)
            x, z = torch_block(block, joined, rope, behind=z.shape[1], attn_mask=allowed).tensor_split([N], dim=1)
            outputs.append(z)
            groups.append(
                {
                    "none": lambda z=z: z.flatten(1),
                    "mean": lambda z=z: z.mean(1),
                    "weighted": lambda z=z, j=j: torch.einsum("q,bqd->bd", leaves["pool_weights"][j], z),
                }[options["pooling"]]()
            )
        else:
            x = torch_block(block, x, rope)
        stream.append(x)
    groups.insert(0, model.forward_head(model.norm(x), pre_logits=True))
    if options["normalize"]:
        groups = [F.normalize(group, dim=1) for group in groups]
    out = torch.cat(groups, dim=1)
    for i in range(len(options["head"])):
        out = F.linear(out if i == 0 else F.gelu(out), leaves[f"head.{i}.weight"], leaves[f"head.{i}.bias"])
    return out, stream, torch.stack(outputs, dim=1)


@pytest.mark.parametrize(("name", "blocks", "pooling", "normalize", "dropout", "hidden"), CASES)
def test_joint_form_equals_timm_blocks_with_autograd(rng, images, *, name, blocks, pooling, normalize, dropout, hidden):
    tolerance = TOLERANCE.get(name, 1e-10)
    options = make_options(rng, blocks=blocks, pooling=pooling, normalize=normalize, dropout=dropout, hidden=hidden)
    result = run(name, images, options, smoothing=0.1, example_weight=EXAMPLE_WEIGHT)
    model = tiny(name)[0]
    leaves = {key: torch.from_numpy(value).requires_grad_() for key, value in trained_of(options).items()}
    logits, stream, outputs = torch_joint(model, images, leaves, options)
    loss = torch_loss(logits, LABELS, 0.1, EXAMPLE_WEIGHT)
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    assert_near(result.logits, logits.detach(), tolerance)
    assert abs(result.loss - loss.item()) < tolerance
    assert_near(result.outputs, outputs.detach(), tolerance)
    assert len(result.stream) == len(stream)
    for ours, theirs in zip(result.stream, stream, strict=True):
        assert_near(ours, theirs.detach(), tolerance)
    np.testing.assert_array_equal(np.concatenate(result.groups, axis=1), result.features)
    assert result.grads.keys() == expected.keys()
    for key, grad in expected.items():
        assert grad.abs().max() > 1e-6, key
        assert_near(result.grads[key], grad, 10 * tolerance)


@pytest.mark.parametrize("name", ["plain", "everything", "avg_no_class"])
def test_outputs_equal_queries_that_read_the_image_tokens(rng, images, name):
    """Without mask: keys and values of the image's tokens alone, only the queries ask."""
    options = make_options(rng)
    result = run(name, images, options)
    model = tiny(name)[0]
    with torch.no_grad():
        for j, block in enumerate(model.blocks):
            x, attn = torch.from_numpy(result.stream[j]), block.attn
            z = torch.from_numpy(options["queries"][j]).expand(BATCH, -1, -1)

            def part(tokens, index, block=block, attn=attn):
                rows = attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)[index]
                return rows.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)

            q, k, v = attn.q_norm(part(z, 0)), attn.k_norm(part(x, 1)), part(x, 2)
            read = torch.softmax(q @ k.mT * attn.head_dim**-0.5, dim=-1) @ v
            z = z + block.ls1(attn.proj(read.transpose(1, 2).flatten(2)))
            z = z + block.ls2(block.mlp(block.norm2(z)))
            assert_near(result.outputs[:, j], z, 1e-12)


# ------------------------------------------------------------------------------------------------------------
# Finite differences
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "blocks", "pooling", "normalize", "dropout", "hidden"), CASES)
def test_gradients_equal_finite_differences(rng, images, *, name, blocks, pooling, normalize, dropout, hidden):
    options = make_options(rng, blocks=blocks, pooling=pooling, normalize=normalize, dropout=dropout, hidden=hidden)
    options |= {"smoothing": 0.1, "example_weight": EXAMPLE_WEIGHT}
    _, weights, config = tiny(name)
    grads = vqt.forward_backward_vqt(weights, config, images, LABELS, **options).grads

    trained = trained_of(options)
    assert grads.keys() == trained.keys()
    for key, tensor in trained.items():
        assert_slope(
            lambda: vqt.loss_only_vqt(weights, config, images, LABELS, **options), tensor, grads[key], rng, entries=4
        )


def test_normalization_backward_equals_finite_differences(rng):
    x, probe = rng.normal(size=(2, 3, 5))
    dx = vqt.unit_backward(probe, vqt.unit_forward(x)[1])

    def loss():
        return (probe * vqt.unit_forward(x)[0]).sum()

    assert_slope(loss, x, dx, rng, 10)


def test_normalization_of_nothing_equals_pytorch(rng):
    x, probe = np.zeros((2, 5)), rng.normal(size=(2, 5))
    x[1] = 1e-14  # neither may become NaN
    leaf = torch.from_numpy(x).requires_grad_()
    unit = F.normalize(leaf, dim=1, eps=1e-12)
    (unit[1:] * torch.from_numpy(probe[1:])).sum().backward()
    ours, cache = vqt.unit_forward(x)
    np.testing.assert_allclose(ours, unit.detach().numpy(), rtol=1e-14, atol=0)
    dx = vqt.unit_backward(probe, cache)
    np.testing.assert_allclose(dx[1], leaf.grad[1].numpy(), rtol=1e-14, atol=0)
    np.testing.assert_allclose(dx[0], probe[0] / 1e-12, rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Who sees whom
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "everything", "avg_no_class_registers"])
def test_image_tokens_do_not_see_the_queries(rng, images, name):
    """The stream and the pooled features are those of the bare backbone, however large the queries are."""
    _, weights, config = tiny(name)
    options = make_options(rng, normalize=False)
    result = run(name, images, options, queries=100 * options["queries"])
    x, _ = vit.embed_forward(vit.normalize_images(images, config.mean, config.std), weights, config)
    assert_near(result.stream[0], x, 0)
    for block in range(DEPTH):
        x, _ = vit.block_forward(x, vit._local(weights, f"blocks.{block}."), config)
        assert_near(result.stream[block + 1], x, 1e-13)
    assert_near(result.groups[0], vit.features_forward(weights, config, images)[0], 1e-13)


def test_mask_hides_the_queries_only():
    hidden = np.isneginf(vqt.query_mask(3, 2))
    np.testing.assert_array_equal(hidden, [[False, False, False, True, True]] * 5)
    np.testing.assert_array_equal(vqt.query_mask(3, 2)[~hidden], 0)


def test_a_query_sees_no_other_query(rng, images):
    """A changed query changes its own output; the others', of its block and of later blocks, stay."""
    options = make_options(rng, num_queries=3)
    changed = options["queries"].copy()
    changed[1, 0] += rng.normal(size=WIDTH)
    before, after = (run("plain", images, options, queries=q).outputs for q in (options["queries"], changed))
    moved = np.abs(after - before).max(axis=(0, 3)) > 1e-13
    assert np.argwhere(moved).tolist() == [[1, 0]]


def test_later_losses_do_not_reach_earlier_queries(rng, images):
    """The gradient through the image's tokens ends at the queries: it is exactly zero."""
    options = make_options(rng)
    options["head"][0][0][:, WIDTH : WIDTH + QUERIES * WIDTH] = 0.0  # the head is blind to block 0's own group
    grads = run("plain", images, options).grads["queries"]
    np.testing.assert_array_equal(grads[0], 0.0)
    assert np.abs(grads[1:]).max() > 1e-6


# ------------------------------------------------------------------------------------------------------------
# Identities between the options
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", vqt.POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_order_of_the_queries(rng, images, pooling, normalize):
    """Permuted queries of one block give permuted outputs; 'mean', and 'weighted' with its weights, lose the order."""
    options = make_options(rng, pooling=pooling, normalize=normalize, num_queries=3)
    order, permuted = [2, 0, 1], options["queries"].copy()
    permuted[1] = permuted[1, order]
    changed = {"queries": permuted}
    if pooling == "weighted":
        changed["pool_weights"] = options["pool_weights"].copy()
        changed["pool_weights"][1] = changed["pool_weights"][1, order]
    before, after = run("everything", images, options), run("everything", images, options, **changed)

    assert_near(after.outputs[:, 1], before.outputs[:, 1, order], 1e-13)
    expected = list(before.groups)
    if pooling == "none":
        expected[2] = expected[2].reshape(BATCH, 3, WIDTH)[:, order].reshape(BATCH, -1)
    for ours, theirs in zip(after.groups, expected, strict=True):
        assert_near(ours, theirs, 1e-13)
    if pooling != "none":
        assert_near(after.grads["queries"][1], before.grads["queries"][1, order], 1e-13)
        assert_near(after.logits, before.logits, 1e-13)


def test_equal_weights_are_the_mean(rng, images):
    options = make_options(rng, pooling="mean")
    weights = np.full((DEPTH, QUERIES), 1 / QUERIES)
    mean, weighted = (
        run("plain", images, options, **changed) for changed in ({}, {"pooling": "weighted", "pool_weights": weights})
    )
    assert_near(weighted.logits, mean.logits, 1e-13)
    assert_near(weighted.grads["queries"], mean.grads["queries"], 1e-13)


def test_normalized_groups_have_length_one(rng, images):
    options = make_options(rng)
    unit, plain = run("plain", images, options), run("plain", images, options, normalize=False)
    for one, group in zip(unit.groups, plain.groups, strict=True):
        lengths = np.linalg.norm(group, axis=1, keepdims=True)
        assert np.abs(lengths - 1).max() > 1e-3
        assert_near(one * lengths, group, 1e-13)


def test_some_blocks_give_the_same_groups_as_all(rng, images):
    options = make_options(rng)
    some = make_options(rng, blocks=(0, 2)) | {"queries": options["queries"][[0, 2]]}
    every, ours = run("everything", images, options).groups, run("everything", images, some).groups
    for group, expected in zip(ours, (every[0], every[1], every[3]), strict=True):
        assert_near(group, expected, 1e-13)


def test_no_blocks_and_no_normalization_is_the_linear_probe(rng, images):
    _, weights, config = tiny("plain")
    options = make_options(rng, blocks=(), normalize=False)
    ours = run("plain", images, options)
    weight, bias = options["head"][0]
    probe = vit.forward_backward(weights, config, images, LABELS, head_weight=weight, head_bias=bias)
    np.testing.assert_array_equal(ours.logits, probe.logits)
    np.testing.assert_array_equal(ours.grads["head.0.weight"], probe.grads["head.weight"])
    assert ours.grads["queries"].shape == (0, QUERIES, WIDTH)


def test_dropout_factors_multiply_the_queries(rng, images):
    options = make_options(rng)
    shape = (BATCH, DEPTH, QUERIES, WIDTH)
    plain, ones = run("plain", images, options), run("plain", images, options, dropout_factors=np.ones(shape))
    np.testing.assert_array_equal(ones.logits, plain.logits)
    twice = run("plain", images, options, dropout_factors=np.full(shape, 2.0))
    doubled = run("plain", images, options, queries=2 * options["queries"])
    np.testing.assert_array_equal(twice.logits, doubled.logits)
    np.testing.assert_array_equal(twice.grads["queries"], 2 * doubled.grads["queries"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blocks": (1, 0, 2)}, "ascending"),
        ({"blocks": (0, 1, 1)}, "ascending"),
        ({"blocks": (0, 1, DEPTH)}, "0..2"),
        ({"blocks": (0, 1)}, "need \\(2, Q, 8\\)"),
        ({"queries": np.zeros((DEPTH, 0, WIDTH))}, "Q = 0"),
        ({"pooling": "max"}, "none of none, mean, weighted"),
        ({"pooling": "weighted"}, "needs pool_weights"),
        ({"pool_weights": np.ones((DEPTH, QUERIES))}, "no other pooling"),
        ({"pooling": "weighted", "pool_weights": np.ones(QUERIES)}, "need \\(3, 2\\)"),
        ({"dropout_factors": np.ones((DEPTH, QUERIES, WIDTH))}, "need \\(3, 3, 2, 8\\)"),
        ({"head": []}, "at least one"),
    ],
)
def test_mistakes_are_refused(rng, images, changed, message):
    with pytest.raises(ValueError, match=message):
        run("plain", images, make_options(rng), **changed)


def test_unknown_weights_are_refused(rng, images):
    _, weights, config = tiny("plain")
    unknown = weights | {"dist_token": np.zeros((1, 1, WIDTH))}
    with pytest.raises(ValueError, match="dist_token"):
        vqt.forward_backward_vqt(unknown, config, images, LABELS, **make_options(rng))
