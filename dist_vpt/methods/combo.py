"""A small transformer on the patches of all blocks (after ComBo, NeurIPS 2025, arXiv 2512.01405). A reader.

B batch, N tokens, M patches of a map, D width of the backbone, L maps that are read, F = L D (of several backbones
the sum), W width, T readers.

At each position of the image the outputs of all blocks are standardized and concatenated, and one affine layer, the
same for all positions, maps them to a narrow token:

    t_m = P [s_1,m; ...; s_L,m] + p + e_m        y = transformer([c, t_1, ..., t_M])        logits = head(norm(y_0))

The frozen stream needs no gradient, so that P costs one product forward and one backward, for any number of readers.
Of several backbones all blocks are concatenated, after their patches were resampled to one grid; the penalty
g sum_k |P_k|, where P_k are the columns of P that read backbone k, then ranks them (``method.group_penalty``).
The paper's text leaves open over what the outputs are standardized, whether tokens have a position code and how wide
the MLPs are: here it is each channel over training images (``standardize: channel``; or each token), a learned code e
that starts at 0, and the transformer's own width (``mlp_ratio: 1``, with which ViT-B/16 has the paper's 1.8 M numbers).

With ``sum_blocks`` there is one map, the sum of the blocks' outputs, as one aggregate serves MIST (CVPR 2025): F = D.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vpt.backbones.group import naming_part
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec
from dist_vpt.methods.base import StackReader, chosen_blocks, standardize_stack
from dist_vpt.methods.block_features import block_features, count_block_features
from dist_vpt.methods.config_readers import ComboConfig
from dist_vpt.methods.head import FeatureNorm, classification_head
from dist_vpt.methods.stack import ReaderStack, Sources
from dist_vpt.methods.stacked_layers import (
    Dropout,
    Layer,
    layer_norm,
    shared_linear,
    standardize_tokens,
    transformer_layer,
)


class Combo(StackReader):
    """Projection [W, F], class token, position codes [1 + M', W], ``depth`` transformer layers, norm and head.

    M' = M, or with ``tokens: all`` the prefix tokens too.
    """

    joins = True

    def __init__(self, recipe: ComboConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        self.read_blocks, self.sides = [], []
        for number, member in enumerate(backbone.members):
            with naming_part(backbone, number):
                self.read_blocks.append(chosen_blocks(recipe.blocks, member))
                self.sides.append(_side(member))
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.recipe = recipe
        self.maps = [1 if recipe.sum_blocks else len(blocks) for blocks in self.read_blocks]
        members = list(zip(backbone.members, self.maps, strict=True))
        direct = 0 if recipe.head_reads == "token" else backbone.width
        if recipe.head_reads == "blocks":
            direct = sum(count_block_features(member, maps) for member, maps in members)
        # The transformer's class token is not standardized: it is trained, so there is nothing to measure beforehand.
        self.feature_norm = FeatureNorm(direct) if direct and recipe.head == "standardized" else None
        self.head = classification_head(recipe.width + direct, classes, recipe.head)
        self.grid = recipe.grid or max(self.sides)
        self.prefix = _prefix(backbone) if recipe.tokens == "all" else 0
        widths = [member.width for member, maps in members for _ in range(maps)]
        if recipe.standardize == "channel":
            self.stream_norms = nn.ModuleList(FeatureNorm(width, length=None) for width in widths)
        self.projection = nn.Linear(sum(widths), recipe.width)
        nn.init.trunc_normal_(self.projection.weight, std=sum(widths) ** -0.5)
        nn.init.zeros_(self.projection.bias)
        self.class_token = nn.Parameter(torch.randn(1, recipe.width))
        self.positions = nn.Parameter(torch.zeros(1 + self.prefix + self.grid**2, recipe.width))
        self.layers = nn.ModuleList(Layer(recipe.width, recipe.mlp_ratio * recipe.width) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(recipe.width)

    @property
    def spec(self) -> StreamSpec:
        return self.specs[0]

    @property
    def specs(self) -> tuple[StreamSpec, ...]:
        only = not self.prefix and self.recipe.head_reads != "blocks"
        states = [tuple(n + 1 for n in blocks) for blocks in self.read_blocks]
        return tuple(StreamSpec(states=each, patches_only=only, summed=self.recipe.sum_blocks) for each in states)

    def measure(self, images: Any) -> None:
        assert isinstance(images, StreamOutput)
        self.inputs(images)
        if self.feature_norm is not None:
            self.feature_norm(self.direct(images))

    def direct(self, stream: StreamOutput) -> Tensor:
        """What the head reads besides the transformer's class token, [B, F]."""
        states = stream.states if self.recipe.head_reads == "blocks" else ()
        each = self.states_of_each(states) if states else [()] * len(self.sides)
        return block_features(self.backbone, stream, each, self.positions.dtype)

    @torch.no_grad()
    def inputs(self, stream: StreamOutput) -> Tensor:
        """What is projected, [B, M', F]: every map's tokens on the grid, standardized."""
        columns: list[Tensor] = []
        for k, states in enumerate(self.states_of_each(stream.states)):
            skipped = 0 if self.prefix or self.spec.patches_only else self.backbone.members[k].prefix
            for state_BND in states:
                tokens_BND = self._on_grid(state_BND[:, skipped:].to(self.positions.dtype), self.sides[k])
                if self.recipe.standardize == "channel":
                    tokens_BND = self.stream_norms[len(columns)](tokens_BND)
                else:
                    tokens_BND = standardize_tokens(tokens_BND)
                columns.append(tokens_BND.to(state_BND.dtype))
        return torch.cat(columns, dim=2)

    def _on_grid(self, tokens_BND: Tensor, side: int) -> Tensor:
        if self.grid == side:
            return tokens_BND
        prefix_BRD, patches_BMD = tokens_BND.split([self.prefix, tokens_BND.shape[1] - self.prefix], dim=1)
        map_BDSS = patches_BMD.transpose(1, 2).unflatten(2, (side, side))
        size = (self.grid, self.grid)
        map_BDGG = F.interpolate(map_BDSS, size=size, mode="bilinear", align_corners=False)
        return torch.cat([prefix_BRD, map_BDGG.flatten(2).transpose(1, 2)], dim=1)

    def group_norms(self, weight_XWF: Tensor) -> Tensor:
        """|P_k| (Frobenius) of each backbone, [..., K], of one projection's weight [W, F] or of several."""
        columns = [member.width * maps for member, maps in zip(self.backbone.members, self.maps, strict=True)]
        return torch.stack([part.flatten(-2).norm(dim=-1) for part in weight_XWF.split(columns, dim=-1)], dim=-1)

    def penalty(self) -> Tensor | float:
        rate = self.recipe.group_penalty
        return rate * self.group_norms(self.projection.weight).sum() if rate else 0.0

    @classmethod
    def penalties(cls, stack: ReaderStack) -> Tensor | None:
        readers = cast(Sequence[Combo], stack.readers)
        if not any(reader.recipe.group_penalty for reader in readers):
            return None
        norm_T = readers[0].group_norms(stack.trained["projection.weight"]).sum(1)
        # Rates go to a GPU with the kernels: a tensor made of them would be waited for.
        return torch.stack([norm * reader.recipe.group_penalty for norm, reader in zip(norm_T, readers, strict=True)])

    @classmethod
    def features_of_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, sources: Sequence[Sources]
    ) -> list[Tensor]:
        first = cast(Combo, stacks[0].readers[0])
        # The norms of all readers were measured from the same training images, so that one reader's serve all.
        x_BMF = first.inputs(stream)
        direct_BF = None if first.recipe.head_reads == "token" else first.direct(stream)
        features = []
        for stack, own in zip(stacks, sources, strict=True):
            features_TBX = cls._transformed(stack, x_BMF, own)
            if direct_BF is not None:
                direct_TBF = standardize_stack(stack, direct_BF.expand(len(stack.readers), -1, -1))
                features_TBX = torch.cat([features_TBX, direct_TBF], dim=2)
            features.append(features_TBX)
        return features

    @staticmethod
    def _transformed(stack: ReaderStack, x_BMF: Tensor, sources: Sources) -> Tensor:
        """The transformers' class tokens [T, B, W]."""
        first, weights, T = cast(Combo, stack.readers[0]), stack.trained, len(stack.readers)
        dropout = Dropout.of(stack, sources)
        with first.autocast(x_BMF.device):
            tokens_TBMW = shared_linear(x_BMF, weights, "projection")
            class_T1W = weights["class_token"].view(T, 1, 1, -1).expand(-1, x_BMF.shape[0], -1, -1)
            x_TBNW = torch.cat([class_T1W, tokens_TBMW.to(class_T1W.dtype)], dim=2)
            x_TBNW = dropout(x_TBNW + weights["positions"].unsqueeze(1))
            for n in range(first.recipe.depth):
                x_TBNW = transformer_layer(x_TBNW, weights, f"layers.{n}", first.recipe.heads, dropout)
            return layer_norm(x_TBNW[:, :, 0], weights, "norm")


def _side(backbone: Backbone) -> int:
    """Patches on a side of a backbone's images. Raises UserError where they are no square."""
    side = math.isqrt(backbone.patches)
    if side**2 != backbone.patches:
        raise UserError(
            f"method.name = combo: the backbone's {backbone.patches} patches are no square grid, from which they could "
            "be resampled; choose another one"
        )
    return side


def _prefix(backbone: Backbone) -> int:
    """Prefix tokens of all backbones, which must have equally many. Raises UserError where they do not."""
    found = [member.prefix for member in backbone.members]
    if len(set(found)) > 1:
        raise UserError(
            f"method.tokens = all: the backbones have {' and '.join(map(str, found))} class tokens and registers, and "
            "those of one position are concatenated; set method.tokens=patches"
        )
    return found[0]
