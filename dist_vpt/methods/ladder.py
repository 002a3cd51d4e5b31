"""Side networks that climb beside the frozen blocks. Readers.

B batch, N tokens, D width of the backbone, W width of the side network, L blocks, F = D features, T readers.

Both kinds read the output z_l of every block, each token standardized (zero mean, unit deviation), so that neither
depends on the scale of a backbone's tokens, and end in a correction of the features that linear probing reads, which is
0 before the first step:

    features = standardized(pooled) + correction

- ``lst`` (ladder side tuning, NeurIPS 2022, arXiv 2206.06522): a narrow transformer layer for each block reads a gated
  sum, y_l = layer_l(g_l down_l(z_l) + (1 - g_l) y_{l-1}) with g_l = sigmoid of a learned number and y_0 = 0; the
  correction is up(norm(y_L)), pooled.
- ``last`` (low-rank attention side tuning, arXiv 2402.04009): attention of a low rank without an MLP, at the backbone's
  width, u_l = z_l + u_{l-1} + c_l with c_l = up_l(attention(down_l(norm_l(u_{l-1})))) and u_0 the embedded tokens; the
  features lack the sum of the z_l before the last, so that the correction is the sum of the c_l, pooled.

Pooled is as the backbone pools: its class token, or the mean of the patches.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec
from dist_vpt.methods.base import StackReader, standardize_stack
from dist_vpt.methods.config_readers import LadderConfig
from dist_vpt.methods.stack import ReaderStack, Sources
from dist_vpt.methods.stacked_layers import (
    Dropout,
    Layer,
    LowRankAttention,
    layer_norm,
    linear,
    low_rank_attention,
    shared_linear,
    standardize_tokens,
    transformer_layer,
)


class Ladder(StackReader):
    """lst: ``down`` [L] D -> W, gates [L], ``layers`` [L], norm, ``up`` W -> D; last: ``layers`` [L] of rank r."""

    def __init__(self, recipe: LadderConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.recipe = recipe
        depth, width = len(backbone.blocks), backbone.width
        if recipe.kind == "last":
            self.layers = nn.ModuleList(LowRankAttention(width, recipe.rank) for _ in range(depth))
            return
        narrow = side_width(width, recipe)
        self.down = nn.ModuleList(nn.Linear(width, narrow) for _ in range(depth))
        self.gates = nn.Parameter(torch.zeros(depth))
        self.layers = nn.ModuleList(Layer(narrow, recipe.mlp_ratio * narrow) for _ in range(depth))
        self.norm = nn.LayerNorm(narrow)
        self.up = nn.Linear(narrow, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def spec(self) -> StreamSpec:
        first = 0 if self.recipe.kind == "last" else 1
        return StreamSpec(states=tuple(range(first, len(self.backbone.blocks) + 1)))

    def measure(self, images: Tensor | StreamOutput) -> None:
        assert isinstance(images, StreamOutput)
        self.standardized(images.pooled.to(next(self.head.parameters()).dtype))

    @classmethod
    def features_of_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, sources: Sequence[Sources]
    ) -> list[Tensor]:
        with torch.no_grad():  # the same for all readers
            states = [standardize_tokens(state_BND) for state_BND in stream.states]
        features = []
        for stack, own in zip(stacks, sources, strict=True):
            first = cast(Ladder, stack.readers[0])
            climb = first._climb_last if first.recipe.kind == "last" else first._climb_lst
            dropout = Dropout.of(stack, own)
            with first.autocast(stream.pooled.device):
                correction_TBD = climb(stack, states, dropout)
            pooled_TBD = standardize_stack(stack, stream.pooled.expand(len(stack.readers), -1, -1))
            features.append(pooled_TBD + correction_TBD)
        return features

    def _climb_lst(self, stack: ReaderStack, states: Sequence[Tensor], dropout: Dropout) -> Tensor:
        weights, T = stack.trained, len(stack.readers)
        gates_LT = weights["gates"].sigmoid().unbind(1)
        y_TBNW = states[0].new_zeros(())
        for n, (state_BND, gate_T) in enumerate(zip(states, gates_LT, strict=True)):
            gate = gate_T.view(T, 1, 1, 1)
            y_TBNW = gate * shared_linear(state_BND, weights, f"down.{n}") + (1 - gate) * y_TBNW
            y_TBNW = transformer_layer(y_TBNW, weights, f"layers.{n}", self.recipe.heads, dropout)
        return linear(self._pooled(layer_norm(y_TBNW, weights, "norm")), weights, "up")

    def _climb_last(self, stack: ReaderStack, states: Sequence[Tensor], dropout: Dropout) -> Tensor:
        weights, T = stack.trained, len(stack.readers)
        u_TBND: Tensor = states[0].expand(T, -1, -1, -1)
        correction = u_TBND.new_zeros(())
        for n, state_BND in enumerate(states[1:]):
            change_TBND = dropout(low_rank_attention(u_TBND, weights, f"layers.{n}", self.recipe.heads))
            correction = correction + self._pooled(change_TBND)
            u_TBND = state_BND + u_TBND + change_TBND
        return correction

    def _pooled(self, x_TBNW: Tensor) -> Tensor:
        """[T, B, W], as the backbone pools tokens; of one that pools by attention the mean of the patches."""
        backbone = self.backbone
        if backbone.attn_pool is not None:
            return x_TBNW[:, :, backbone.prefix :].mean(2)
        return backbone.own_pool(x_TBNW.flatten(0, 1)).unflatten(0, x_TBNW.shape[:2])


def side_width(width: int, recipe: LadderConfig) -> int:
    """W: the backbone's width over ``reduction``, rounded up to a multiple of the heads."""
    return -(-width // (recipe.reduction * recipe.heads)) * recipe.heads
