"""Default heads and tokens: training does not depend on the scale of a backbone's features and tokens."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.methods import attach
from dist_vpt.methods.base import Method
from dist_vpt.methods.config import MethodConfig
from dist_vpt.methods.head import FeatureNorm
from tests.methods.conftest import config_of, make_backbone

CLASSES = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "mlp": {"name": "mlp", "layers": 2},
    "side": {"name": "side", "layers": 1, "channels": 2},
    "combo": {"name": "combo", "width": 8, "depth": 1},
    "ladder": {"name": "ladder", "reduction": 2, "heads": 2},
    "ladder last": {"name": "ladder", "kind": "last", "rank": 4},
    "vqt": {"name": "vqt", "queries": 2},
    "vqt, not normalized": {"name": "vqt", "normalize": False},
    "vpt deep": {"name": "vpt", "prompts": 3},
    "vpt shallow": {"name": "vpt", "prompts": 3, "deep": False},
    "vpt shared": {"name": "vpt", "prompts": 3, "shared": True},
    "vpt, add": {"name": "vpt", "location": "add"},
    "lora": {"name": "lora", "rank": 2},
}


def images_of(seed: int, number: int = 24) -> Tensor:
    return torch.randint(0, 256, (number, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def scaled(backbone: Backbone, factor: float) -> Backbone:
    """Its tokens and features made larger by a factor: what the blocks read is normalized, and stays the same."""
    tensors = [backbone.stem.cls_token, backbone.stem.pos_embed, *backbone.stem.patch_embed.proj.parameters()]
    for block in backbone.blocks:
        tensors += [*block.attn.proj.parameters(), *block.mlp.fc2.parameters()]
        for norm in (block.norm1, block.norm2):
            norm.eps *= factor**2
    backbone.norm.eps *= factor**2
    for tensor in (*tensors, *backbone.norm.parameters()):
        tensor.mul_(factor)
    return backbone


def default(settings: dict[str, Any], backbone: Backbone) -> Method:
    torch.manual_seed(0)
    return attach(TypeAdapter(MethodConfig).validate_python(settings), backbone, CLASSES)


def trained(settings: dict[str, Any], backbone: Backbone) -> tuple[float, Tensor]:
    """The loss before the first step, and logits after five steps of AdamW."""
    method, images = default(settings, backbone), images_of(1)
    labels = torch.arange(len(images)) % CLASSES
    if method.inits_from_images:
        method.init_from_images([images[:16], images[16:]], seed=0)
    optimizer = torch.optim.AdamW([p for _, p in method.trainable()], lr=1e-2)
    first = None
    for _ in range(5):
        loss = F.cross_entropy(method.train()(images), labels)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first is not None
    with torch.no_grad():
        return first, method.eval()(images_of(2))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_training_does_not_depend_on_the_scale(name: str, factor: float) -> None:
    loss, logits = trained(SETTINGS[name], make_backbone())
    loss_scaled, logits_scaled = trained(SETTINGS[name], scaled(make_backbone(), factor))
    assert loss == pytest.approx(math.log(CLASSES), abs=1e-6)  # all classes are equally likely
    assert loss_scaled == pytest.approx(loss, abs=1e-6)
    assert logits.abs().max() > 0.05  # it has learned something
    assert (logits_scaled - logits).abs().max() < 1e-3 * logits.abs().max()


@pytest.mark.parametrize("name", ["linear", "vpt deep"])
def test_a_published_start_depends_on_it(name: str) -> None:
    """That the test above can fail."""
    found = []
    for each in (make_backbone(), scaled(make_backbone(), 10.0)):
        torch.manual_seed(0)
        method = attach(config_of(SETTINGS[name]), each, CLASSES)
        assert not method.inits_from_images
        found.append(method(images_of(1)).detach())
    assert (found[0] - found[1]).abs().max() > 0.1 * found[0].abs().max()


def test_features_are_standardized() -> None:
    """Against float64: mean 0, equal deviations, a root mean square length of 20; hardly varying ones stay small."""
    draw = np.random.default_rng(0)
    features_XF = draw.normal(3, [[5.0, 0.1, 40.0, 0.0, 1e-7]], (50, 5))
    norm = FeatureNorm(5)
    norm.start()
    for part in (features_XF[:20], features_XF[20:]):
        seen = norm(torch.from_numpy(part).float())
        assert torch.equal(seen, torch.from_numpy(part).float())  # as it is until it is measured
    norm.finish()
    deviations = features_XF.std(0)
    least = 1e-2 * math.sqrt((deviations**2).mean())
    wanted = (features_XF - features_XF.mean(0)) / np.maximum(deviations, least) * 20 / math.sqrt(5)
    found = norm(torch.from_numpy(features_XF).float()).numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(found[:, 3:]).max() < 0.01
    assert np.sqrt((found[:, [0, 2]] ** 2).mean(0)) == pytest.approx(20 / math.sqrt(5), rel=1e-4)


@pytest.mark.parametrize("size", [0.0, 3.0])
@pytest.mark.parametrize("images", [1, 4])
def test_one_image_says_nothing_of_deviations(images: int, size: float) -> None:
    """And other images are then no larger than their features, over the root mean square of the first ones."""
    norm, seen = FeatureNorm(2), torch.tensor([size, -size])
    norm.start()
    norm(seen.expand(images, -1))
    norm.finish()
    assert torch.equal(norm(seen), torch.zeros(2))
    other = torch.tensor([2.0, 5.0])
    assert torch.allclose(norm(other), (other - seen) / (size or 1.0) * 20 / math.sqrt(2))


@pytest.mark.parametrize("name", ["vpt deep", "vqt"])
def test_the_size_of_batches_changes_nothing(name: str) -> None:
    images, found = images_of(1, 40), []
    for size in (1, 7, 40):
        method = default(SETTINGS[name], make_backbone())
        method.init_from_images(images.split(size), seed=0)
        found.append({key: t for key, t in method.adapter_tensors() if key.startswith(("feature_norm", "token_scale"))})
    for other in found[1:]:
        for key, tensor in other.items():
            assert torch.allclose(tensor, found[0][key], rtol=1e-4, atol=1e-6), key


def test_readers_are_initialized_together_as_alone() -> None:
    backbone, batches = make_backbone(), images_of(1).split(10)
    together = [default({"name": "vqt", "queries": queries}, backbone) for queries in (1, 2)]
    Method.init_together(together, batches, seed=0)
    for queries, method in enumerate(together, start=1):
        alone = default({"name": "vqt", "queries": queries}, make_backbone())
        alone.init_from_images(batches, seed=0)
        for (key, found), (_, wanted) in zip(method.adapter_tensors(), alone.adapter_tensors(), strict=True):
            assert torch.allclose(found, wanted, atol=1e-5), key


@pytest.mark.parametrize("name", ["vpt deep", "vpt shared", "vpt, add", "vqt"])
def test_scaled_tokens_are_multiples(name: str) -> None:
    """Logits of tokens that are the products themselves, and the gradients of the chain rule."""
    method = default(SETTINGS[name], make_backbone())
    plain = attach(config_of(SETTINGS[name]), make_backbone(), CLASSES)
    method.init_from_images([images_of(1)], seed=0)
    raw, scale = (method.prompts, "prompts") if name.startswith("vpt") else (method.queries, "queries")
    factors = method.token_scale.view(-1, 1, 1)
    assert factors.unique().numel() == len(factors) > 1  # another one for each block
    with torch.no_grad():
        getattr(plain, scale).copy_(raw * factors)
        for key, tensor in method.plain_head().items():
            plain.head.get_parameter(key).copy_(tensor)
        method.head.weight.normal_()
        for key, tensor in method.plain_head().items():
            plain.head.get_parameter(key).copy_(tensor)
    logits = [each.train()(images_of(2)) for each in (method, plain)]
    assert torch.allclose(*logits, atol=1e-3, rtol=1e-3)
    for each in logits:
        each.square().sum().backward()
    wanted = getattr(plain, scale).grad * factors
    assert (raw.grad - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_the_scale_is_that_of_the_tokens_before_each_block() -> None:
    backbone, images = make_backbone(), images_of(1)
    method = default({"name": "vpt", "prompts": 1}, backbone)
    method.init_from_images([images], seed=0)
    tokens, wanted = backbone.embed(images), []
    for block in backbone.blocks:
        wanted.append(np.sqrt((tokens.double().numpy() ** 2).mean()) / 0.1)
        tokens = block(tokens)
    assert method.token_scale.tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("location", ["prepend-pixel", "pad", "below"])
def test_pixels_have_no_scale(location: str) -> None:
    method = default(
        {"name": "vpt", "deep": False, "location": location, "prompts": 4},
        make_backbone(img_size=24 if location == "pad" else 16),
    )
    assert method.token_scale is None


@pytest.mark.parametrize("name", SETTINGS)
def test_what_was_measured_belongs_to_the_adapters(name: str) -> None:
    method = default(SETTINGS[name], make_backbone())
    names = {key for key, _ in method.adapter_tensors()}
    of_stream = {f"stream_norms.{block}.{kind}" for block in range(3) for kind in ("mean", "std")}
    always = of_stream if name == "combo" else set()
    measured = {"feature_norm.mean", "feature_norm.std"} | always
    measured |= {"token_scale"} if name.startswith(("vpt", "vqt")) else set()
    assert names == {key for key, _ in method.trainable()} | measured
    published = attach(config_of(SETTINGS[name]), make_backbone(), CLASSES)
    assert {key for key, _ in published.adapter_tensors()} == {key for key, _ in published.trainable()} | always
