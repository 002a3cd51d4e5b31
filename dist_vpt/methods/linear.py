"""Linear probing: a linear head on the frozen backbone's features. A reader.

Features of all blocks (``reads: blocks``) are those of Head2Toe (ICML 2022, arXiv 2201.03529) without its selection.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from dist_vpt.backbones.group import naming_part
from dist_vpt.backbones.swin import SwinBackbone
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec
from dist_vpt.methods.base import Reader, classify_stack
from dist_vpt.methods.block_features import block_features, count_block_features
from dist_vpt.methods.config_readers import LinearConfig
from dist_vpt.methods.stack import ReaderStack, Sources


class Linear(Reader):
    """K x (F + 1) trained numbers; F = D pooled features, or with ``reads: blocks`` those of every block."""

    on_swin = True
    joins = True

    def __init__(self, recipe: LinearConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        self.recipe = recipe
        features = None
        if recipe.reads == "blocks":
            for number, member in enumerate(backbone.members):
                if isinstance(member, SwinBackbone):
                    with naming_part(backbone, number):
                        raise UserError(
                            "method.reads = blocks: not on Swin, whose blocks differ in width; set reads=pooled"
                        )
            features = sum(count_block_features(member, len(member.blocks)) for member in backbone.members)
        super().__init__(backbone, classes, compute, head=recipe.head, features=features)

    @property
    def spec(self) -> StreamSpec:
        return self.specs[0]

    @property
    def specs(self) -> tuple[StreamSpec, ...]:
        pooled = self.recipe.reads == "pooled"
        depths = [0 if pooled else len(member.blocks) for member in self.backbone.members]
        return tuple(StreamSpec(states=tuple(range(1, depth + 1))) for depth in depths)

    def stream_features(self, stream: StreamOutput) -> Tensor:
        """What the head reads, [B, F]."""
        if self.recipe.reads == "pooled":
            return stream.pooled
        states = self.states_of_each(stream.states)
        return block_features(self.backbone, stream, states, next(self.head.parameters()).dtype)

    def read(self, stream: StreamOutput) -> Tensor:
        return self.classify(self.stream_features(stream))

    @classmethod
    def read_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, sources: Sequence[Sources]
    ) -> list[Tensor]:
        features_BF = cast(Linear, stacks[0].readers[0]).stream_features(stream)
        return [classify_stack(stack, features_BF.expand(len(stack.readers), -1, -1)) for stack in stacks]

    def merged(self) -> dict[str, Tensor]:
        return super().merged() if self.recipe.reads == "blocks" else {}
