"""Readers of several backbones against float64 mathematics, and against the same readers on concatenated features."""

from typing import Any

import numpy as np
import pytest
import torch

from dist_vpt.backbones.group import BackboneGroup
from dist_vpt.backbones.vit import Backbone
from dist_vpt.data.joined import Joined
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream
from dist_vpt.methods import attach
from dist_vpt.methods.base import Reader
from dist_vpt.methods.combo import Combo
from dist_vpt.methods.fitted import FittedReader, Observed
from dist_vpt.methods.stack import ReaderStack
from tests.methods.conftest import config_of, make_backbone, make_vit, reference_config
from tests.methods.test_readers import LABELS, WEIGHT, assert_close, loss_of
from tests.reference import readers, vit
from tests.training.tape import Waits

# Of different widths, depths, grids and numbers of prefix tokens; and a pair with as many of them.
SMALL: tuple[str, dict[str, Any]] = ("class_token", {})
LARGE: tuple[str, dict[str, Any]] = ("registers", {"embed_dim": 24, "img_size": 32, "depth": 2})
PLAIN: tuple[str, dict[str, Any]] = ("mean_pooled", {"embed_dim": 8, "img_size": 24, "depth": 2})
COMBO = {"name": "combo", "width": 8, "depth": 2, "heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{reads}{' of sums' if summed else ''}": COMBO | {"head_reads": reads, "sum_blocks": summed}
    for reads in ("token", "pooled", "blocks")
    for summed in (False, True)
} | {
    "by token": COMBO | {"head_reads": "token", "standardize": "token"},
    "some blocks on a grid": COMBO | {"head_reads": "blocks", "blocks": (1,), "grid": 3},
    "all tokens": COMBO | {"head_reads": "pooled", "tokens": "all"},
}


def group_of(*members: tuple[str, dict[str, Any]]) -> BackboneGroup:
    return BackboneGroup([make_backbone(kind, **changes) for kind, changes in members])


def images_of(*members: tuple[str, dict[str, Any]]) -> Joined:
    draw = torch.Generator().manual_seed(1)
    sides = [changes.get("img_size", 16) for _, changes in members]
    return Joined(tuple(torch.randint(0, 256, (3, 3, s, s), dtype=torch.uint8, generator=draw) for s in sides))


def made(settings: dict[str, Any], backbone: Backbone, images: Any, dtype: torch.dtype = torch.float32) -> Reader:
    """With random numbers in everything trained, and measured norms."""
    reader = attach(config_of(settings), backbone, 4, torch.float32)
    assert isinstance(reader, Reader)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in reader.trainable():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    reader.to(dtype)
    reader.init_from_images([images], 0)
    return reader


def block_numbers(settings: dict[str, Any], depth: int) -> tuple[int, ...]:
    return settings.get("blocks", tuple(range(depth)))


def expected(
    method: Reader, images: Joined, settings: dict[str, Any], *members: tuple[str, dict[str, Any]]
) -> vit.Result:
    maps, pooled, of_blocks, prefixes = [], [], [], []
    summed = settings.get("sum_blocks", False)
    for (kind, changes), pixels, member in zip(members, images.parts, method.backbone.members, strict=True):
        weights = {n: tensor.double().numpy() for n, tensor in make_vit(kind, **changes).state_dict().items()}
        config = reference_config(kind)
        states = readers.token_stream(weights, config, pixels.numpy())
        maps.append([states[n + 1] for n in block_numbers(settings, len(states) - 1)])
        prefixes.append(member.prefix)
        pooled.append(vit.features_forward(weights, config, pixels.numpy())[0])
        for state in [readers.sum_of_units(maps[-1])] if summed else maps[-1]:
            of_blocks += [readers.unit(state)[:, member.prefix :].mean(axis=1), readers.unit(state)[:, 0]]
    sides = [round(np.sqrt(states[0].shape[1] - prefix)) for states, prefix in zip(maps, prefixes, strict=True)]
    inputs = readers.maps_on_one_grid(
        maps,
        prefixes,
        grid=settings.get("grid", max(sides)),
        tokens=settings.get("tokens", "patches"),
        summed=summed,
        by_token=settings.get("standardize") == "token",
    )
    direct = {"token": [], "pooled": pooled, "blocks": [*pooled, *of_blocks]}[settings["head_reads"]]
    own = {name: p.detach().double().numpy() for name, p in method.trainable()}
    options = {"depth": settings["depth"], "heads": settings["heads"], "smoothing": 0.1}
    return readers.combo(inputs, direct, LABELS.numpy(), own, share=WEIGHT.double().numpy(), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_combo_equals_float64_mathematics(variant: str, dtype: torch.dtype) -> None:
    settings = VARIANTS[variant]
    members = (SMALL, PLAIN) if settings.get("tokens") == "all" else (SMALL, LARGE)
    images = images_of(*members)
    method = made(settings, group_of(*members), images, dtype)
    wanted = expected(method, images, settings, *members)
    logits = method.train()(images)
    assert_close(logits, wanted.logits, "logits")
    loss = loss_of(logits)
    loss.backward()
    assert_close(loss, np.array(wanted.loss), "loss")
    trained = dict(method.trainable())
    assert trained.keys() == wanted.grads.keys()
    for name, parameter in trained.items():
        assert_close(parameter.grad, wanted.grads[name], name)
    assert all(p.grad is None for p in method.backbone.parameters())


@pytest.mark.parametrize("rate", [0.3, 2.0])
@pytest.mark.parametrize("summed", [False, True])
def test_the_group_penalty_equals_float64_mathematics(summed: bool, rate: float) -> None:
    settings = COMBO | {"group_penalty": rate, "sum_blocks": summed}
    method = made(settings, group_of(SMALL, LARGE), images_of(SMALL, LARGE), torch.float64)
    weight = dict(method.trainable())["projection.weight"]
    columns = [16, 24] if summed else [3 * 16, 2 * 24]
    value, grad = readers.group_penalty(weight.detach().numpy(), columns, rate)
    penalty = method.penalty()
    assert isinstance(penalty, torch.Tensor)
    penalty.backward()
    assert_close(penalty, np.array(value), "penalty")
    assert_close(weight.grad, grad, "gradient")
    assert {name for name, p in method.trainable() if p.grad is not None} == {"projection.weight"}


def test_each_reader_of_a_stack_has_its_own_penalty() -> None:
    group, images, rates = group_of(SMALL, LARGE), images_of(SMALL, LARGE), (0.0, 0.3, 2.0)
    stacked = [made(COMBO | {"group_penalty": rate}, group, images) for rate in rates]
    with torch.no_grad():
        for t, reader in enumerate(stacked):
            dict(reader.trainable())["projection.weight"].mul_(1 + t)
    with Waits() as waits:
        penalties_T = Combo.penalties(ReaderStack.of(stacked))
    assert not waits.waited
    assert penalties_T is not None
    alone = [reader.penalty() for reader in stacked]
    torch.testing.assert_close(penalties_T, torch.stack([torch.as_tensor(each) for each in alone]))
    assert penalties_T[0] == 0 < penalties_T[1]


def test_there_is_no_penalty_unless_it_is_asked_for() -> None:
    assert made(COMBO, group_of(SMALL, LARGE), images_of(SMALL, LARGE)).penalty() == 0


# The others: the same method on features that are joined beforehand.


def features_of(backbone: BackboneGroup, images: Joined) -> torch.Tensor:
    return torch.cat(
        [compute_stream(m, part, StreamSpec()).pooled for m, part in zip(backbone.members, images.parts, strict=True)],
        dim=1,
    )


@pytest.mark.parametrize("settings", [{"name": "linear"}, {"name": "mlp", "layers": 2, "width": 8}], ids=str)
@pytest.mark.parametrize("head", ["published", "standardized"])
def test_others_read_joined_features(settings: dict[str, Any], head: str) -> None:
    """As they would read one backbone of this width."""
    group, images = group_of(SMALL, LARGE, PLAIN), images_of(SMALL, LARGE, PLAIN)
    wide = make_backbone(embed_dim=16 + 24 + 8)
    stream = StreamOutput(features_of(group, images))
    method = made(settings | {"head": head}, group, images)
    other = made(settings | {"head": head}, wide, stream)
    assert {n: t.shape for n, t in method.adapter_tensors()} == {n: t.shape for n, t in other.adapter_tensors()}
    torch.testing.assert_close(method.eval()(images), other.eval().read(stream), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["knn", "logistic"])
@pytest.mark.parametrize("head", ["published", "standardized"])
def test_fitted_readers_read_joined_features(name: str, head: str) -> None:
    settings = {"name": name, "head": head} | ({"k": 2} if name == "knn" else {})
    group, images = group_of(SMALL, LARGE, PLAIN), images_of(SMALL, LARGE, PLAIN)
    joined = features_of(group, images)
    features_nF = torch.cat([joined, joined + torch.randn(3, 48, generator=torch.Generator().manual_seed(2))])
    observed = Observed(features_nF, torch.tensor([0, 1, 2, 0, 1, 3]), torch.ones(6))
    each = [attach(config_of(settings), backbone, 4) for backbone in (group, make_backbone(embed_dim=48))]
    for reader in each:
        assert isinstance(reader, FittedReader)
        reader.fit([reader], observed)
    several, one = each
    assert isinstance(several, Reader)
    assert isinstance(one, Reader)
    torch.testing.assert_close(several(images), one.read(StreamOutput(joined)), rtol=0, atol=0)
    assert several(images).argmax(1).tolist() != [0, 0, 0]


def test_linear_reads_the_blocks_of_all() -> None:
    group, images = group_of(SMALL, LARGE), images_of(SMALL, LARGE)
    method = made({"name": "linear", "reads": "blocks"}, group, images, torch.float64)
    pooled, blocks = [], []
    for (kind, changes), pixels, member in zip((SMALL, LARGE), images.parts, group.members, strict=True):
        weights = {n: tensor.double().numpy() for n, tensor in make_vit(kind, **changes).state_dict().items()}
        config = reference_config(kind)
        pooled.append(vit.features_forward(weights, config, pixels.numpy())[0])
        for state in readers.token_stream(weights, config, pixels.numpy())[1:]:
            tokens = readers.unit(state)
            blocks += [tokens[:, member.prefix :].mean(axis=1), tokens[:, 0]]
    own = {name: p.detach().double().numpy() for name, p in method.trainable()}
    features = np.concatenate([*pooled, *blocks], axis=1)
    wanted = readers.linear(features, LABELS.numpy(), own, WEIGHT.double().numpy(), 0.1)
    logits = method.train()(images)
    assert_close(logits, wanted.logits, "logits")
    loss_of(logits).backward()
    for name, parameter in method.trainable():
        assert_close(parameter.grad, wanted.grads[name], name)


# What several backbones cannot do


@pytest.mark.parametrize(
    ("settings", "members", "message"),
    [
        (
            {"tokens": "all"},
            (SMALL, LARGE),
            r"method.tokens = all: the backbones have 1 and 3 class tokens and registers, and those of one position "
            r"are concatenated; set method.tokens=patches",
        ),
        (
            {},
            (SMALL, ("class_token", {"img_size": (16, 24)})),
            r"^backbones\[1\]: method.name = combo: the backbone's 6 patches are no square grid",
        ),
        (
            {"blocks": (0, 2)},
            (SMALL, LARGE),
            r"^backbones\[1\]: method.blocks: 2: the backbone's blocks are 0 to 1; leave it out",
        ),
    ],
)
def test_what_combo_cannot_read(
    settings: dict[str, Any], members: tuple[tuple[str, dict[str, Any]], ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        attach(config_of(COMBO | settings), group_of(*members), 4)


@pytest.mark.parametrize("name", ["vpt", "lora", "vqt", "ladder", "side", "full"])
def test_methods_of_one_backbone_do_not_attach_to_several(name: str) -> None:
    with pytest.raises(UserError, match=r"method.name = \w+: has one backbone; use `backbone` for `backbones`"):
        attach(config_of({"name": name}), group_of(SMALL, LARGE), 4)
