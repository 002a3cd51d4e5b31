"""``dist_vpt.attach``: a method on a timm model, in a loop that is not ours."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import dist_vpt
from dist_vpt.errors import RecipeError, UserError
from dist_vpt.methods import METHODS, attach
from dist_vpt.methods.base import Reader
from tests.methods.conftest import KINDS, config_of, make_backbone, make_vit

FITTED = ("knn", "logistic")
SMALL: dict[str, dict[str, Any]] = {"combo": {"width": 8, "depth": 1, "heads": 2}, "ladder": {"heads": 2}}


@pytest.fixture
def normalized() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, count: int = 2) -> float:
    labels = torch.arange(len(images)) % 2
    for _ in range(count):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_what_the_timm_model_takes(kind: str, normalized: Tensor) -> None:
    with torch.no_grad():
        wanted = make_vit(kind).eval()(normalized)
        method = dist_vpt.attach("linear", make_vit(kind), 2)
        assert torch.equal(method.features(normalized), wanted)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FITTED])
def test_only_the_method_is_trained(name: str, normalized: Tensor) -> None:
    torch.manual_seed(1)
    model = dist_vpt.attach(name, make_vit(), ["a", "b"], images=normalized, **SMALL.get(name, {}))
    trained = {key for key, _ in model.trainable()}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    steps(model.train(), torch.optim.AdamW(model.trainable(), lr=1e-2), normalized, 3)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == trained
    assert model(normalized).shape == (4, 2)


@pytest.mark.parametrize("name", ["vpt", "lora", "vqt", "linear"])
def test_it_is_the_method_of_a_run(name: str) -> None:
    """The same weights and pixels, once normalized by the backbone and once before."""
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    backbone = make_backbone()
    normalized = (pixels.float() - backbone.mean) / backbone.std
    torch.manual_seed(0)
    ours = attach(config_of({"name": name}), backbone, 2)
    vit = make_vit()
    torch.manual_seed(0)
    called = dist_vpt.attach(config_of({"name": name}), vit, 2)
    with torch.no_grad():
        assert torch.equal(ours(pixels), called(normalized))


def test_names_of_recipes_and_settings() -> None:
    assert dist_vpt.attach("vpt_shallow", make_vit(), 2).recipe.deep is False
    assert dist_vpt.attach("vpt_deep", make_vit(), 2, prompts=3).prompts.shape[:2] == (3, 3)
    assert dist_vpt.attach({"name": "lora", "rank": 2}, make_vit(), 2, alpha=4.0).recipe.alpha == 4


def test_initialized_from_training_images(normalized: Tensor) -> None:
    """The head's normalization, and the scale of prompts, as a run measures them."""
    batches = [normalized[:2], normalized[2:]]
    model = dist_vpt.attach("vpt", make_vit(), 2, images=batches)
    with torch.no_grad():
        features = model.features(normalized).double()
    assert features.mean(0).abs().max() < 1e-4
    without = dist_vpt.attach("vpt", make_vit(), 2)
    assert without.token_scale.eq(1).all()
    assert model.token_scale.ne(1).all()
    one = dist_vpt.attach("vpt", make_vit(), 2, images=normalized)
    assert one.token_scale.numpy() == pytest.approx(model.token_scale.numpy(), rel=1e-5)


def test_drop_paths_of_the_model_act_in_training(normalized: Tensor) -> None:
    model = dist_vpt.attach("vpt", make_vit(drop_path_rate=0.9), 2).train()
    model.head.weight.data.normal_()
    assert not torch.equal(model(normalized), model(normalized))
    model.eval()
    assert torch.equal(model(normalized), model(normalized))


def test_half_precision(normalized: Tensor) -> None:
    model = dist_vpt.attach("vpt", make_vit(), 2, dtype=torch.bfloat16, images=normalized)
    assert {p.dtype for _, p in model.trainable()} == {torch.float32}
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert model(normalized).dtype == torch.float32


def test_readers_need_no_gradient_in_the_backbone(normalized: Tensor) -> None:
    model = dist_vpt.attach("vqt", make_vit(), 2)
    assert isinstance(model, Reader)
    stream = model.stream(normalized)
    assert not stream.pooled.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "vtp"}, RecipeError, "recipe: vtp"),
        ({"method": "vpt", "promts": 3}, RecipeError, "method.promts = 3: unknown key; did you mean 'prompts'"),
        ({"method": "knn"}, UserError, "computed from all features at once"),
        ({"method": "vpt", "location": "pad", "deep": False}, UserError, "another location"),
        ({"method": 3}, RecipeError, "give a name"),
        ({"classes": 1}, UserError, "two or more"),
        ({"classes": ["one"]}, UserError, "two or more"),
        ({"model": timm.create_model("resnet18")}, UserError, "the model is a ResNet"),
        ({"model": torch.nn.Linear(2, 2)}, UserError, "the model is a Linear"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dist_vpt.attach(**({"method": "vpt", "model": make_vit(), "classes": 3} | arguments))
