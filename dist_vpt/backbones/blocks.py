"""The parts of timm's blocks, for methods that read or extend them from outside.

B images, N tokens, D width, H heads, E = D / H.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers import AttentionRope, PatchEmbed, apply_rot_embed_cat
from timm.layers.attention import Attention
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dist_vpt.backbones.products import Linear, apply_linear
from dist_vpt.errors import UserError

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone


class SplitBiasLinear(Linear):
    """Queries, keys and values in one layer, whose bias has no part for keys, or none at all.

    timm's EvaAttention holds the two biases itself and reads the weight of its layer without calling it, so that no
    hook, and nothing that holds the weight in another way, would have an effect.
    """

    def __init__(self, linear: nn.Linear, q_bias: nn.Parameter | None, v_bias: nn.Parameter | None):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.q_bias, self.v_bias = q_bias, v_bias

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(x, self.weight, bias_of(self))


def bias_of(linear: nn.Linear) -> Tensor | None:
    """The bias that a linear layer adds, None: none."""
    if isinstance(linear, SplitBiasLinear) and linear.q_bias is not None and linear.v_bias is not None:
        return joint_bias(linear.q_bias, linear.v_bias)
    return linear.bias


def joint_bias(q_bias_E: Tensor, v_bias_E: Tensor) -> Tensor:
    """The bias of queries, keys and values, [3 * E], with zeros for keys."""
    return torch.cat([q_bias_E, torch.zeros_like(q_bias_E), v_bias_E])


@dataclass(frozen=True)
class BlockParts:
    """The parts of a pre-norm block: x' = x + ls1(attn(norm1(x))), then x' + ls2(mlp(norm2(x')))."""

    norm1: nn.Module
    projections: tuple[nn.Linear, ...]  # one for queries, keys and values together, or one for each
    heads: int
    scale: float  # of the scores, 1 / sqrt(E)
    q_norm: nn.Module  # identities where the backbone has no qk-norm
    k_norm: Any
    rotates_halves: bool  # which channels of a head rotary positions pair: (e, e + E / 2), or (2 e, 2 e + 1)
    attn_norm: nn.Module
    proj: nn.Module
    ls1: Callable[[Tensor], Tensor]  # identities where the backbone has no LayerScale
    end1: nn.Module  # of the attention's branch, after LayerScale: stochastic depth, or an identity
    norm2: nn.Module
    mlp: nn.Module
    ls2: Callable[[Tensor], Tensor]
    end2: nn.Module

    def project(self, part: int, tokens_XD: Tensor) -> Tensor:
        """Queries (part 0), keys (1) or values (2) of tokens [..., D], by heads: [..., H, E]."""
        weight_ED, bias_E = self.weights(part)
        return apply_linear(tokens_XD, weight_ED, bias_E).unflatten(-1, (self.heads, -1))

    def weights(self, part: int) -> tuple[Tensor, Tensor | None]:
        """Weight [H * E, D] and bias [H * E] of queries (0), keys (1) or values (2)."""
        if len(self.projections) == 3:
            return self.projections[part].weight, self.projections[part].bias
        joint = self.projections[0]
        weight_ED = joint.weight.chunk(3)[part]
        if isinstance(joint, SplitBiasLinear):
            return weight_ED, (joint.q_bias, None, joint.v_bias)[part]
        return weight_ED, None if joint.bias is None else joint.bias.chunk(3)[part]


def unpack_block(
    module: nn.Module, number: int, fix: str = "choose another backbone, or method.name=linear"
) -> BlockParts:
    """The parts of a block. Raises UserError unless it is a pre-norm block of timm's ViT or EVA."""
    block: Any = module
    attn = getattr(block, "attn", block)
    plain = type(block) is Block and type(attn) is Attention
    eva = type(block) is EvaBlock and type(attn) in (EvaAttention, AttentionRope)
    # timm before 1.0.28 has no gates, and timm before 1.0.30 no shared keys.
    gated, shared = getattr(attn, "gate", None) is not None, getattr(attn, "num_kv_groups", 1) > 1
    if not (plain or eva) or gated or shared:
        more = " and gates" if gated else " and keys that heads share" if shared else ""
        raise UserError(
            f"block {number} of the backbone is a {type(block).__name__} with {type(attn).__name__}{more}: its parts "
            "are accessible only in timm's pre-norm Block and EvaBlock, without gates and with a key for each head; "
            f"{fix}"
        )
    return BlockParts(
        norm1=block.norm1,
        projections=_projections(attn),
        heads=attn.num_heads,
        scale=attn.scale,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        rotates_halves=getattr(attn, "rotate_half", False),
        attn_norm=attn.norm,
        proj=attn.proj,
        ls1=block.ls1 if plain else partial(_scaled, block.gamma_1),
        end1=block.drop_path1,
        norm2=block.norm2,
        mlp=block.mlp,
        ls2=block.ls2 if plain else partial(_scaled, block.gamma_2),
        end2=block.drop_path2,
    )


def _projections(attn: Any) -> tuple[nn.Linear, ...]:
    return (attn.q_proj, attn.k_proj, attn.v_proj) if attn.qkv is None else (attn.qkv,)


def _scaled(gamma_D: Tensor | None, x_BND: Tensor) -> Tensor:
    return x_BND if gamma_D is None else gamma_D * x_BND


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


def keys_and_values(parts: BlockParts, normed_BND: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of the block's normalized inputs, per head, [B, H, N, E] each.

    ``rotary``: the backbone's rotary positions, by which the patches' keys are turned as in the block itself.
    """
    keys_BHNE = parts.k_norm(parts.project(1, normed_BND)).transpose(1, 2)
    values_BHNE = parts.project(2, normed_BND).transpose(1, 2)
    if rotary is None:
        return keys_BHNE, values_BHNE
    prefix = keys_BHNE.shape[2] - rotary.shape[-2]
    turned = apply_rot_embed_cat(keys_BHNE[:, :, prefix:], rotary, half=parts.rotates_halves)
    return torch.cat([keys_BHNE[:, :, :prefix], turned.to(keys_BHNE.dtype)], dim=2), values_BHNE


def widened(x: Tensor) -> Tensor:
    """Half precision as float32, in which softmax and norms are computed; other dtypes unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Target(NamedTuple):
    """A linear layer of a block that a method may change, or some rows of it."""

    key: str  # of the method's own tensors
    name: str  # timm's
    linear: nn.Linear
    rows: slice  # of its weight


# Linear layers by the name that a recipe has for them: paths below the block. The first that a block has counts;
# of a SwiGLU's first layer there are two forms, one layer and two.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "proj": (("attn.proj",),),
    "fc1": (("mlp.fc1",), ("mlp.fc1_g", "mlp.fc1_x")),
    "fc2": (("mlp.fc2",),),
}
PARTS = ("q", "k", "v")  # of queries, keys and values: thirds of one layer, or layers of their own


def targets_of(block: nn.Module, number: int, target: str) -> list[Target]:
    """The linear layers of a block that a recipe's target names. Raises UserError if there is none."""
    parts, prefix = unpack_block(block, number), f"blocks.{number}"
    if target in PARTS:
        part = PARTS.index(target)
        if len(parts.projections) == 3:
            return [Target(target, f"{prefix}.attn.{target}_proj", parts.projections[part], slice(None))]
        joint = parts.projections[0]
        size = joint.out_features // 3
        return [Target(target, f"{prefix}.attn.qkv", joint, slice(part * size, (part + 1) * size))]
    for paths in LAYERS[target]:
        found = [_submodule(block, path) for path in paths]
        if all(isinstance(linear, nn.Linear) for linear in found):
            keys = [target] if len(paths) == 1 else [path.rpartition(".")[2] for path in paths]
            named = zip(keys, paths, found, strict=True)
            return [Target(key, f"{prefix}.{path}", linear, slice(None)) for key, path, linear in named]
    raise UserError(
        f"block {number} of the backbone has no linear layer {LAYERS[target][0][0]}: leave {target} out, or choose "
        "another"
    )


def _submodule(block: nn.Module, path: str) -> Any:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


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
        if separate and not isinstance(module, SplitBiasLinear):
            raise UserError(
                f"{name} of the backbone, a {type(module).__name__}, holds {' and '.join(separate)} apart from the "
                "layers that they belong to: bias and ssf would skip those; choose another method or backbone"
            )
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            yield backbone.timm_name(name), module
