"""Tiny backbones with every seam that timm's ViTs and EVAs have."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from dist_vpt.backbones.eva import EvaBackbone
from dist_vpt.backbones.vit import Backbone
from dist_vpt.methods.base import Method
from dist_vpt.methods.config import MethodConfig
from tests.evas import EVAS, REFERENCE
from tests.reference import vit as reference

MEAN, STD = (0.45, 0.5, 0.4), (0.2, 0.25, 0.3)
SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
KINDS: dict[str, dict[str, Any]] = {
    "class_token": {},
    "registers": {"reg_tokens": 2, "qk_norm": True, "init_values": 0.5, "no_embed_class": True},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "mean_pooled": {"global_pool": "avg", "pre_norm": True},
} | EVAS
ROTARY = [kind for kind, options in REFERENCE.items() if "rotary" in options]


def make_vit(kind: str = "class_token", **changes: Any) -> VisionTransformer | Eva:
    """A tiny ViT whose every weight is random: timm's zero biases and unit scales would hide mistakes.

    Of a SwiGLU, which multiplies two layers, weights are smaller: it would amplify float32's rounding to the tolerance.
    """
    deviation = 0.2 if kind.endswith("swiglu") else 0.3
    torch.manual_seed(0)
    vit = (Eva if kind in EVAS else VisionTransformer)(**(SHAPE | KINDS[kind] | changes))
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            noise = torch.randn_like(parameter) * deviation
            parameter.copy_(1 + noise if parameter.ndim == 1 and "bias" not in name else noise)
    return vit


def make_backbone(kind: str = "class_token", *, stochastic: bool = False, **changes: Any) -> Backbone:
    made = EvaBackbone if kind in EVAS else Backbone
    return made(make_vit(kind, **changes), mean=MEAN, std=STD, stochastic=stochastic).requires_grad_(False)


def reference_config(kind: str, **more: Any) -> reference.Config:
    """The reference's description of a tiny backbone."""
    vit = make_vit(kind)
    shape = {"num_heads": 2, "patch_size": 8, "mean": MEAN, "std": STD}
    return reference.Config(
        **shape, pool=vit.global_pool, no_embed_class=vit.no_embed_class, **REFERENCE.get(kind, {}), **more
    )


def config_of(settings: dict[str, Any]) -> MethodConfig:
    """A method's settings, with the published head and initial tokens unless given: those of a default start at 0."""
    published = {"head": "published"} | ({"init": "random"} if settings["name"] in ("vpt", "vqt") else {})
    return TypeAdapter(MethodConfig).validate_python(published | settings)


def assert_equal_steps(one: Method, other: Method, loss_of: Callable[[Method], torch.Tensor]) -> None:
    """Losses and gradients of two methods to the last bit."""
    losses = []
    for method in (one, other):
        method.train()
        torch.manual_seed(1)
        losses.append(loss_of(method))
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, a), (_, b) in zip(one.trainable(), other.trainable(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
