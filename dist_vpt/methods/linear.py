"""Linear probing: a linear head on the frozen backbone's features. A reader."""

import torch
from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods.base import Reader
from dist_vpt.methods.config import LinearConfig


class Linear(Reader):
    """K x (D + 1) trained numbers; it reads only the backbone's pooled features."""

    on_swin = True

    def __init__(self, recipe: LinearConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)

    def read(self, stream: StreamOutput) -> Tensor:
        return self.classify(stream.pooled)

    def merged(self) -> dict[str, Tensor]:
        return {}
