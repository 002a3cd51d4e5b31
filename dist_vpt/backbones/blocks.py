"""The parts of timm's blocks, for methods that read or extend them from outside.

B images, N tokens, D width, H heads, E = D / H.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dist_vpt.errors import UserError

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone


@dataclass(frozen=True)
class BlockParts:
    """The parts of a pre-norm block: x' = x + ls1(attn(norm1(x))), then x' + ls2(mlp(norm2(x')))."""

    norm1: nn.Module
    qkv: nn.Linear
    heads: int
    scale: float  # of the scores, 1 / sqrt(E)
    q_norm: nn.Module  # identities where the backbone has no qk-norm
    k_norm: Any
    attn_norm: nn.Module
    proj: nn.Module
    ls1: nn.Module  # identities where the backbone has no LayerScale
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module

    def project(self, part: int, tokens_XD: Tensor) -> Tensor:
        """Queries (part 0), keys (1) or values (2) of tokens [..., D], by heads: [..., H, E]."""
        weight_ED, bias_E = self.weights(part)
        return nn.functional.linear(tokens_XD, weight_ED, bias_E).unflatten(-1, (self.heads, -1))

    def weights(self, part: int) -> tuple[Tensor, Tensor | None]:
        """Weight [H * E, D] and bias [H * E] of queries (0), keys (1) or values (2)."""
        bias = self.qkv.bias
        return self.qkv.weight.chunk(3)[part], None if bias is None else bias.chunk(3)[part]


def unpack_block(
    module: nn.Module, number: int, fix: str = "choose another backbone, or method.name=linear"
) -> BlockParts:
    """The parts of a block. Raises UserError unless it is a plain pre-norm block."""
    block: Any = module
    plain = type(block) is Block and type(block.attn) is Attention
    if not plain or getattr(block.attn, "gate", None) is not None:  # timm before 1.0.28 has no gates
        attention = type(getattr(block, "attn", block)).__name__
        raise UserError(
            f"block {number} of the backbone is a {type(block).__name__} with {attention}: its parts are accessible "
            f"only in timm's plain pre-norm Block; {fix}"
        )
    attn = block.attn
    return BlockParts(
        norm1=block.norm1,
        qkv=attn.qkv,
        heads=attn.num_heads,
        scale=attn.scale,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        attn_norm=attn.norm,
        proj=attn.proj,
        ls1=block.ls1,
        norm2=block.norm2,
        mlp=block.mlp,
        ls2=block.ls2,
    )


def has_key_norm(parts: BlockParts) -> bool:
    """Whether keys are normalized per head (qk-norm)."""
    return not isinstance(parts.k_norm, nn.Identity)


def subtracts_mean(norm: nn.Module) -> bool:
    """Whether a norm of keys subtracts their mean (LayerNorm) or not (RMSNorm). Raises UserError for other norms."""
    if isinstance(norm, nn.LayerNorm):
        return True
    if "rms" in type(norm).__name__.lower():
        return False
    raise UserError(
        f"the backbone normalizes keys by {type(norm).__name__}: only LayerNorm and RMSNorm have the absorbed form; "
        "set method.form=projected"
    )


def key_scale(parts: BlockParts, normed_BND: Tensor) -> Tensor:
    """1 / standard deviation (RMSNorm: 1 / root mean square) of each token's key per head, [B, N, H]."""
    keys_BNHE = widened(parts.project(1, normed_BND))
    if subtracts_mean(parts.k_norm):
        keys_BNHE = keys_BNHE - keys_BNHE.mean(-1, keepdim=True)
    return (keys_BNHE.square().mean(-1) + parts.k_norm.eps).rsqrt().to(normed_BND.dtype)


def keys_and_values(parts: BlockParts, normed_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the block's normalized inputs, per head, [B, H, N, E] each."""
    keys_BNHE = parts.k_norm(parts.project(1, normed_BND))
    return keys_BNHE.transpose(1, 2), parts.project(2, normed_BND).transpose(1, 2)


def widened(x: Tensor) -> Tensor:
    """Half precision as float32, in which softmax and norms are computed; other dtypes unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# Linear layers that a method may target: path below the block, and which third of the rows (None: all).
LINEAR = {
    "q": ("attn.qkv", 0),
    "k": ("attn.qkv", 1),
    "v": ("attn.qkv", 2),
    "proj": ("attn.proj", None),
    "fc1": ("mlp.fc1", None),
    "fc2": ("mlp.fc2", None),
}


def linear_of(block: nn.Module, number: int, target: str) -> tuple[str, nn.Linear, slice]:
    """A linear layer of a block: timm's name, the layer, the rows of its weight. Raises UserError if there is none."""
    unpack_block(block, number)
    path, third = LINEAR[target]
    try:
        linear = block.get_submodule(path)
    except AttributeError:
        linear = block
    if not isinstance(linear, nn.Linear):
        raise UserError(
            f"block {number} of the backbone has no linear layer {path}: leave {target} out, or choose another"
        )
    rows = slice(None)
    if third is not None:
        size = linear.out_features // 3
        rows = slice(third * size, (third + 1) * size)
    return f"blocks.{number}.{path}", linear, rows


def operations(backbone: "Backbone") -> Iterator[tuple[str, nn.Module]]:
    """All modules that multiply tokens by a weight: patch embedding, linear layers and norms, under timm's names.

    Raises UserError if the backbone has other operations, or biases elsewhere.
    """
    if type(backbone.stem.patch_embed) is not PatchEmbed:
        raise UserError(
            f"the backbone embeds patches by a {type(backbone.stem.patch_embed).__name__}: bias and ssf support only "
            "timm's plain PatchEmbed; choose another method or backbone"
        )
    for name, module in backbone.named_modules():
        separate = [key for key, _ in module.named_parameters(recurse=False) if key.endswith("_bias")]
        if separate:
            raise UserError(
                f"{name} of the backbone, a {type(module).__name__}, holds {' and '.join(separate)} apart from the "
                "layers that they belong to: bias and ssf would skip those; choose another method or backbone"
            )
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            yield backbone.timm_name(name), module
