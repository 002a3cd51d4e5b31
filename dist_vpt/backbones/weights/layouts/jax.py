"""Vision transformers in JAX (.npz): kernels are [in, out], those of attention split by heads.

D width, E = D / H of H heads.
"""

import re

import torch
from torch import Tensor

from dist_vpt.backbones.weights.layouts.base import Layout, Shape


def _sources(name: str) -> tuple[str, ...]:
    names = {
        "patch_embed.proj.weight": "embedding/kernel",
        "patch_embed.proj.bias": "embedding/bias",
        "cls_token": "cls",
        "pos_embed": "Transformer/posembed_input/pos_embedding",
        "norm.weight": "Transformer/encoder_norm/scale",
        "norm.bias": "Transformer/encoder_norm/bias",
    }
    if name in names:
        return (names[name],)
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if not found:
        return (name,)  # JAX files do not have this part
    block, part, kind = f"Transformer/encoderblock_{found[1]}", found[2], found[3]
    kernel, scale = ("kernel", "scale") if kind == "weight" else ("bias", "bias")
    attention = f"{block}/MultiHeadDotProductAttention_1"
    return {
        "norm1": (f"{block}/LayerNorm_0/{scale}",),
        "norm2": (f"{block}/LayerNorm_2/{scale}",),
        "attn.qkv": tuple(f"{attention}/{projection}/{kernel}" for projection in ("query", "key", "value")),
        "attn.proj": (f"{attention}/out/{kernel}",),
        "mlp.fc1": (f"{block}/MlpBlock_3/Dense_0/{kernel}",),
        "mlp.fc2": (f"{block}/MlpBlock_3/Dense_1/{kernel}",),
    }.get(part, (name,))


def _shapes(name: str, shape: tuple[int, ...], heads: int) -> list[Shape]:
    if name.endswith("attn.qkv.weight"):
        D = shape[1]
        return [(D, heads, D // heads)] * 3
    if name.endswith("attn.qkv.bias"):
        return [(heads, shape[0] // 3 // heads)] * 3
    if name.endswith("attn.proj.weight"):
        return [(heads, shape[1] // heads, shape[0])]
    if name == "patch_embed.proj.weight":
        return [(shape[2], shape[3], shape[1], shape[0])]
    return [shape[::-1]] if len(shape) == 2 else [shape]


def _value(name: str, found: list[Tensor]) -> Tensor:
    if name.endswith("attn.qkv.weight"):
        return torch.cat([kernel_DHE.flatten(1).T for kernel_DHE in found])
    if name.endswith("attn.qkv.bias"):
        return torch.cat([bias_HE.flatten() for bias_HE in found])
    if name.endswith("attn.proj.weight"):
        return found[0].flatten(0, 1).T
    if name == "patch_embed.proj.weight":
        return found[0].permute(3, 2, 0, 1)
    return found[0].T if found[0].ndim == 2 else found[0]


JAX = Layout(
    "vision transformer, JAX (.npz)",
    "vit",
    r"(head|pre_logits)/",
    _sources,
    _shapes,
    _value,
    antialias=False,
)
