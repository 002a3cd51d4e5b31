"""Convert a file's tensors to a model's state dict, and report the differences.

N tokens, D width. No file is opened here.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from dist_vpt.backbones.config import PositionResize
from dist_vpt.backbones.weights.layouts import LAYOUTS
from dist_vpt.backbones.weights.layouts.base import Layout, Shape, Tensors
from dist_vpt.backbones.weights.layouts.swin import BUFFERS

MAX_LISTED = 8  # names in a message; the others are counted


@dataclass(frozen=True)
class LoadReport:
    """How a file's tensors differ from the model's, under the file's names. True where they differ."""

    missing: tuple[str, ...] = ()  # in the model, not in the file
    unexpected: tuple[str, ...] = ()  # in the file, not in the model
    mismatched: tuple[str, ...] = ()  # "name: file (shape), model (shape)"
    notes: tuple[str, ...] = ()  # on which model of the file was read
    left_out: tuple[str, ...] = ()  # on purpose: the file's own classifier, a decoder, a second encoder

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = []
        for title, names in (
            ("missing in the file", self.missing),
            ("unexpected in the file", self.unexpected),
            ("of another shape", self.mismatched),
        ):
            if names:
                lines.append(f"  {len(names)} {title}: {', '.join(names[:MAX_LISTED])}{_more(len(names))}")
        return "\n".join(lines)

    def left_out_summary(self) -> str:
        """Tensors left out on purpose, counted by part of the file."""
        parts: dict[str, int] = {}
        for name in self.left_out:
            pieces = re.split(r"[./]", name)
            part = pieces[-1] if re.match(BUFFERS, name) else pieces[0]
            part = ".".join(pieces[:2]) if part == "base_encoder" else part
            parts[part] = parts.get(part, 0) + 1
        shown = [part if count == 1 else f"{part} ({count})" for part, count in parts.items()]
        return f"{', '.join(shown[:MAX_LISTED])}{_more(len(shown))}"


def joined_reports(reports: Sequence[LoadReport], names: Sequence[str]) -> LoadReport:
    """One report for several backbones, in which each entry names its backbone."""
    if len(reports) == 1:
        return reports[0]

    def named(field: str) -> tuple[str, ...]:
        return tuple(
            f"{name}: {entry}" for report, name in zip(reports, names, strict=True) for entry in getattr(report, field)
        )

    return LoadReport(**{field.name: named(field.name) for field in fields(LoadReport)})


def _more(count: int) -> str:
    return f" and {count - MAX_LISTED} more" if count > MAX_LISTED else ""


def convert(
    name: str, tensors: Tensors, model: Any, position_resize: PositionResize = "timm"
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors that a file of a layout gives a timm model, under the model's names, and how the two differ.

    Position embeddings are resampled to the model's grid as ``position_resize`` says. The model may be on the meta
    device.
    """
    layout = LAYOUTS[name]
    wanted = model.state_dict()
    heads = heads_of(model)
    offered: dict[str, Tensor] = {}
    missing: list[str] = []
    mismatched: list[str] = []
    used: set[str] = set()
    for name_in_model, tensor in wanted.items():
        sources = layout.sources(name_in_model)
        used.update(sources)
        absent = [source for source in sources if source not in tensors]
        if absent:
            missing += absent
            continue
        found = [tensors[source] for source in sources]
        shapes = layout.shapes(name_in_model, tuple(tensor.shape), heads)
        if name_in_model == "pos_embed":
            value = _positions(layout, found, tensor, model, position_resize)
            if value is None:
                mismatched.append(_mismatch(sources[0], found[0], shapes[0]))
            else:
                offered[name_in_model] = value
            continue
        wrong = [
            _mismatch(source, found_tensor, shape)
            for source, found_tensor, shape in zip(sources, found, shapes, strict=True)
            if shape is not None and tuple(found_tensor.shape) != shape
        ]
        mismatched += wrong
        if wrong:
            continue
        try:
            value = layout.value(name_in_model, found)
        except (IndexError, RuntimeError):
            continue  # one of several sources is of another shape, which is reported where it is a tensor itself
        if value.shape == tensor.shape:
            offered[name_in_model] = value
    rest = tensors.keys() - used
    left_out = {source for source in rest if re.match(layout.left_out, source)}
    mismatched += [
        f"{source}: its values differ from those that the model computes itself"
        for source in left_out
        if not _agrees(tensors[source], model, source)
    ]
    return offered, LoadReport(
        missing=tuple(sorted(set(missing))),
        unexpected=tuple(sorted(rest - left_out)),
        mismatched=tuple(sorted(set(mismatched))),
        left_out=tuple(sorted(left_out)),
    )


def heads_of(model: Any) -> int:
    """Attention heads of a model's first block."""
    blocks = model.blocks if hasattr(model, "blocks") else model.layers[0].blocks
    return blocks[0].attn.num_heads


def _mismatch(source: str, found: Tensor, shape: Shape) -> str:
    return f"{source}: file {tuple(found.shape)}, model {shape}"


def _positions(
    layout: Layout, found: list[Tensor], wanted_1ND: Tensor, model: Any, resize: PositionResize
) -> Tensor | None:
    """Positions on the model's grid; None where the file's are of another width or on no square grid."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    try:
        there_1ND = layout.value("pos_embed", found)
    except (IndexError, RuntimeError):  # of another rank
        return None
    if there_1ND.ndim != 3 or there_1ND.shape[0] != 1 or there_1ND.shape[2] != wanted_1ND.shape[2]:
        return None
    side = math.isqrt(max(there_1ND.shape[1] - prefix, 0))
    if side == 0 or side * side != there_1ND.shape[1] - prefix:
        return None
    kernel = {} if layout.antialias else {"interpolation": "bilinear", "antialias": False}
    grid = list(model.patch_embed.grid_size)
    if [side, side] == grid:
        return there_1ND
    if resize == "vpt":
        return _resampled_as_vpt(there_1ND.float(), prefix, side, grid)
    return resample_abs_pos_embed(there_1ND, grid, num_prefix_tokens=prefix, **kernel)


def _resampled_as_vpt(there_1ND: Tensor, prefix: int, side: int, grid: list[int]) -> Tensor:
    """Bilinear with aligned corners: the grid's corners keep their values. Prefix tokens are left as they are."""
    square_1DSS = there_1ND[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized_1DN = F.interpolate(square_1DSS, size=grid, mode="bilinear", align_corners=True).flatten(2)
    return torch.cat([there_1ND[:, :prefix], resized_1DN.transpose(1, 2)], dim=1)


def _agrees(found_tensor: Tensor, model: nn.Module, name: str) -> bool:
    """Whether a tensor that is left out equals what the model computes itself.

    A buffer is compared where both hold it for windows of equal size and number. A bias that the model lacks must be
    zero, as those of DINOv3's distilled models are.
    """
    if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.bias", name):
        return found_tensor.is_meta or not found_tensor.any()
    wanted = dict(model.named_buffers()).get(name)
    if wanted is None or wanted.is_meta or wanted.shape != found_tensor.shape:
        return True
    return torch.equal(wanted, found_tensor.to(wanted.dtype))
