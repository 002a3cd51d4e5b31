"""Linear probing: a linear head on the frozen backbone's features. A reader."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_vpt.backbones.backbone import Backbone
from dist_vpt.frozen_stream import Observed
from dist_vpt.methods.base import MethodSettings, Reader


class LinearRecipe(MethodSettings):
    """A linear head on frozen features."""

    name: Literal["linear"] = Field("linear", description="linear probing")


class Linear(Reader):
    """K x (D + 1) trained numbers; the backbone's pooled features are all that it reads."""

    def __init__(self, recipe: LinearRecipe, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute)

    def read(self, observed: Observed) -> Tensor:
        return self.classify(observed.pooled)
