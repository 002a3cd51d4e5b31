"""Full fine-tuning: every weight is trained. The baseline of all others."""

import torch
from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.methods.base import Method
from dist_vpt.methods.config import FullConfig


class Full(Method):
    """Weights are held and updated in float32 and computed in the recipe's precision (autocast)."""

    on_swin = True

    def __init__(self, recipe: FullConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head, tuned=[backbone])

    def forward(self, images_B3SS: Tensor) -> Tensor:
        with self.autocast(images_B3SS.device):
            features_BD = self.backbone.pool(self.backbone(images_B3SS))
        return self.classify(features_BD)

    def merged(self) -> dict[str, Tensor]:
        return {}
