"""Combo and ladder against slow float64 mathematics: features, logits, loss and the gradient of all that is trained."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import compute_stream
from dist_vpt.methods import attach
from dist_vpt.methods.base import Reader
from dist_vpt.methods.config import MethodConfig
from dist_vpt.methods.stack import RandomSource, ReaderStack
from tests.methods.conftest import KINDS, ROTARY, config_of, make_backbone, make_vit, reference_config
from tests.reference import readers, vit

# Each tensor's largest error, relative to its largest number; in bf16 the error of all numbers, relative to all.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.03}
LABELS = torch.tensor([0, 2, 1])
WEIGHT = torch.tensor([1.0, 0.5, 2.0])

COMBO = {"name": "combo", "width": 8, "depth": 2, "heads": 2, "head_reads": "token"}
LADDER = {"name": "ladder", "reduction": 2, "heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "linear on blocks": {"name": "linear", "reads": "blocks"},
    "combo": COMBO,
    "combo, wide MLP": COMBO | {"mlp_ratio": 2, "heads": 4},
    "combo, pooled": COMBO | {"head_reads": "pooled"},
    "combo, direct": COMBO | {"head_reads": "blocks"},
    "combo, direct and all tokens, some blocks": COMBO | {"head_reads": "blocks", "tokens": "all", "blocks": (0, 2)},
    "combo, some blocks": COMBO | {"blocks": (0, 2)},
    "combo, all tokens": COMBO | {"tokens": "all"},
    "combo, by token": COMBO | {"standardize": "token"},
    "combo, larger grid": COMBO | {"grid": 3},
    "combo, smaller grid, all tokens": COMBO | {"grid": 1, "tokens": "all"},
    "combo, sum": COMBO | {"sum_blocks": True},
    "combo, sum, direct": COMBO | {"sum_blocks": True, "head_reads": "blocks", "grid": 3},
    "combo, sum of some blocks, all tokens": COMBO | {"sum_blocks": True, "blocks": (0, 2), "tokens": "all"},
    "ladder": LADDER,
    "ladder, default MLP": LADDER | {"mlp_ratio": 1, "heads": 1},
    "last": {"name": "ladder", "kind": "last", "rank": 4, "heads": 2},
}


def make(settings: dict[str, Any], kind: str, dtype: torch.dtype, images: torch.Tensor) -> Reader:
    """With random numbers in everything trained, and measured norms."""
    backbone = make_backbone(kind)
    method = attach(config_of(settings), backbone, 4, torch.float32)
    assert isinstance(method, Reader)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in method.trainable():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    method.to(dtype)
    method.init_from_images([images[:2], images[2:]], 0)
    return method


def expected(method: Reader, kind: str, images: torch.Tensor, settings: dict[str, Any]) -> vit.Result:
    model = make_vit(kind)
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    config = reference_config(kind)
    own = {name: p.detach().double().numpy() for name, p in method.trainable()}
    states, prefix = readers.token_stream(weights, config, images.numpy()), method.backbone.prefix
    options: dict[str, Any] = {"smoothing": 0.1, "share": WEIGHT.double().numpy(), "heads": settings.get("heads")}
    if settings["name"] == "linear":
        units = [readers.unit(state) for state in states[1:]]
        direct = [vit.features_forward(weights, config, images.numpy())[0]]
        for tokens in units:
            direct.append(tokens[:, prefix:].mean(axis=1))
            direct += [tokens[:, 0]] if "cls_token" in weights else []
        return readers.linear(np.concatenate(direct, axis=1), LABELS.numpy(), own, WEIGHT.double().numpy(), 0.1)
    if settings["name"] == "combo":
        inputs, direct = [], []
        if settings["head_reads"] != "token":
            direct.append(vit.features_forward(weights, config, images.numpy())[0])
        maps = [states[number + 1] for number in settings.get("blocks", range(3))]
        for state in [readers.sum_of_units(maps)] if settings.get("sum_blocks") else maps:
            if settings["head_reads"] == "blocks":
                direct.append(readers.unit(state)[:, prefix:].mean(axis=1))
                direct += [readers.unit(state)[:, 0]] if "cls_token" in weights else []
            patches = state[:, prefix:]
            if "grid" in settings:
                patches = readers.resample(patches, settings["grid"])
            tokens = np.concatenate([state[:, :prefix], patches], axis=1) if settings.get("tokens") else patches
            by_token = settings.get("standardize") == "token"
            inputs.append(readers.unit(tokens) if by_token else readers.per_channel(tokens, tokens))
        return readers.combo(inputs, direct, LABELS.numpy(), own, depth=settings["depth"], **options)
    pooled, _ = vit.features_forward(weights, config, images.numpy())
    token = slice(0, 1) if model.global_pool == "token" else slice(prefix, None)
    return readers.ladder(states, pooled, token, LABELS.numpy(), own, kind=settings.get("kind", "lst"), **options)


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    weight = WEIGHT.to(logits.dtype)
    return (F.cross_entropy(logits, LABELS, reduction="none", label_smoothing=0.1) * weight).sum() / weight.sum()


def assert_close(found: torch.Tensor | None, wanted: np.ndarray, name: str) -> None:
    assert found is not None, name
    assert found.shape == wanted.shape
    error = np.abs(found.detach().double().numpy() - wanted).max() / np.abs(wanted).max()
    assert error < TOLERANCE[found.dtype], f"{name}: off by {error:.2e}"


# timm holds the angles of rotary positions in float32.
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (kind, dtype)
        for kind in KINDS
        for dtype in (torch.float64, torch.float32)
        if dtype == torch.float32 or kind not in ROTARY
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_float64_mathematics(variant: str, kind: str, dtype: torch.dtype, images: torch.Tensor) -> None:
    settings = VARIANTS[variant]
    method = make(settings, kind, dtype, images)
    wanted = expected(method, kind, images, settings)
    logits = method.train()(images)
    assert_close(logits, wanted.logits, "logits")
    loss = loss_of(logits)
    loss.backward()
    assert_close(loss, np.array(wanted.loss), "loss")
    trained = dict(method.trainable())
    assert trained.keys() == wanted.grads.keys()
    for name, parameter in trained.items():
        assert_close(parameter.grad, wanted.grads[name], name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_is_within_its_rounding(variant: str, images: torch.Tensor) -> None:
    settings = VARIANTS[variant]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        method = attach(config_of(settings), make_backbone(), 4, dtype)
        torch.manual_seed(3)
        with torch.no_grad():
            for _, parameter in method.trainable():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        method.init_from_images([images], 0)
        loss_of(method.train()(images)).backward()
        found.append(torch.cat([p.grad.flatten() for _, p in method.trainable() if p.grad is not None]))
        assert {p.dtype for _, p in method.trainable()} == {torch.float32}
    assert (found[1] - found[0]).norm() / found[0].norm() < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ladder", "last"])
def test_a_ladder_starts_as_linear_probing(name: str, kind: str, images: torch.Tensor) -> None:
    ladder, linear = (
        attach(config_of(settings | {"head": "standardized"}), make_backbone(kind), 4)
        for settings in (VARIANTS[name], {"name": "linear"})
    )
    for method in (ladder, linear):
        torch.manual_seed(5)
        method.init_from_images([images], 0)
        torch.nn.init.normal_(method.head.weight)  # type: ignore[arg-type]
    wanted = linear(images)
    assert (ladder(images) - wanted).abs().max() < 1e-6 * wanted.abs().max()


def with_dropout(settings: dict[str, Any], rates: Sequence[float], images: torch.Tensor) -> list[Reader]:
    backbone, made = make_backbone(), []
    for t, rate in enumerate(rates):
        torch.manual_seed(t)
        reader = attach(config_of(settings | {"dropout": rate}), backbone, 4)
        assert isinstance(reader, Reader)
        with torch.no_grad():
            for _, parameter in reader.trainable():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        made.append(reader)
    Reader.init_together(made, [images], 0)
    return [reader.train() for reader in made]


@pytest.mark.parametrize("variant", ["combo", "combo, all tokens", "combo, sum, direct", "ladder", "last"])
def test_readers_together_equal_each_alone(variant: str, images: torch.Tensor) -> None:
    """Also with dropout, which each draws as it would alone."""
    each, seeds = with_dropout(VARIANTS[variant], (0.0, 0.5, 0.2), images), [7, 8, 9]
    stack = ReaderStack.of(each)
    stream = compute_stream(each[0].backbone, images, each[0].spec)
    sources = [RandomSource.seeded(seed, torch.device("cpu")) for seed in seeds]
    logits_TBK = type(each[0]).read_stacks([stack], stream, [sources])[0]
    sum(loss_of(logits_BK) for logits_BK in logits_TBK).backward()  # type: ignore[union-attr]
    together = [{name: p.grad.clone() for name, p in reader.trainable() if p.grad is not None} for reader in each]
    for reader, seed, logits_BK, grads in zip(each, seeds, logits_TBK, together, strict=True):
        reader.zero_grad()
        torch.manual_seed(seed)
        alone_BK = reader(images)
        torch.testing.assert_close(logits_BK, alone_BK, rtol=1e-5, atol=1e-6)
        loss_of(alone_BK).backward()
        assert len(grads) == len(list(reader.trainable()))
        for name, parameter in reader.trainable():
            assert_close(grads[name], parameter.grad.double().numpy(), name)


@pytest.mark.parametrize("variant", ["combo", "ladder", "last"])
def test_dropout_acts_in_training_alone(variant: str, images: torch.Tensor) -> None:
    (reader,) = with_dropout(VARIANTS[variant], (0.5,), images)
    torch.manual_seed(0)
    first = reader(images)
    assert not torch.equal(first, reader(images))
    reader.eval()
    assert torch.equal(reader(images), reader(images))


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("variant", ["combo", "combo, by token", "combo, sum", "ladder", "last"])
def test_the_scale_of_tokens_does_not_matter(variant: str, factor: float, images: torch.Tensor) -> None:
    settings = VARIANTS[variant] | {"head": "standardized"}
    method = attach(config_of(settings), make_backbone(), 4)
    assert isinstance(method, Reader)
    logits = []
    for by in (1.0, factor):
        torch.manual_seed(1)
        with torch.no_grad():
            for _, parameter in method.trainable():
                parameter.copy_(torch.randn_like(parameter))
        stream = compute_stream(method.backbone, images, method.spec)
        stream = stream._replace(pooled=by * stream.pooled, states=tuple(by * state for state in stream.states))
        for norm in method.norms:
            norm.start()
        method.measure(stream)
        for norm in method.norms:
            norm.finish()
        logits.append(method.read(stream))
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-3, atol=2e-3)


def test_wrong_settings_are_named() -> None:
    for settings, message in (
        ({"name": "combo", "width": 10, "heads": 4}, "heads = 4, width = 10: heads must divide the width"),
        ({"name": "combo", "blocks": (2, 1)}, r"blocks = \[2, 1\]: must be increasing block numbers from 0"),
        (
            {"name": "ladder", "kind": "last", "reduction": 4},
            "reduction = 4: kind = last does not read it; leave it out",
        ),
        ({"name": "ladder", "rank": 4}, "rank = 4: kind = lst does not read it; leave it out"),
        ({"name": "ladder", "kind": "last", "rank": 6}, "heads = 4, rank = 6: heads must divide the rank"),
    ):
        with pytest.raises(ValidationError, match=message):
            TypeAdapter(MethodConfig).validate_python(settings)
    with pytest.raises(UserError, match=r"method.blocks: 3: the backbone's blocks are 0 to 2; leave it out"):
        attach(config_of({"name": "combo", "blocks": (1, 3)}), make_backbone(), 4)
