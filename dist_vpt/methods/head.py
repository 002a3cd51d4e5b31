"""The linear head of all methods, and the standardization of the features that it reads.

F features, K classes; X stands for any leading dimensions.
"""

import math

import torch
from torch import Tensor, nn

from dist_vpt.methods.config_base import HeadKind

LENGTH = 20.0  # of standardized features, root mean square


class FeatureNorm(nn.Module):
    """Features [..., F] standardized: minus a mean, over a deviation, both of training images and constant in training.

    ``length``: all are then multiplied by a number that gives them this root-mean-square length whatever F (20 is that
    of 400 features with deviation 1): with AdamW, whose steps are equally large for every weight, the logits of many
    features would else move faster than those of few. None: each keeps the deviation 1.

    A head's optimizer sees the same numbers whatever the scale of a backbone's features. This changes how a linear
    head is trained, and not what it can compute. ``mean`` and ``std`` (the deviation, with that number) [F] float32: 0
    and 1 until they are measured between ``start`` and ``finish``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int, length: float | None = LENGTH):
        super().__init__()
        self.length = length
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self._seen: _Moments | None = None

    def start(self) -> None:
        """Measure what is seen from now on, and pass it on as it is."""
        self._seen = _Moments()

    def finish(self) -> None:
        """Take mean and standard deviation of what was seen since ``start``.

        A feature that hardly varies is not blown up: its deviation counts as a hundredth of all features' at least, and
        where none varies as the features' root mean square.
        """
        assert self._seen is not None
        mean_F, variance_F = self._seen.mean, self._seen.squares / self._seen.count
        self._seen = None
        varies = variance_F.mean()
        size = varies + mean_F.square().mean()
        # One image, or copies of one, say nothing of deviations.
        least = 1e-4 * varies if varies > 1e-6 * size else size.where(size > 0, 1.0)
        factor = 1.0 if self.length is None else math.sqrt(len(mean_F)) / self.length
        self.mean.copy_(mean_F)
        self.std.copy_(variance_F.maximum(least).sqrt() * factor)

    def forward(self, features: Tensor) -> Tensor:
        if self._seen is not None:
            self._seen.add(features.detach().flatten(0, -2))
        return (features - self.mean) / self.std


class _Moments:
    """Mean and sum of squared deviations of rows [X, F] that come in parts (Chan et al., 1979), float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())

    def add(self, rows_XF: Tensor) -> None:
        rows_XF = rows_XF.double()
        mean_F, count = rows_XF.mean(0), self.count + len(rows_XF)
        squares_F = (rows_XF - mean_F).square().sum(0)
        if self.count:
            apart_F = mean_F - self.mean
            squares_F = squares_F + self.squares + apart_F.square() * (self.count * len(rows_XF) / count)
            mean_F = self.mean + apart_F * (len(rows_XF) / count)
        self.count, self.mean, self.squares = count, mean_F, squares_F


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
