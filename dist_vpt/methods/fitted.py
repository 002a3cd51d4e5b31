"""Readers that are computed from the features of all training images at once: no optimizer, no epochs.

n images that could be read, F features, K classes.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods.base import Reader


class Observed(NamedTuple):
    """The features of the images that are trained on, in the order of their split, on the readers' device."""

    features_nF: Tensor
    labels_n: Tensor  # int64
    weights_n: Tensor  # float32, of an image's class in the loss (train.class_weights)
    smoothing: float = 0.0  # train.label_smoothing


class FittedReader(Reader):
    """A reader with ``fit`` in place of a training loop; training/fitting.py calls it."""

    inits_from_images: ClassVar[bool] = False  # type: ignore[misc]  # what is measured, fit measures on all images

    @classmethod
    def check_fit(cls, readers: Sequence["FittedReader"], labels_n: Tensor) -> None:
        """Raises UserError where these labels [n] are not enough to fit one of the readers."""
        found = labels_n.unique()
        if len(found) < 2:
            have = "no image" if not len(found) else f"images of one class alone (number {int(found[0])})"
            raise UserError(
                f"method.name = {cls.__name__.lower()}: there are {have} to train on, and classes are told apart from "
                "two on; check data.root"
            )

    @classmethod
    def fit(
        cls, readers: Sequence["FittedReader"], observed: Observed, raise_on_stop: Callable[[], None] = lambda: None
    ) -> tuple[list[dict[str, float]], list[str]]:
        """Set the tensors of all readers, which differ in their own settings alone.

        Returns the scores of each on the images that were trained on (loss, and top1 in percent), and lines for the
        log. ``raise_on_stop``: called again and again while it lasts. Raises UserError where there are too few images.
        """
        raise NotImplementedError

    def stream_features(self, stream: StreamOutput) -> Tensor:
        """What is fitted to, [B, F] float32: the backbone's pooled output."""
        return stream.pooled.float()

    @classmethod
    def _measure(cls, readers: Sequence["FittedReader"], features_nF: Tensor) -> None:
        """Let all readers standardize features by their mean and deviation, where they do."""
        norms = [reader.feature_norm for reader in readers if reader.feature_norm is not None]
        for norm in norms:
            norm.start()
            norm(features_nF)
            norm.finish()


@torch.no_grad()
def scores(logits_nK: Tensor, observed: Observed) -> dict[str, float]:
    """Loss and top-1 in percent of the images, by logits [n, K]."""
    loss = torch.nn.functional.cross_entropy(logits_nK.float(), observed.labels_n)
    correct = (logits_nK.argmax(1) == observed.labels_n).double().mean()
    return {"loss": float(loss), "top1": 100 * float(correct)}
