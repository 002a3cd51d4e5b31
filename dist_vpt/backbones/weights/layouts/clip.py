"""CLIP in PyTorch: the image encoder beside its text encoder."""

import re

from torch import Tensor

from dist_vpt.backbones.weights.layouts.base import Layout, Shape

_PARTS = {
    "patch_embed.proj": "conv1",
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "norm_pre": "ln_pre",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "norm": "ln_post",
    "blocks": "transformer.resblocks",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _sources(name: str) -> tuple[str, ...]:
    pattern = "|".join(rf"\b{re.escape(part)}" + ("" if part.endswith(".") else r"\b") for part in _PARTS)
    return ("visual." + re.sub(pattern, lambda found: _PARTS[found[0]], name),)


def _shapes(name: str, shape: tuple[int, ...], heads: int) -> list[Shape]:
    return [shape[2:] if name == "cls_token" else shape[1:] if name == "pos_embed" else shape]


def _value(name: str, found: list[Tensor]) -> Tensor:
    return found[0].reshape(1, 1, -1) if name == "cls_token" else found[0][None] if name == "pos_embed" else found[0]


CLIP = Layout("CLIP with its text encoder, PyTorch", "vit", r"(?!visual\.)|visual\.proj$", _sources, _shapes, _value)
