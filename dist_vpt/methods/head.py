"""The linear head of all methods, and the standardization of the features that it reads.

F features, K classes; X stands for any leading dimensions.
"""

import math

import torch
from torch import Tensor, nn

from dist_vpt.methods.config import HeadKind

LENGTH = 20.0  # of standardized features, root mean square


class FeatureNorm(nn.Module):
    """Features [..., F] standardized: minus a mean, over a deviation, both of training images and constant in training.

    All are then multiplied by a number that gives them a root-mean-square length of 20 whatever F (that of 400 features
    with deviation 1): with AdamW, whose steps are equally large for every weight, the logits of many features would
    else move faster than those of few.

    A head's optimizer sees the same numbers whatever the scale of a backbone's features. This changes how a linear
    head is trained, and not what it can compute. ``mean`` and ``std`` (the deviation, with that number) [F] float32: 0
    and 1 until they are measured between ``start`` and ``finish``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self._seen: list[Tensor] | None = None

    def start(self) -> None:
        """Keep what is seen from now on, as it is."""
        self._seen = []

    def finish(self) -> None:
        """Take mean and standard deviation of what was seen since ``start``.

        A feature that hardly varies is not blown up: its deviation counts as a hundredth of all features' at least, and
        where none varies as the features' root mean square.
        """
        assert self._seen
        seen_XF = torch.cat(self._seen).double()
        self._seen = None
        variance_F = seen_XF.var(0, correction=0)
        size, varies = seen_XF.square().mean(), variance_F.mean()
        # One image, or copies of one, say nothing of deviations.
        least = 1e-4 * varies if varies > 1e-6 * size else size.where(size > 0, 1.0)
        self.mean.copy_(seen_XF.mean(0))
        self.std.copy_((variance_F.maximum(least) * seen_XF.shape[1]).sqrt() / LENGTH)

    def forward(self, features: Tensor) -> Tensor:
        if self._seen is not None:
            self._seen.append(features.detach().flatten(0, -2))
        return (features - self.mean) / self.std


def classification_head(features: int, classes: int, kind: HeadKind) -> nn.Linear:
    """standardized: zeros, so that all classes are equally likely before the first step.

    published: that of the published VPT: kaiming-normal (fan-out) weight; bias -log(99), a prior of 0.01 a class.
    """
    head = nn.Linear(features, classes)
    if kind == "standardized":
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head
    nn.init.kaiming_normal_(head.weight, mode="fan_out")
    nn.init.constant_(head.bias, -math.log(99.0))
    return head
