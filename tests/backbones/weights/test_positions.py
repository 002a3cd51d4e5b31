"""Positions at another size than the weights': resampled as the recipe says, in every layout."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from dist_vpt.backbones.build import create
from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.backbones.weights.loading import load_into
from dist_vpt.backbones.weights.zoo import ZOO, has_learned_positions
from tests.backbones.weights.test_loading import jax_layout
from tests.reference.positions import aligned

MakeVit = Callable[..., VisionTransformer]
SIZES = [4, 8, 12, 20, 24, 48, (8, 24), (28, 12)]  # of images; the weights' are of 16 pixels, their patches of 4


def file_of(vit: VisionTransformer, tmp_path: Path, layout: str) -> Path:
    """The weights under timm's names, inside of an image and text model, in half precision, or as JAX has them."""
    path = tmp_path / ("a.npz" if layout == "npz" else "a.safetensors")
    if layout == "npz":
        np.savez(path, **jax_layout(vit))
        return path
    state = {name: tensor.half() if layout == "half" else tensor for name, tensor in vit.state_dict().items()}
    save_file({f"visual.trunk.{name}" if layout == "tower" else name: tensor for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", ["timm", "npz", "tower", "half"])
def test_as_vpt_equals_torch_and_the_reference(
    size: int | tuple[int, int], layout: str, tiny_vit: MakeVit, tmp_path: Path
) -> None:
    source, vit = tiny_vit(seed=1), tiny_vit(seed=2, img_size=size)
    assert not load_into(vit, file_of(source, tmp_path, layout), lenient=False, position_resize="vpt")
    there_1ND = (source.pos_embed.half() if layout == "half" else source.pos_embed).detach().float()
    grid = vit.patch_embed.grid_size
    square_1DSS = there_1ND[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    resized_1DN = F.interpolate(square_1DSS, size=grid, mode="bilinear", align_corners=True).flatten(2)
    assert torch.allclose(vit.pos_embed[:, 1:], resized_1DN.transpose(1, 2), rtol=0, atol=1e-6)
    assert torch.equal(vit.pos_embed[:, :1], there_1ND[:, :1])
    assert np.abs(vit.pos_embed.detach().numpy() - aligned(there_1ND.numpy(), 1, *grid)).max() < 1e-6


@pytest.mark.parametrize("layout", ["timm", "npz", "tower", "half"])
@pytest.mark.parametrize("size", [8, 24])
def test_unless_said_otherwise_as_in_timm(size: int, layout: str, tiny_vit: MakeVit, tmp_path: Path) -> None:
    source, vit = tiny_vit(seed=1), tiny_vit(seed=2, img_size=size)
    assert not load_into(vit, file_of(source, tmp_path, layout), lenient=False)
    there_1ND = source.pos_embed.detach().half() if layout == "half" else source.pos_embed.detach()
    kernel = {"interpolation": "bilinear", "antialias": False} if layout == "npz" else {}
    expected = resample_abs_pos_embed(there_1ND, list(vit.patch_embed.grid_size), num_prefix_tokens=1, **kernel)
    assert torch.equal(vit.pos_embed, expected.float())


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({"reg_tokens": 3}, 4),
        ({"reg_tokens": 3, "no_embed_class": True}, 0),
        ({"class_token": False, "global_pool": "avg"}, 0),
    ],
    ids=str,
)
def test_prefix_tokens_are_left_alone(
    options: dict[str, object], prefix: int, tiny_vit: MakeVit, tmp_path: Path
) -> None:
    source, vit = tiny_vit(seed=1, **options), tiny_vit(seed=2, img_size=24, **options)
    load_into(vit, file_of(source, tmp_path, "timm"), lenient=False, position_resize="vpt")
    assert torch.equal(vit.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
    expected_1ND = aligned(source.pos_embed.detach().numpy(), prefix, 6, 6)
    assert np.abs(vit.pos_embed.detach().numpy() - expected_1ND).max() < 1e-6


@pytest.mark.parametrize("layout", ["timm", "npz", "tower", "half"])
def test_at_the_weights_size_nothing_is_resampled(layout: str, tiny_vit: MakeVit, tmp_path: Path) -> None:
    source = tiny_vit(seed=1)
    path = file_of(source, tmp_path, layout)
    for resize in ("timm", "vpt"):
        vit = tiny_vit(seed=2)
        load_into(vit, path, lenient=False, position_resize=resize)
        assert torch.equal(vit.pos_embed, source.pos_embed.half().float() if layout == "half" else source.pos_embed)


def test_the_default_is_timm() -> None:
    assert BackboneConfig().position_resize is None
    assert BackboneConfig().positions == "timm"
    assert BackboneConfig(position_resize="vpt").positions == "vpt"


def test_the_models_that_have_positions_are_known_by_name() -> None:
    more = ["test_vit", "deit3_small_patch16_224.fb_in1k", "swin_s3_tiny_224", "vit_7b_patch16_dinov3.lvd1689m"]
    more += ["vit_small_patch16_rope_224", "vit_small_patch16_rope_ape_224", "vit_medium_patch16_rope_reg1_gap_256"]
    more += ["vit_pe_core_tiny_patch16_384", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3_qkvb"]
    for name in (*ZOO, *more):
        row = ZOO.get(name)
        with torch.device("meta"):
            model = create(row.architecture, row.size, **row.options) if row else create(name, 224)
        assert has_learned_positions(name) == any(key.endswith("pos_embed") for key in model.state_dict()), name
