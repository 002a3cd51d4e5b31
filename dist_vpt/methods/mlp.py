"""A multilayer perceptron on the frozen backbone's features (a baseline of VPT's tables). A reader."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods.base import Reader
from dist_vpt.methods.config_readers import MLPConfig
from dist_vpt.methods.head import classification_head


class MLP(Reader):
    """Hidden layers D -> width -> ... -> width (kaiming-normal), then the head of all methods."""

    on_swin = True
    joins = True

    def __init__(self, recipe: MLPConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        width = recipe.width or backbone.width
        super().__init__(backbone, classes, compute, head=recipe.head)
        if recipe.layers > 1:  # the features' norm stays before the first layer
            self.head = classification_head(width, classes, recipe.head)
        hidden: list[nn.Module] = []
        for before, after in pairwise([backbone.width, *[width] * (recipe.layers - 1)]):
            layer = nn.Linear(before, after)
            nn.init.kaiming_normal_(layer.weight, mode="fan_in")
            nn.init.zeros_(layer.bias)
            hidden += [layer, nn.GELU(), nn.Dropout(recipe.dropout)]
        self.head = nn.Sequential(*hidden, self.head)

    def read(self, stream: StreamOutput) -> Tensor:
        return self.classify(stream.pooled)
