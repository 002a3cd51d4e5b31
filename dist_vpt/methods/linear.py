"""Linear probing: a linear head on the frozen backbone's features. A reader."""

import torch
from torch import Tensor

from dist_vpt.backbones.backbone import Backbone
from dist_vpt.frozen_stream import Observed
from dist_vpt.methods.base import Reader
from dist_vpt.methods.recipe import LinearRecipe


class Linear(Reader):
    """K x (D + 1) trained numbers; the backbone's pooled features are all that it reads."""

    on_swin = True

    def __init__(self, recipe: LinearRecipe, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute)

    def read(self, observed: Observed) -> Tensor:
        return self.classify(observed.pooled)

    def merged(self) -> dict[str, Tensor]:
        return {}
