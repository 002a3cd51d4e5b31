"""Published weights by short name, and the facts about them. One literal row each; it needs no torch."""

import re
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


class Project(NamedTuple):
    """The project that published weights."""

    page: str
    license: str  # of its weights


@dataclass(frozen=True)
class ZooEntry:
    """One set of pretrained weights."""

    architecture: str  # timm's name of the model
    layout: str  # of the published file: a name in layouts.LAYOUTS
    tag: str | None  # timm's name of these weights, which 'pretrained' fetches from the hub; None: a file alone
    channels: Channels
    size: int  # image side in pixels that they were trained with
    pool: str  # what they give for an image: 'token' (class token), 'avg' (mean of the patches) or 'map' (attention)
    trained: str  # on what, and how
    project: Project
    interpolation: str = "bicubic"
    options: dict[str, Any] = field(default_factory=dict)  # where the model differs from timm's of that name

    @property
    def pretrained(self) -> str | None:
        """timm's full name of the weights, where its hub has them."""
        return f"{self.architecture}.{self.tag}" if self.tag else None


_JAX = Project("github.com/google-research/vision_transformer", "Apache-2.0")
_DEIT = Project("github.com/facebookresearch/deit", "Apache-2.0")
_MAE = Project("github.com/facebookresearch/mae", "CC-BY-NC-4.0")
_MOCO = Project("github.com/facebookresearch/moco-v3", "CC-BY-NC-4.0")
_SWIN = Project("github.com/microsoft/Swin-Transformer", "MIT")
_DINO = Project("github.com/facebookresearch/dino", "Apache-2.0")
_DINOV2 = Project("github.com/facebookresearch/dinov2", "Apache-2.0")
_DINOV3 = Project("github.com/facebookresearch/dinov3", "DINOv3-License")
_CLIP = Project("github.com/openai/CLIP", "MIT")
_SIGLIP = Project("github.com/google-research/big_vision", "Apache-2.0")
_21K, _1K, _FT = "supervised, IN-21k", "supervised, IN-1k", "supervised, IN-21k + IN-1k"
_22K, _FT22 = "supervised, IN-22k", "supervised, IN-22k + IN-1k"
_FC_NORM = {"global_pool": "avg"}  # MAE's fine-tuned models: mean of the patches, then the norm

# fmt: off
ZOO: dict[str, ZooEntry] = {
    # The original vision transformers (arXiv 2010.11929; B/8: 2106.10270), JAX
    "sup_b16_in21k": ZooEntry("vit_base_patch16_224", "jax", "orig_in21k", HALF, 224, "token", _21K, _JAX),
    "sup_b32_in21k": ZooEntry("vit_base_patch32_224", "jax", "orig_in21k", HALF, 224, "token", _21K, _JAX),
    "sup_b8_in21k": ZooEntry("vit_base_patch8_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX),
    "sup_l16_in21k": ZooEntry("vit_large_patch16_224", "jax", "orig_in21k", HALF, 224, "token", _21K, _JAX),
    "sup_l32_in21k": ZooEntry("vit_large_patch32_224", "jax", "orig_in21k", HALF, 224, "token", _21K, _JAX),
    "sup_h14_in21k": ZooEntry("vit_huge_patch14_224", "jax", "orig_in21k", HALF, 224, "token", _21K, _JAX),
    "sup_b16_ft224": ZooEntry("vit_base_patch16_224", "jax", "orig_in21k_ft_in1k", HALF, 224, "token", _FT, _JAX),
    "sup_b16_ft384": ZooEntry("vit_base_patch16_384", "jax", "orig_in21k_ft_in1k", HALF, 384, "token", _FT, _JAX),
    "sup_b32_ft384": ZooEntry("vit_base_patch32_384", "jax", None, HALF, 384, "token", _FT, _JAX),
    "sup_l16_ft224": ZooEntry("vit_large_patch16_224", "jax", None, HALF, 224, "token", _FT, _JAX),
    "sup_l16_ft384": ZooEntry("vit_large_patch16_384", "jax", None, HALF, 384, "token", _FT, _JAX),
    "sup_l32_ft384": ZooEntry("vit_large_patch32_384", "jax", "orig_in21k_ft_in1k", HALF, 384, "token", _FT, _JAX),
    # Supervised on ImageNet-1k: DeiT-B (arXiv 2012.12877), PyTorch
    "sup_b16_in1k": ZooEntry("deit_base_patch16_224", "timm", "fb_in1k", IMAGENET, 224, "token", _1K, _DEIT),
    # AugReg (arXiv 2106.10270), JAX
    "augreg_ti16_in21k": ZooEntry("vit_tiny_patch16_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX),
    "augreg_s16_in21k": ZooEntry("vit_small_patch16_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX),
    "augreg_b16_in21k": ZooEntry("vit_base_patch16_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX),
    "augreg_b32_in21k": ZooEntry("vit_base_patch32_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX),
    "augreg_l16_in21k": ZooEntry("vit_large_patch16_224", "jax", "augreg_in21k", HALF, 224, "token", _21K, _JAX),
    "augreg_b16_in1k": ZooEntry("vit_base_patch16_224", "jax", "augreg_in1k", HALF, 224, "token", _1K, _JAX),
    # Masked autoencoders (arXiv 2111.06377); mean pooling as in VPT's tables, of tokens after the encoder's norm
    "mae_b16": ZooEntry("vit_base_patch16_224", "mae", "mae", IMAGENET, 224, "avg", "MAE, IN-1k", _MAE),
    "mae_l16": ZooEntry("vit_large_patch16_224", "mae", "mae", IMAGENET, 224, "avg", "MAE, IN-1k", _MAE),
    "mae_h14": ZooEntry("vit_huge_patch14_224", "mae", "mae", IMAGENET, 224, "avg", "MAE, IN-1k", _MAE),
    "mae_b16_ft": ZooEntry("vit_base_patch16_224", "mae", None, IMAGENET, 224, "avg", "MAE + labels, IN-1k", _MAE,
                           options=_FC_NORM),
    "mae_l16_ft": ZooEntry("vit_large_patch16_224", "mae", None, IMAGENET, 224, "avg", "MAE + labels, IN-1k", _MAE,
                           options=_FC_NORM),
    "mae_h14_ft": ZooEntry("vit_huge_patch14_224", "mae", None, IMAGENET, 224, "avg", "MAE + labels, IN-1k", _MAE,
                           options=_FC_NORM),
    # MoCo v3 (arXiv 2104.02057); its ViT-S has 12 heads, not the usual 6
    "mocov3_s16": ZooEntry("vit_small_patch16_224", "mocov3", None, IMAGENET, 224, "token", "MoCo v3, IN-1k", _MOCO,
                           interpolation="bilinear", options={"num_heads": 12}),
    "mocov3_b16": ZooEntry("vit_base_patch16_224", "mocov3", None, IMAGENET, 224, "token", "MoCo v3, IN-1k", _MOCO,
                           interpolation="bilinear"),
    # Swin (arXiv 2103.14030)
    "swin_t_in1k": ZooEntry("swin_tiny_patch4_window7_224", "swin", "ms_in1k", IMAGENET, 224, "avg", _1K, _SWIN),
    "swin_s_in1k": ZooEntry("swin_small_patch4_window7_224", "swin", "ms_in1k", IMAGENET, 224, "avg", _1K, _SWIN),
    "swin_b_in1k": ZooEntry("swin_base_patch4_window7_224", "swin", "ms_in1k", IMAGENET, 224, "avg", _1K, _SWIN),
    "swin_b384_in1k": ZooEntry("swin_base_patch4_window12_384", "swin", "ms_in1k", IMAGENET, 384, "avg", _1K, _SWIN),
    "swin_t_in22k": ZooEntry("swin_tiny_patch4_window7_224", "swin", "ms_in22k", IMAGENET, 224, "avg", _22K, _SWIN),
    "swin_s_in22k": ZooEntry("swin_small_patch4_window7_224", "swin", "ms_in22k", IMAGENET, 224, "avg", _22K, _SWIN),
    "swin_b_in22k": ZooEntry("swin_base_patch4_window7_224", "swin", "ms_in22k", IMAGENET, 224, "avg", _22K, _SWIN),
    "swin_l_in22k": ZooEntry("swin_large_patch4_window7_224", "swin", "ms_in22k", IMAGENET, 224, "avg", _22K, _SWIN),
    "swin_b384_in22k": ZooEntry("swin_base_patch4_window12_384", "swin", "ms_in22k", IMAGENET, 384, "avg", _22K, _SWIN),
    "swin_l384_in22k": ZooEntry("swin_large_patch4_window12_384", "swin", "ms_in22k", IMAGENET, 384, "avg", _22K,
                                _SWIN),
    "swin_b_ft": ZooEntry("swin_base_patch4_window7_224", "swin", "ms_in22k_ft_in1k", IMAGENET, 224, "avg", _FT22,
                          _SWIN),
    "swin_l_ft": ZooEntry("swin_large_patch4_window7_224", "swin", "ms_in22k_ft_in1k", IMAGENET, 224, "avg", _FT22,
                          _SWIN),
    # DINO (arXiv 2104.14294), DINOv2 (2304.07193, with registers: 2309.16588), DINOv3 (2508.10104)
    "dino_s16": ZooEntry("vit_small_patch16_224", "timm", "dino", IMAGENET, 224, "token", "DINO, IN-1k", _DINO),
    "dino_s8": ZooEntry("vit_small_patch8_224", "timm", "dino", IMAGENET, 224, "token", "DINO, IN-1k", _DINO),
    "dino_b16": ZooEntry("vit_base_patch16_224", "timm", "dino", IMAGENET, 224, "token", "DINO, IN-1k", _DINO),
    "dino_b8": ZooEntry("vit_base_patch8_224", "timm", "dino", IMAGENET, 224, "token", "DINO, IN-1k", _DINO),
    "dinov2_s14": ZooEntry("vit_small_patch14_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token", "DINOv2, LVD-142M",
                           _DINOV2),
    "dinov2_b14": ZooEntry("vit_base_patch14_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token", "DINOv2, LVD-142M",
                           _DINOV2),
    "dinov2_l14": ZooEntry("vit_large_patch14_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token", "DINOv2, LVD-142M",
                           _DINOV2),
    "dinov2_g14": ZooEntry("vit_giant_patch14_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token", "DINOv2, LVD-142M",
                           _DINOV2),
    "dinov2_s14_reg": ZooEntry("vit_small_patch14_reg4_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token",
                               "DINOv2 + registers, LVD-142M", _DINOV2),
    "dinov2_b14_reg": ZooEntry("vit_base_patch14_reg4_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token",
                               "DINOv2 + registers, LVD-142M", _DINOV2),
    "dinov2_l14_reg": ZooEntry("vit_large_patch14_reg4_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token",
                               "DINOv2 + registers, LVD-142M", _DINOV2),
    "dinov2_g14_reg": ZooEntry("vit_giant_patch14_reg4_dinov2", "dinov2", "lvd142m", IMAGENET, 518, "token",
                               "DINOv2 + registers, LVD-142M", _DINOV2),
    "dinov3_s16": ZooEntry("vit_small_patch16_dinov3", "dinov3", "lvd1689m", IMAGENET, 256, "token",
                           "DINOv3, LVD-1689M", _DINOV3),
    "dinov3_s16_plus": ZooEntry("vit_small_plus_patch16_dinov3", "dinov3", "lvd1689m", IMAGENET, 256, "token",
                                "DINOv3, LVD-1689M", _DINOV3),
    "dinov3_b16": ZooEntry("vit_base_patch16_dinov3", "dinov3", "lvd1689m", IMAGENET, 256, "token",
                           "DINOv3, LVD-1689M", _DINOV3),
    "dinov3_l16": ZooEntry("vit_large_patch16_dinov3", "dinov3", "lvd1689m", IMAGENET, 256, "token",
                           "DINOv3, LVD-1689M", _DINOV3),
    "dinov3_h16": ZooEntry("vit_huge_plus_patch16_dinov3", "dinov3", "lvd1689m", IMAGENET, 256, "token",
                           "DINOv3, LVD-1689M", _DINOV3),
    # CLIP (arXiv 2103.00020), SigLIP (2303.15343), SigLIP 2 (2502.14786)
    "clip_b32": ZooEntry("vit_base_patch32_clip_quickgelu_224", "clip", "openai", CLIP, 224, "token",
                         "CLIP, 400M pairs", _CLIP),
    "clip_b16": ZooEntry("vit_base_patch16_clip_quickgelu_224", "clip", "openai", CLIP, 224, "token",
                         "CLIP, 400M pairs", _CLIP),
    "clip_l14": ZooEntry("vit_large_patch14_clip_quickgelu_224", "clip", "openai", CLIP, 224, "token",
                         "CLIP, 400M pairs", _CLIP),
    "siglip_b16": ZooEntry("vit_base_patch16_siglip_224", "timm", "webli", HALF, 224, "map", "SigLIP, WebLI", _SIGLIP),
    "siglip_l16": ZooEntry("vit_large_patch16_siglip_256", "timm", "webli", HALF, 256, "map", "SigLIP, WebLI", _SIGLIP),
    "siglip_so14": ZooEntry("vit_so400m_patch14_siglip_224", "timm", "webli", HALF, 224, "map", "SigLIP, WebLI",
                            _SIGLIP),
    "siglip2_b16": ZooEntry("vit_base_patch16_siglip_224", "timm", "v2_webli", HALF, 224, "map", "SigLIP 2, WebLI",
                            _SIGLIP),
}
# fmt: on


# timm's names of models without a table of positions: Swin, and Evas whose blocks rotate instead.
_WITHOUT_POSITIONS = re.compile(r"swin_|vit_\w+_(dinov3|lingbot|sapiens2|rope_(?!(mixed_)?ape_))")


def architecture(name: str) -> str:
    """timm's name of a backbone's model, without that of its weights."""
    return ZOO[name].architecture if name in ZOO else name.partition(".")[0]


def has_learned_positions(name: str) -> bool:
    """Whether a backbone adds a learned position embedding to its patches: Swin, DINOv3 and others do not."""
    return not _WITHOUT_POSITIONS.match(architecture(name))


def show() -> None:
    """Print the table: a section for each project and preprocessing, 100 characters wide."""
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=100)
    columns = {"name": 17, "timm's model": 36, "px": 3, "pool": 5, "hub": 3, "trained": 28}  # and their widths
    for (project, preprocessing), rows in groupby(ZOO.items(), key=lambda item: _section(item[1])):
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for column, width in columns.items():
            table.add_column(column, width=width, no_wrap=True)
        for name, row in rows:
            hub = "yes" if row.pretrained else ""
            table.add_row(name, row.architecture, str(row.size), row.pool, hub, row.trained)
        console.print(f"\n{project.page}, {project.license}", style="bold")
        console.print(preprocessing)
        console.print(table)
    console.print("\nbackbone.name=NAME backbone.weights=FILE (the project's file), or pretrained where hub says yes")


def _section(row: ZooEntry) -> tuple[Project, str]:
    """The project, and the layout of its files with the preprocessing of pixels in [0, 1]."""
    mean, std = (" ".join(f"{value:.6g}" for value in values) for values in row.channels[1:])
    preprocessing = f"file layout {row.layout}; {row.channels.name}: mean {mean}, std {std}; {row.interpolation}"
    return row.project, preprocessing
