"""Published weights by short name, and the facts about them. One literal row each; it needs no torch."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Channels(NamedTuple):
    """Mean and standard deviation of the channels, of pixels in [0, 1], with which weights were trained."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


HALF = Channels("half", (0.5,) * 3, (0.5,) * 3)
IMAGENET = Channels("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Channels("clip", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Row:
    """One set of weights."""

    architecture: str  # timm's name of the model
    layout: str  # of the published file: a name in layouts.LAYOUTS
    tag: str | None  # timm's name of these weights, which 'pretrained' fetches from the hub; None: a file alone
    channels: Channels
    size: int  # image side in pixels that they were trained with
    pool: str  # what they give for an image: 'token' (class token), 'avg' (mean of the patches) or 'map' (attention)
    trained: str  # on what, and how
    source: str  # the project's page
    license: str  # of the weights
    interpolation: str = "bicubic"
    options: dict[str, Any] = field(default_factory=dict)  # where the model differs from timm's of that name

    @property
    def pretrained(self) -> str | None:
        """timm's full name of the weights, where its hub has them."""
        return f"{self.architecture}.{self.tag}" if self.tag else None


_JAX = "github.com/google-research/vision_transformer"
_MAE = "github.com/facebookresearch/mae"
_MOCO = "github.com/facebookresearch/moco-v3"
_SWIN = "github.com/microsoft/Swin-Transformer"
_DINO = "github.com/facebookresearch/dino"
_DINOV2 = "github.com/facebookresearch/dinov2"
_DINOV3 = "github.com/facebookresearch/dinov3"
_CLIP = "github.com/openai/CLIP"
_SIGLIP = "github.com/google-research/big_vision"
_21K, _1K, _FT = "supervised, IN-21k", "supervised, IN-1k", "supervised, IN-21k + IN-1k"
_22K, _FT22 = "supervised, IN-22k", "supervised, IN-22k + IN-1k"
_NC, _MIT, _APACHE = "CC-BY-NC-4.0", "MIT", "Apache-2.0"
_FC_NORM = {"global_pool": "avg"}  # MAE's fine-tuned models: mean of the patches, then the norm

# fmt: off
ZOO: dict[str, Row] = {
    # The original vision transformers (arXiv 2010.11929; B/8: 2106.10270), JAX
    "sup_b16_in21k": Row("vit_base_patch16_224", "jax", "orig_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "sup_b32_in21k": Row("vit_base_patch32_224", "jax", "orig_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "sup_b8_in21k": Row("vit_base_patch8_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "sup_l16_in21k": Row("vit_large_patch16_224", "jax", "orig_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "sup_l32_in21k": Row("vit_large_patch32_224", "jax", "orig_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "sup_h14_in21k": Row("vit_huge_patch14_224", "jax", "orig_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "sup_b16_ft224": Row("vit_base_patch16_224", "jax", "orig_in21k_ft_in1k", HALF, 224, "token", _FT, _JAX, _APACHE),
    "sup_b16_ft384": Row("vit_base_patch16_384", "jax", "orig_in21k_ft_in1k", HALF, 384, "token", _FT, _JAX, _APACHE),
    "sup_b32_ft384": Row("vit_base_patch32_384", "jax", None, HALF, 384, "token", _FT, _JAX, _APACHE),
    "sup_l16_ft224": Row("vit_large_patch16_224", "jax", None, HALF, 224, "token", _FT, _JAX, _APACHE),
    "sup_l16_ft384": Row("vit_large_patch16_384", "jax", None, HALF, 384, "token", _FT, _JAX, _APACHE),
    "sup_l32_ft384": Row("vit_large_patch32_384", "jax", "orig_in21k_ft_in1k", HALF, 384, "token", _FT, _JAX, _APACHE),
    # Supervised on ImageNet-1k: DeiT-B (arXiv 2012.12877), PyTorch
    "sup_b16_in1k": Row("deit_base_patch16_224", "timm", "fb_in1k", IMAGENET, 224, "token", _1K,
                        "github.com/facebookresearch/deit", _APACHE),
    # AugReg (arXiv 2106.10270), JAX
    "augreg_ti16_in21k": Row("vit_tiny_patch16_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "augreg_s16_in21k": Row("vit_small_patch16_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "augreg_b16_in21k": Row("vit_base_patch16_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "augreg_b32_in21k": Row("vit_base_patch32_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "augreg_l16_in21k": Row("vit_large_patch16_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX, _APACHE),
    "augreg_b16_in1k": Row("vit_base_patch16_224", "jax", "augreg_in1k", HALF, 224, "token", _1K, _JAX, _APACHE),
    # Masked autoencoders (arXiv 2111.06377); mean pooling as in VPT's tables, of tokens after the encoder's norm
    "mae_b16": Row("vit_base_patch16_224", "mae", "mae", IMAGENET, 224, "avg", "MAE, IN-1k", _MAE, _NC),
    "mae_l16": Row("vit_large_patch16_224", "mae", "mae", IMAGENET, 224, "avg", "MAE, IN-1k", _MAE, _NC),
    "mae_h14": Row("vit_huge_patch14_224", "mae", "mae", IMAGENET, 224, "avg", "MAE, IN-1k", _MAE, _NC),
    "mae_b16_ft": Row("vit_base_patch16_224", "mae", None, IMAGENET, 224, "avg", "MAE + labels, IN-1k", _MAE, _NC,
                      options=_FC_NORM),
    "mae_l16_ft": Row("vit_large_patch16_224", "mae", None, IMAGENET, 224, "avg", "MAE + labels, IN-1k", _MAE, _NC,
                      options=_FC_NORM),
    "mae_h14_ft": Row("vit_huge_patch14_224", "mae", None, IMAGENET, 224, "avg", "MAE + labels, IN-1k", _MAE, _NC,
                      options=_FC_NORM),
    # MoCo v3 (arXiv 2104.02057); its ViT-S has 12 heads, not the usual 6
    "mocov3_s16": Row("vit_small_patch16_224", "mocov3", None, IMAGENET, 224, "token", "MoCo v3, IN-1k", _MOCO, _NC,
                      interpolation="bilinear", options={"num_heads": 12}),
    "mocov3_b16": Row("vit_base_patch16_224", "mocov3", None, IMAGENET, 224, "token", "MoCo v3, IN-1k", _MOCO, _NC,
                      interpolation="bilinear"),
    # Swin (arXiv 2103.14030)
    "swin_t_in1k": Row("swin_tiny_patch4_window7_224", "swin", "ms_in1k", IMAGENET, 224, "avg", _1K, _SWIN, _MIT),
    "swin_s_in1k": Row("swin_small_patch4_window7_224", "swin", "ms_in1k", IMAGENET, 224, "avg", _1K, _SWIN, _MIT),
    "swin_b_in1k": Row("swin_base_patch4_window7_224", "swin", "ms_in1k", IMAGENET, 224, "avg", _1K, _SWIN, _MIT),
    "swin_b384_in1k": Row("swin_base_patch4_window12_384", "swin", "ms_in1k", IMAGENET, 384, "avg", _1K, _SWIN, _MIT),
    "swin_t_in22k": Row("swin_tiny_patch4_window7_224", "swin", "ms_in22k", IMAGENET, 224, "avg", _22K, _SWIN, _MIT),
    "swin_s_in22k": Row("swin_small_patch4_window7_224", "swin", "ms_in22k", IMAGENET, 224, "avg", _22K, _SWIN, _MIT),
    "swin_b_in22k": Row("swin_base_patch4_window7_224", "swin", "ms_in22k", IMAGENET, 224, "avg", _22K, _SWIN, _MIT),
    "swin_l_in22k": Row("swin_large_patch4_window7_224", "swin", "ms_in22k", IMAGENET, 224, "avg", _22K, _SWIN, _MIT),
    "swin_b384_in22k": Row("swin_base_patch4_window12_384", "swin", "ms_in22k", IMAGENET, 384, "avg", _22K, _SWIN,
                           _MIT),
    "swin_l384_in22k": Row("swin_large_patch4_window12_384", "swin", "ms_in22k", IMAGENET, 384, "avg", _22K, _SWIN,
                           _MIT),
    "swin_b_ft": Row("swin_base_patch4_window7_224", "swin", "ms_in22k_ft_in1k", IMAGENET, 224, "avg", _FT22, _SWIN,
                     _MIT),
    "swin_l_ft": Row("swin_large_patch4_window7_224", "swin", "ms_in22k_ft_in1k", IMAGENET, 224, "avg", _FT22, _SWIN,
                     _MIT),
    # DINO (arXiv 2104.14294), DINOv2 (2304.07193, with registers: 2309.16588), DINOv3 (2508.10104)
    "dino_s16": Row("vit_small_patch16_224", "timm", "dino", IMAGENET, 224, "token", "DINO, IN-1k", _DINO, _APACHE),
    "dino_s8": Row("vit_small_patch8_224", "timm", "dino", IMAGENET, 224, "token", "DINO, IN-1k", _DINO, _APACHE),
    "dino_b16": Row("vit_base_patch16_224", "timm", "dino", IMAGENET, 224, "token", "DINO, IN-1k", _DINO, _APACHE),
    "dino_b8": Row("vit_base_patch8_224", "timm", "dino", IMAGENET, 224, "token", "DINO, IN-1k", _DINO, _APACHE),
    "dinov2_s14": Row("vit_small_patch14_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token", "DINOv2, LVD-142M",
                      _DINOV2, _APACHE),
    "dinov2_b14": Row("vit_base_patch14_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token", "DINOv2, LVD-142M",
                      _DINOV2, _APACHE),
    "dinov2_l14": Row("vit_large_patch14_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token", "DINOv2, LVD-142M",
                      _DINOV2, _APACHE),
    "dinov2_g14": Row("vit_giant_patch14_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token", "DINOv2, LVD-142M",
                      _DINOV2, _APACHE),
    "dinov2_s14_reg": Row("vit_small_patch14_reg4_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token",
                          "DINOv2 + registers, LVD-142M", _DINOV2, _APACHE),
    "dinov2_b14_reg": Row("vit_base_patch14_reg4_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token",
                          "DINOv2 + registers, LVD-142M", _DINOV2, _APACHE),
    "dinov2_l14_reg": Row("vit_large_patch14_reg4_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token",
                          "DINOv2 + registers, LVD-142M", _DINOV2, _APACHE),
    "dinov2_g14_reg": Row("vit_giant_patch14_reg4_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token",
                          "DINOv2 + registers, LVD-142M", _DINOV2, _APACHE),
    "dinov3_s16": Row("vit_small_patch16_dinov3", "dinov3", "lvd1689m", IMAGENET, 256, "token", "DINOv3, LVD-1689M",
                      _DINOV3, "DINOv3-License"),
    "dinov3_b16": Row("vit_base_patch16_dinov3", "dinov3", "lvd1689m", IMAGENET, 256, "token", "DINOv3, LVD-1689M",
                      _DINOV3, "DINOv3-License"),
    "dinov3_l16": Row("vit_large_patch16_dinov3", "dinov3", "lvd1689m", IMAGENET, 256, "token", "DINOv3, LVD-1689M",
                      _DINOV3, "DINOv3-License"),
    "dinov3_h16": Row("vit_huge_plus_patch16_dinov3", "dinov3", "lvd1689m", IMAGENET, 256, "token",
                      "DINOv3, LVD-1689M", _DINOV3, "DINOv3-License"),
    # CLIP (arXiv 2103.00020), SigLIP (2303.15343), SigLIP 2 (2502.14786)
    "clip_b32": Row("vit_base_patch32_clip_quickgelu_224", "clip", "openai", CLIP, 224, "token", "CLIP, 400M pairs",
                    _CLIP, _MIT),
    "clip_b16": Row("vit_base_patch16_clip_quickgelu_224", "clip", "openai", CLIP, 224, "token", "CLIP, 400M pairs",
                    _CLIP, _MIT),
    "clip_l14": Row("vit_large_patch14_clip_quickgelu_224", "clip", "openai", CLIP, 224, "token", "CLIP, 400M pairs",
                    _CLIP, _MIT),
    "siglip_b16": Row("vit_base_patch16_siglip_224", "timm", "webli", HALF, 224, "map", "SigLIP, WebLI", _SIGLIP,
                      _APACHE),
    "siglip_l16": Row("vit_large_patch16_siglip_256", "timm", "webli", HALF, 256, "map", "SigLIP, WebLI", _SIGLIP,
                      _APACHE),
    "siglip_so14": Row("vit_so400m_patch14_siglip_224", "timm", "webli", HALF, 224, "map", "SigLIP, WebLI", _SIGLIP,
                       _APACHE),
    "siglip2_b16": Row("vit_base_patch16_siglip_224", "timm", "v2_webli", HALF, 224, "map", "SigLIP 2, WebLI", _SIGLIP,
                       _APACHE),
}
# fmt: on


def show() -> None:
    """Print the table: a section for each project and preprocessing, 100 characters wide."""
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=100)
    columns = {"name": 17, "timm's model": 36, "px": 3, "pool": 5, "hub": 3, "trained": 28}  # and their widths
    for (source, license, preprocessing), rows in groupby(ZOO.items(), key=lambda item: _section(item[1])):
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for column, width in columns.items():
            table.add_column(column, width=width, no_wrap=True)
        for name, row in rows:
            hub = "yes" if row.pretrained else ""
            table.add_row(name, row.architecture, str(row.size), row.pool, hub, row.trained)
        console.print(f"\n{source}, {license}", style="bold")
        console.print(preprocessing)
        console.print(table)
    console.print("\nbackbone.name=NAME backbone.weights=FILE (the project's file), or pretrained where hub says yes")


def _section(row: Row) -> tuple[str, str, str]:
    """Project, license, and the layout of its files with the preprocessing of pixels in [0, 1]."""
    mean, std = (" ".join(f"{value:.6g}" for value in values) for values in row.channels[1:])
    preprocessing = f"file layout {row.layout}; {row.channels.name}: mean {mean}, std {std}; {row.interpolation}"
    return row.source, row.license, preprocessing
