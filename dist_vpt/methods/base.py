"""The contract between a method and everything else.

B batch, S image side, N tokens, D width, K classes.

A method owns a backbone and what is trained. It is called with images and gives logits; which of its parameters
are trainable is decided here by structure: the backbone's are frozen, the method's own are not.

- A **writer** changes what the blocks compute, so gradients flow through them: it overrides ``forward``.
- A **reader** only reads what the frozen backbone computes anyway: it says what it needs of the stream
  (``observe``, always without autograd) and what it makes of that (``read``).
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dist_vpt.backbones.backbone import Backbone


class MethodSettings(BaseModel):
    """What every method's part of the recipe shares."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Method(nn.Module):
    """Images [B, 3, S, S] (uint8) -> logits [B, K] (float32)."""

    # Whether the backbone's own weights are trained: they then stay float32 and are computed under autocast.
    trains_backbone: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__()
        self.backbone = backbone.requires_grad_(self.trains_backbone)
        if not self.trains_backbone:
            backbone.hold_in(compute)
        self.compute = compute
        self.head = classification_head(backbone.width, classes)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimiser gets and an adapter file holds."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def classify(self, features_BD: Tensor) -> Tensor:
        """The head in float32 whatever the backbone's dtype: it is tiny, and its loss is what is minimised."""
        return self.head(features_BD.float())


class Reader(Method):
    """A method that never changes the image's tokens: the backbone runs without autograd."""

    def observe(self, images_B3SS: Tensor) -> Any:
        """What the method needs of the frozen stream; runs without autograd."""
        raise NotImplementedError

    def read(self, observed: Any) -> Tensor:
        """Logits [B, K] from what was observed."""
        raise NotImplementedError

    def forward(self, images_B3SS: Tensor) -> Tensor:
        with torch.no_grad():
            observed = self.observe(images_B3SS)
        return self.read(observed)


def classification_head(width: int, classes: int) -> nn.Linear:
    """The head of VPT's published set-up: kaiming-normal (fan-out) weight; bias -log(99), a prior of 0.01 a class."""
    head = nn.Linear(width, classes)
    nn.init.kaiming_normal_(head.weight, mode="fan_out")
    nn.init.constant_(head.bias, -math.log(99.0))
    return head
