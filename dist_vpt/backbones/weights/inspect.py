"""``dist-vpt backbones check``: what a weight file is, and whether it loads."""

import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from dist_vpt.backbones.build import create
from dist_vpt.backbones.weights.convert import LoadReport, convert, heads_of
from dist_vpt.backbones.weights.layouts import LAYOUTS
from dist_vpt.backbones.weights.loading import check_values, layout_of, read_weights
from dist_vpt.backbones.weights.zoo import ZOO, ZooEntry
from dist_vpt.errors import WeightsError


def check(file: str, entry: str | None = None) -> None:
    """Print what a weight file is. Raises WeightsError afterwards if no known backbone loads it strictly.

    ``entry``: which one, where the file holds several.
    """
    path = Path(file)
    weights = read_weights(path, entry)
    tensors = weights.tensors
    layout = layout_of(tensors, path)
    compared = {name: _compare(layout, tensors, row) for name, row in _candidates(layout, _patch(layout, tensors))}
    nearest = min(compared, key=lambda name: _count(compared[name]), default=None)
    fits = [name for name, load_report in compared.items() if not load_report]
    side = image_side(layout, tensors)
    fits = [name for name in fits if side in (None, ZOO[name].size)] or fits
    fits.sort(key=lambda name: not layout.startswith(ZOO[name].layout))  # rows published in this layout first

    lines = [("layout", LAYOUTS[layout].title), ("shapes", ", ".join(_facts(layout, tensors)))]
    lines += [("read", note) for note in weights.notes]
    if nearest is not None and compared[nearest].left_out:
        lines.append(("left out", compared[nearest].left_out_summary()))
    if fits:
        lines.append(
            ("model", f"{ZOO[fits[0]].architecture}, {heads_of(_model(ZOO[fits[0]]))} heads in its first block")
        )
        unsure = " (shapes alone cannot tell: it depends on where the file comes from)" if len(fits) > 1 else ""
        lines.append(("fits", ", ".join(fits) + unsure))
        chosen = "" if entry is None else f" backbone.entry={entry}"
        check_values(tensors, compared[fits[0]], path)
        lines.append(("loads strictly", f"yes: backbone.name={fits[0]} backbone.weights={path}{chosen}"))
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(str(path))
    for label, text in lines:
        console.print(f"  {label:<15}{text}")
    if fits:
        return
    # A file of another architecture differs in most of its tensors; a damaged one in few.
    if nearest is not None and _count(compared[nearest]) < len(tensors) / 4:
        raise WeightsError(f"{path}: does not load strictly; as {nearest}:\n{compared[nearest]}")
    raise WeightsError(
        f"{path}: fits none of the short names of this layout; if it holds another VisionTransformer, "
        "SwinTransformer or Eva of timm, set backbone.name to that model, and training reports every difference"
    )


def image_side(layout: str, tensors: dict[str, Tensor]) -> int | None:
    """Pixels of the images that a ViT's positions are made for; None where it cannot be derived."""
    patch = _patch(layout, tensors)
    positions = tensors.get(LAYOUTS[layout].sources("pos_embed")[0])
    if patch is None or positions is None or positions.ndim not in (2, 3):
        return None
    for prefix in (1, 0):  # a class token's position, or none
        side = math.isqrt(positions.shape[-2] - prefix)
        if side * side == positions.shape[-2] - prefix:
            return side * patch
    return None


def _facts(layout: str, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Facts derived from the shapes of the tensors."""
    yield f"{sum(t.numel() for t in tensors.values()):,} numbers in {len(tensors)} tensors"
    side = image_side(layout, tensors)
    if side is not None:
        yield f"images of {side} px"
    patch = _patch(layout, tensors)
    if patch is not None:
        yield f"patches of {patch}"
    if LAYOUTS[layout].family == "swin":
        depths: dict[int, int] = {}
        for stage, block in _numbers(r"layers\.(\d+)\.blocks\.(\d+)\.", tensors):
            depths[stage] = max(depths.get(stage, 0), block + 1)
        yield f"depth {'+'.join(str(depths[stage]) for stage in sorted(depths))}"
    else:
        depth = 1 + max(
            (block for (block,) in _numbers(LAYOUTS[layout].sources("blocks.9.norm1.bias"), tensors)), default=-1
        )
        yield f"depth {depth}"
    norm = tensors.get(LAYOUTS[layout].sources("norm.weight")[0], tensors.get("fc_norm.weight"))
    if norm is not None:
        yield f"width {norm.shape[0]}"


def _numbers(pattern: str | tuple[str, ...], tensors: dict[str, Tensor]) -> Iterator[tuple[int, ...]]:
    """The numbers in names: of a pattern, or of the block that is 9 in an example of a name."""
    if isinstance(pattern, tuple):
        pattern = re.escape(pattern[0][: pattern[0].index("9")]) + r"(\d+)[./]"
    for name in tensors:
        found = re.match(pattern, name)
        if found:
            yield tuple(map(int, found.groups()))


def _patch(layout: str, tensors: dict[str, Tensor]) -> int | None:
    kernel = tensors.get(LAYOUTS[layout].sources("patch_embed.proj.weight")[0])
    if kernel is None or kernel.ndim != 4:
        return None
    return kernel.shape[0] if layout == "jax" else kernel.shape[-1]


def _candidates(layout: str, patch: int | None) -> Iterator[tuple[str, ZooEntry]]:
    """Rows whose published files have this layout, or may have been saved again under timm's names."""
    for name, row in ZOO.items():
        if patch is not None and f"patch{patch}_" not in row.architecture:
            continue
        # Of MoCo v3 and MAE, the fixed positions would have shown; not so for models that were fine-tuned.
        open_to_timm = row.layout not in ("mocov3", "mae") or row.options.get("global_pool") == "avg"
        saved_again = layout == "timm" and LAYOUTS[row.layout].family == "vit" and open_to_timm
        if layout.startswith(row.layout) or saved_again:
            yield name, row


def _compare(layout: str, tensors: dict[str, Tensor], row: ZooEntry) -> LoadReport:
    return convert(layout, tensors, _model(row))[1]


def _count(load_report: LoadReport) -> int:
    return len(load_report.missing) + len(load_report.unexpected) + len(load_report.mismatched)


def _model(row: ZooEntry) -> nn.Module:
    return _on_meta_device(row.architecture, row.size, tuple(row.options.items()))


@cache
def _on_meta_device(architecture: str, size: int, options: tuple[tuple[str, object], ...]) -> nn.Module:
    """Names and shapes only: a huge model is compared as quickly as a small one.

    The buffers of a Swin are computed, since a file's are compared with them; they do not depend on the width.
    """
    with torch.device("meta"):
        model = create(architecture, size, **dict(options))
    if isinstance(model, SwinTransformer):
        narrow = create(architecture, size, **dict(options) | {"embed_dim": heads_of(model)})
        for name, buffer in narrow.named_buffers():
            owner, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(owner), own_name, buffer)
    return model
