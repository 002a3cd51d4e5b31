"""Backbones by name: described, built frozen, and refused where they cannot be tuned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from dist_vpt.backbones import build as module
from dist_vpt.backbones.build import DEMO, build, preprocessing_of
from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError, WeightsError

SMALL = "test_vit"  # timm's own model for tests: width 64, 6 blocks, patches of 16 pixels


def built(image_size: int = 32, dtype: torch.dtype = torch.float32, **settings: Any) -> Backbone:
    recipe = BackboneConfig(**({"name": SMALL, "weights": "random"} | settings))
    preprocessing = preprocessing_of(recipe)
    return build(recipe, image_size=image_size, mean=preprocessing.mean, std=preprocessing.std)[0].hold_in(dtype)


def refused(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        built(**settings)
    return str(caught.value)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_preprocessing_that_weights_want() -> None:
    demo = preprocessing_of(BackboneConfig())
    assert (demo.image_size, demo.mean, demo.std, demo.interpolation) == (24, (0.5,) * 3, (0.5,) * 3, "bicubic")
    augreg = preprocessing_of(BackboneConfig(name="vit_base_patch16_224.augreg_in21k"))
    assert (augreg.image_size, augreg.mean, augreg.interpolation) == (224, (0.5,) * 3, "bicubic")
    deit = preprocessing_of(BackboneConfig(name="deit3_small_patch16_384"))
    assert (deit.image_size, deit.mean, deit.std) == (384, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_demo_backbone_is_its_file() -> None:
    backbone = built(name="demo", weights="pretrained", image_size=24)
    file = load_file(DEMO)
    own = {name.removeprefix("stem."): tensor for name, tensor in backbone.state_dict().items()}
    assert own.keys() == file.keys()
    assert all(torch.equal(own[name], tensor.float()) for name, tensor in file.items())
    features_BD = backbone.pool(backbone(torch.zeros(2, 3, 24, 24, dtype=torch.uint8)))
    assert features_BD.shape == (2, 128)
    assert features_BD.isfinite().all()


def test_the_demo_backbone_at_another_image_size() -> None:
    small, large = (
        built(name="demo", weights="pretrained", image_size=24),
        built(name="demo", weights="pretrained", image_size=48),
    )
    assert large.patches == 4 * small.patches
    assert large.pool(large(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))).isfinite().all()


def test_a_backbone_is_frozen_and_in_eval_mode() -> None:
    backbone = built()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(m.training for m in backbone.modules())
    assert not backbone.train().training


def test_stochastic_depth_grows_to_the_recipes_rate() -> None:
    backbone = built(drop_path=0.3)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in backbone.blocks]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.3)
    assert rates == sorted(rates)
    assert backbone.train().training


def test_random_weights_are_those_of_the_seed(images: torch.Tensor) -> None:
    def features(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        backbone = built()
        return backbone.pool(backbone(images))

    assert torch.equal(features(0), features(0))
    assert not torch.equal(features(0), features(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_held_in_a_dtype_and_pixels_are_normalized_in_float32(dtype: torch.dtype) -> None:
    backbone = built(dtype=dtype)
    assert {p.dtype for p in backbone.parameters()} == {dtype}
    assert backbone.dtype == dtype
    assert backbone.mean.dtype == backbone.std.dtype == torch.float32
    assert torch.equal(backbone.mean.flatten(), torch.full((3,), 127.5))
    seen = []
    backbone.stem.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 3, 32, 32)
    backbone(images)
    assert torch.equal(seen[0], ((images.float() - 127.5) / 127.5).to(dtype))


def test_features_in_bf16_are_close_to_float32(images: torch.Tensor) -> None:
    whole, half = (built(name="demo", weights="pretrained", dtype=d) for d in (torch.float32, torch.bfloat16))
    expected, found = whole.pool(whole(images)), half.pool(half(images)).float()
    assert torch.cosine_similarity(expected, found).min() > 0.99


# Pooling


def test_pooling_of_the_recipe_reads_other_tokens_of_the_same_weights(images: torch.Tensor) -> None:
    own, token, avg = (built(name="demo", weights="pretrained", global_pool=pool) for pool in (None, "token", "avg"))
    tokens_BND = own(images)
    for other in (token, avg):
        assert torch.equal(other(images), tokens_BND)
    assert torch.equal(own.pool(tokens_BND), tokens_BND[:, 0])
    assert torch.equal(token.pool(tokens_BND), tokens_BND[:, 0])
    assert torch.allclose(avg.pool(tokens_BND), tokens_BND[:, 1:].mean(1), atol=1e-6)


def test_a_mean_pooled_models_own_norm_stays_where_it_was(
    images: torch.Tensor, tiny_vit: Callable[..., VisionTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_create", lambda *_: tiny_vit(img_size=32, global_pool="avg"))
    avg, token = built(), built(global_pool="token")  # mean of the patches, then fc_norm
    tokens_BND = avg(images)
    assert torch.equal(token(images), tokens_BND)
    assert torch.allclose(avg.pool(tokens_BND), avg.fc_norm(tokens_BND[:, 1:].mean(1)), atol=1e-6)
    assert torch.allclose(token.pool(tokens_BND), token.fc_norm(tokens_BND[:, 0]), atol=1e-6)


def test_pooling_instead_of_a_models_attention_pooling() -> None:
    name = "vit_base_patch16_siglip_224"
    assert built(name=name).attn_pool is not None
    assert built(name=name, global_pool="avg").attn_pool is None
    message = refused(name=name, global_pool="token")
    assert "backbone.global_pool = token" in message
    assert "class token" in message


# Weights by path


def test_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = module._create(BackboneConfig(name=SMALL), 48)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    backbone = built(weights=str(tmp_path / "a.safetensors"), image_size=48)
    own = {name.removeprefix("stem."): tensor for name, tensor in backbone.state_dict().items()}
    assert own.keys() == source.state_dict().keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("load", ["strict", "lenient"])
def test_the_recipe_sets_how_weights_are_loaded(load: str, tmp_path: Path) -> None:
    state = module._create(BackboneConfig(name=SMALL), 32).state_dict()
    del state["norm.weight"]
    save_file(state, tmp_path / "a.safetensors")
    recipe = BackboneConfig(name=SMALL, weights=str(tmp_path / "a.safetensors"), load=load)
    arguments: dict[str, Any] = {"image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    if load == "lenient":
        assert build(recipe, **arguments)[1].missing == ("norm.weight",)
    else:
        with pytest.raises(WeightsError, match=r"missing in the file: norm\.weight"):
            build(recipe, **arguments)


def test_weights_of_another_backbone() -> None:
    message = refused(weights=str(DEMO))
    assert "not weights of this architecture" in message
    assert "of another shape: " in message
    assert "backbone.name" in message


# Refusals


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_tiny_patch16_225", "did you mean 'vit_tiny_patch16_224'?"),
        ("dem", "did you mean 'demo'?"),
        ("ViT-B/16", "neither a short name (`dist-vpt backbones`) nor a timm model"),
        ("vit_tiny_patch16_224.augreg_in21", "did you mean 'augreg_in21k'?"),
        ("vit_tiny_patch16_224.nonsense", "timm has no weights 'nonsense' for it"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    message = refused(name=name)
    assert message.startswith(f"backbone.name = {name}: ")
    assert hint in message


@pytest.mark.parametrize(
    "name",
    ["resnet18", "swinv2_tiny_window8_256", "levit_128", "vit_small_patch16_rope_mixed_224",
     "vit_relpos_small_patch16_224", "vit_tiny_r_s16_p8_224", "test_efficientnet",
     "deit_tiny_distilled_patch16_224"],
)  # fmt: skip
def test_models_that_are_no_vision_transformer(name: str) -> None:
    message = refused(name=name, image_size=224)
    assert message.startswith(f"backbone.name = {name}")
    assert "this version tunes timm's VisionTransformer, Eva and SwinTransformer models" in message


@pytest.mark.parametrize(
    ("name", "size", "fix"),
    [
        (SMALL, 40, "patch size 16; use data.image_size=32 or 48"),
        (SMALL, 8, "patch size 16; use data.image_size=16"),
        ("demo", 33, "use data.image_size=32 or 36"),
    ],
)
def test_an_image_size_that_the_patches_do_not_divide(name: str, size: int, fix: str) -> None:
    message = refused(name=name, image_size=size, weights="random")
    assert message.startswith(f"image size {size}: ")
    assert message.endswith(fix)


@pytest.mark.parametrize(
    ("size", "frame", "fix"),
    [(224, 10, "16; use method.prompts=16"), (30, 5, "16; use method.prompts=9"), (33, 8, "that 16 divides")],
)
def test_a_frame_that_does_not_go_with_the_patches(size: int, frame: int, fix: str) -> None:
    recipe = BackboneConfig(name=SMALL, weights="random")
    with pytest.raises(UserError) as caught:
        build(recipe, image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, frame=frame)
    assert str(caught.value).startswith(f"image size {size} with a frame of {frame} pixels (method.location = pad) is ")
    assert str(caught.value).endswith(fix)
    backbone, _ = build(recipe, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, frame=8)
    assert backbone.patches == 9


# The hub


def test_no_network() -> None:
    message = refused(weights="pretrained")
    assert message.startswith(f"backbone.name = {SMALL}: its weights could not be downloaded (")
    assert message.endswith("download them elsewhere and set backbone.weights=FILE")
    assert "\n" not in message


def test_a_name_without_weights() -> None:
    message = refused(name="vit_base_patch16_gap_224", weights="pretrained")
    assert "timm has no pretrained weights for it" in message


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str]]]:
    """A hub that holds the named files; gives the list of what is asked of it."""

    def hold(**files: Path) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []

        def download(repository: str, filename: str) -> str:
            asked.append((repository, filename))
            key = filename.replace(".", "_")
            if key not in files:
                raise EntryNotFoundError("404")
            return str(files[key])

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return asked

    return hold


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_weights_from_the_hub(filename: str, hub: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    source: VisionTransformer = module._create(BackboneConfig(name=SMALL), 32)
    path = tmp_path / filename
    save_file(source.state_dict(), path) if path.suffix == ".safetensors" else torch.save(source.state_dict(), path)
    asked = hub(**{filename.replace(".", "_"): path})
    backbone = built(weights="pretrained")
    assert torch.equal(backbone.norm.weight, source.norm.weight)
    assert torch.equal(backbone.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    assert {repository for repository, _ in asked} == {"timm/test_vit.r160_in1k"}
    assert asked[-1][1] == filename


def test_a_repository_without_weights(hub: Callable[..., Any]) -> None:
    asked = hub()
    assert "could not be downloaded (404)" in refused(weights="pretrained")
    assert [name for _, name in asked] == ["model.safetensors", "pytorch_model.bin"]
