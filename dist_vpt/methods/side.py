"""Side-tuning (Zhang et al., ECCV 2020, arXiv 1912.13503), the baseline "side" of VPT's tables. A reader.

B batch, S image side, D width, C channels of the side network.

A small network sees the image beside the frozen backbone, and a learned factor blends the two:

    features = a * pooled + (1 - a) * side(image)        a = sigmoid(blend)

A standardized head's mean and deviation are those of ``pooled``, before the blend.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec
from dist_vpt.methods.base import Reader
from dist_vpt.methods.config_readers import SideConfig


class Side(Reader):
    """``side``: convolutions [C, ., 3, 3], each halving the image, their spatial mean, and a layer C -> D."""

    on_swin = True

    def __init__(self, recipe: SideConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)
        layers: list[nn.Module] = []
        for before, after in pairwise([3, *[recipe.channels] * recipe.layers]):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(recipe.channels, backbone.width)]
        for layer in layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.side = nn.Sequential(*layers)
        self.blend = nn.Parameter(torch.zeros(1))

    @property
    def spec(self) -> StreamSpec:
        return StreamSpec(pixels=True)

    def read(self, stream: StreamOutput) -> Tensor:
        (pixels_B3SS,) = stream.pixels
        side_BD = self.side(pixels_B3SS)
        a = self.blend.sigmoid()
        pooled_BD = self.standardized(stream.pooled.to(side_BD.dtype))
        return self.head(a * pooled_BD + (1 - a) * side_BD)
