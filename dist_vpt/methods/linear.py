"""Linear probing: a linear head on the frozen backbone's features. A reader."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods.base import Reader, classify_stack
from dist_vpt.methods.config import LinearConfig
from dist_vpt.methods.stack import ReaderStack


class Linear(Reader):
    """K x (D + 1) trained numbers; it reads only the backbone's pooled features."""

    on_swin = True

    def __init__(self, recipe: LinearConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)

    def read(self, stream: StreamOutput) -> Tensor:
        return self.classify(stream.pooled)

    @classmethod
    def read_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, seeds: Sequence[Sequence[int] | None]
    ) -> list[Tensor]:
        return [classify_stack(stack, stream.pooled.expand(len(stack.readers), -1, -1)) for stack in stacks]

    def merged(self) -> dict[str, Tensor]:
        return {}
