"""VQT in both of its forms against the published joint form: features, losses and all gradients."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream
from dist_vpt.methods import attach
from dist_vpt.methods.vqt import VQT, _attend_projected, cheaper_form
from tests.evas import EVAS
from tests.methods.conftest import MEAN, ROTARY, STD, config_of, make_vit, reference_config
from tests.methods.conftest import make_backbone as make_float32
from tests.reference import vit, vqt

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative to the largest number of the tensor
ANGLES = 1e-6  # of rotary positions, whose sines and cosines timm has in float32 whatever the weights are
LABELS = torch.tensor([0, 2, 1])
WEIGHT = torch.tensor([1.0, 0.5, 2.0])
BACKBONES: dict[str, dict[str, Any]] = {
    "plain": {"kind": "class_token"},
    "no qkv bias": {"kind": "class_token", "qkv_bias": False},
    "LayerScale, registers": {"kind": "registers", "qk_norm": False},
    "qk-norm": {"kind": "class_token", "qk_norm": True},
    "qk-norm, LayerScale, registers": {"kind": "registers"},
    "no class token": {"kind": "no_class_token"},
    "pre-norm, mean": {"kind": "mean_pooled"},
} | {kind: {"kind": kind} for kind in EVAS}


def make_backbone(dtype: torch.dtype, kind: str, **changes: Any) -> Backbone:
    backbone = make_float32(kind, **changes).to(dtype)
    for name, values in (("mean", MEAN), ("std", STD)):  # not rounded to float32 on the way
        setattr(backbone, name, torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) * 255)
    return backbone


def make(dtype: torch.dtype, which: str, **settings: Any) -> VQT:
    recipe = config_of({"name": "vqt", **settings})
    torch.manual_seed(3)
    method = attach(recipe, make_backbone(dtype, **BACKBONES[which]), 4, dtype).to(dtype)
    assert isinstance(method, VQT)
    with torch.no_grad():
        for _, parameter in method.trainable():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    return method


def expected(method: VQT, which: str, images: torch.Tensor) -> vqt.Result:
    model = make_vit(**BACKBONES[which])
    config = reference_config(BACKBONES[which]["kind"])
    own = {name: p.detach().double().numpy() for name, p in method.trainable()}
    return vqt.forward_backward_vqt(
        {name: tensor.double().numpy() for name, tensor in model.state_dict().items()},
        config,
        images.numpy(),
        LABELS.numpy(),
        queries=own["queries"],
        blocks=method.blocks,
        pooling=method.recipe.pooling,
        pool_weights=own.get("pool_weights"),
        normalize=method.recipe.normalize,
        head=[(own["head.weight"], own["head.bias"])],
        smoothing=0.1,
        example_weight=WEIGHT.double().numpy(),
    )


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    weight = WEIGHT.to(logits.dtype)
    return (F.cross_entropy(logits, LABELS, reduction="none", label_smoothing=0.1) * weight).sum() / weight.sum()


def assert_close(found: torch.Tensor, wanted: np.ndarray, name: str, floor: float = 0.0) -> None:
    error = np.abs(found.detach().double().numpy() - wanted).max() / np.abs(wanted).max()
    assert found.shape == wanted.shape
    assert error < max(floor, TOLERANCE[found.dtype]), f"{name}: off by {error:.2e}"


def check(method: VQT, which: str, images: torch.Tensor) -> None:
    wanted, floor = expected(method, which, images), ANGLES if which in ROTARY else 0.0
    head: list[torch.Tensor] = []
    method.head.register_forward_pre_hook(lambda _, inputs: head.append(inputs[0]))
    logits = method.train()(images)
    loss = loss_of(logits)
    loss.backward()
    assert_close(head[0], wanted.features, "features", floor)
    assert_close(logits, wanted.logits, "logits", floor)
    assert_close(loss, np.array(wanted.loss), "loss", floor)
    renamed = {"head.weight": "head.0.weight", "head.bias": "head.0.bias"}
    trained = dict(method.trainable())
    assert {renamed.get(name, name) for name in trained} == set(wanted.grads)
    for name, parameter in trained.items():
        assert parameter.grad is not None
        assert_close(parameter.grad, wanted.grads[renamed.get(name, name)], name, floor)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("form", ["absorbed", "projected"])
@pytest.mark.parametrize("queries", [1, 10, 20])
@pytest.mark.parametrize("which", BACKBONES)
def test_equals_the_joint_form(which: str, queries: int, form: str, dtype: torch.dtype, images: torch.Tensor) -> None:
    if form == "absorbed" and which in ROTARY:
        with pytest.raises(UserError, match="form = absorbed: a EvaBlock of the backbone turns each patch's key"):
            make(dtype, which, queries=queries, form=form)
        return
    check(make(dtype, which, queries=queries, form=form), which, images)


@pytest.mark.parametrize("form", ["absorbed", "projected"])
@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "mean"},
        {"pooling": "weighted"},
        {"normalize": False},
        {"blocks": (1,)},
        {"blocks": (0, 2), "pooling": "weighted", "normalize": False},
    ],
    ids=str,
)
def test_options_equal_the_joint_form(settings: dict[str, Any], form: str, images: torch.Tensor) -> None:
    check(make(torch.float64, "plain", queries=3, form=form, **settings), "plain", images)


@pytest.mark.parametrize("form", ["absorbed", "projected"])
@pytest.mark.parametrize("which", ["plain", "qk-norm"])
def test_dropout_equals_the_joint_form(which: str, form: str, images: torch.Tensor) -> None:
    method = make(torch.float64, which, queries=3, form=form, dropout=0.3)
    torch.manual_seed(5)
    factors = method.train().mask(3)
    assert factors is not None
    wanted = vqt.forward_backward_vqt(
        {name: tensor.double().numpy() for name, tensor in make_vit(**BACKBONES[which]).state_dict().items()},
        vit.Config(num_heads=2, patch_size=8, mean=MEAN, std=STD),
        images.numpy(),
        LABELS.numpy(),
        queries=method.queries.detach().numpy(),
        dropout_factors=factors.numpy(),
        head=[(method.head.weight.detach().numpy(), method.head.bias.detach().numpy())],
    )
    torch.manual_seed(5)
    logits = method(images)
    F.cross_entropy(logits, LABELS).backward()
    assert_close(logits, wanted.logits, "logits")
    assert_close(method.queries.grad, wanted.grads["queries"], "queries")
    method.eval()
    assert not torch.allclose(method(images), logits)


def test_what_dropout_draws() -> None:
    """One number in five is dropped, on its own, and the others keep the expected sum."""
    method = make(torch.float64, "plain", queries=3, dropout=0.2)
    factors = method.train().mask(400)
    assert factors is not None
    assert factors.shape == (400, *method.queries.shape)
    assert factors.unique().tolist() == [0.0, 1.25]
    spread = (0.8 * 0.2 / factors.numel()) ** 0.5
    assert abs(float((factors > 0).double().mean()) - 0.8) < 5 * spread
    assert (factors[0] != factors[1]).any()
    assert method.eval().mask(400) is None


@pytest.mark.parametrize("which", ["plain", "qk-norm, LayerScale, registers", "dinov3", "eva02_normed"])
def test_half_precision_is_near(which: str, images: torch.Tensor) -> None:
    exact, half = (make(torch.float32, which, queries=2) for _ in range(2))
    half.backbone.hold_in(torch.bfloat16)
    logits = half.train()(images)
    assert logits.dtype == torch.float32
    loss_of(logits).backward()
    loss_of(exact.train()(images)).backward()
    for (name, a), (_, b) in zip(exact.trainable(), half.trainable(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert b.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 0.03 * a.grad.norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_readers_together_are_what_they_are_alone(form: str, dropout: float, images: torch.Tensor) -> None:
    together, alone = (
        [
            make(torch.float64, "plain", queries=q, form=form, dropout=d)
            for q, d in ((1, 0.0), (3, dropout), (2, dropout))
        ]
        for _ in range(2)
    )
    for reader in together[1:]:
        reader.backbone = together[0].backbone
    stream = compute_stream(together[0].backbone, images, together[0].spec)
    for reader in (*together, *alone):
        reader.train()
    logits = VQT.read_many(together, stream, seeds=[7, 8, 9])
    torch.stack([loss_of(each) for each in logits]).sum().backward()
    for t, reader in enumerate(alone):
        torch.manual_seed(7 + t)
        own = reader(images)
        loss_of(own).backward()
        assert torch.allclose(own, logits[t], rtol=1e-12, atol=1e-12)
        for (name, a), (_, b) in zip(reader.trainable(), together[t].trainable(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert (a.grad - b.grad).abs().max() < 1e-12 * a.grad.abs().max(), name


def test_the_absorbed_form_keeps_what_it_reads_and_little_else(images: torch.Tensor) -> None:
    method = make(torch.float32, "plain", form="absorbed")
    stream = compute_stream(method.backbone, images, method.spec)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_of(method(stream)).backward()
    for normed_BND in stream.normed:
        kept.pop(normed_BND.untyped_storage().data_ptr())
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    largest = max(size for address, size in kept.items() if address not in weights)
    assert largest <= 3 * 64 * 4  # the MLP's inside, B x 4 D: nothing of N tokens


def test_the_stream_holds_what_blocks_see(images: torch.Tensor) -> None:
    backbone = make_backbone(torch.float64, "registers")
    stream = compute_stream(backbone, images, StreamSpec((0, 2), key_scales=True))
    tokens = backbone.embed(images)
    seen = []
    for block in backbone.blocks:
        seen.append(block.norm1(tokens))
        tokens = block(tokens)
    assert isinstance(stream, StreamOutput)
    assert torch.equal(stream.normed[0], seen[0])
    assert torch.equal(stream.normed[1], seen[2])
    assert torch.equal(stream.pooled, backbone.pool(backbone.norm(tokens)))
    assert [tuple(s.shape) for s in stream.key_scales] == [(3, backbone.tokens, 2)] * 2
    assert not any(t.requires_grad for t in (stream.pooled, *stream.normed))


@pytest.mark.parametrize("which", ["plain", "qk-norm", "dinov3", "perception"])
def test_kept_keys_and_values_give_what_normalized_inputs_give(which: str, images: torch.Tensor) -> None:
    method = make(torch.float64, which, queries=3, form="auto")
    assert "normed" in method.spec.kept
    assert tuple(method.shared_spec.kept) == ("keys", "values")
    if which not in ROTARY:
        assert "normed" in make(torch.float64, which, form="absorbed").shared_spec.kept
    live, kept = (compute_stream(method.backbone, images, spec) for spec in (method.spec, method.shared_spec))
    assert not any(t.requires_grad for t in (*kept.keys, *kept.values))
    assert torch.allclose(method(kept), method(live), rtol=1e-12, atol=1e-12)


def test_rotary_positions_leave_one_form_whatever_is_cheaper(images: torch.Tensor) -> None:
    """One query, for which absorbing would be cheaper; the stream holds what blocks see, and no scales of keys."""
    auto = make(torch.float64, "dinov3", queries=1, form="auto")
    assert cheaper_form(queries=3, heads=2, width=16) == "absorbed"
    assert auto.spec == StreamSpec(auto.blocks)
    check(auto, "dinov3", images)


def test_the_cheaper_form_depends_on_the_queries_of_all_trials() -> None:
    assert cheaper_form(queries=20, heads=12, width=768) == "absorbed"
    assert cheaper_form(queries=200, heads=12, width=768) == "projected"


def test_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match=r"method.blocks: 3: the backbone's blocks are 0 to 2"):
        make(torch.float32, "plain", blocks=(0, 3))
    with pytest.raises(ValidationError, match="must be increasing block numbers"):
        make(torch.float32, "plain", blocks=(2, 1))


def test_another_kind_of_block_is_refused() -> None:
    from timm.models.vision_transformer import ResPostBlock

    vit = make_vit("class_token", block_fn=ResPostBlock, init_values=0.1)
    backbone = Backbone(vit, mean=MEAN, std=STD, stochastic=False)
    recipe = config_of({"name": "vqt"})
    with pytest.raises(UserError, match="block 0 of the backbone is a ResPostBlock"):
        attach(recipe, backbone, 4)


@pytest.mark.parametrize("per_image", [False, True])
def test_projected_scores_are_not_rounded(per_image: bool) -> None:
    """In bf16 the outputs are off by little more than their own rounding: rounded scores would be 4 times as far off.

    For backward nothing is kept besides queries, keys and values.
    """
    noise = torch.Generator().manual_seed(3)
    q_QHE = torch.randn(*([8] if per_image else []), 5, 4, 32, generator=noise, dtype=torch.float64) * 0.4
    k_BHNE, v_BHNE = torch.randn(2, 8, 4, 60, 32, generator=noise, dtype=torch.float64).bfloat16()
    q_QHE = q_QHE.bfloat16().requires_grad_()
    kept: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found_BQHE = _attend_projected(k_BHNE, v_BHNE, q_QHE)
    assert kept == {t.untyped_storage().data_ptr() for t in (q_QHE, k_BHNE, v_BHNE)}
    exact = q_QHE.detach().double().requires_grad_()
    scores_BHQN = exact.transpose(-3, -2) @ k_BHNE.double().transpose(2, 3)
    wanted_BQHE = (scores_BHQN.softmax(-1) @ v_BHNE.double()).transpose(1, 2)
    rounding = (wanted_BQHE.bfloat16() - wanted_BQHE).norm()
    assert (found_BQHE - wanted_BQHE).norm() < 1.5 * rounding
    gradient_BQHE = torch.randn(found_BQHE.shape, generator=noise)
    (found,) = torch.autograd.grad(found_BQHE, q_QHE, gradient_BQHE.bfloat16())
    (wanted,) = torch.autograd.grad(wanted_BQHE, exact, gradient_BQHE.bfloat16().double())
    assert (found - wanted).norm() < 0.015 * wanted.norm()
