"""Scores of a split, reduced over processes by torchmetrics: every example counts once.

B batch, K classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassStatScores,
)

from dist_vpt.errors import DataError

TOP5_FROM = 6  # classes: with fewer, top-5 is always right
MISTAKES_KEPT = 16  # for the panel of wrongly classified images
# What waits to be scored: numbers of logits (4 MiB in float32), and batches, each of which may hold files of a worker.
WAITING_NUMBERS, WAITING_BATCHES = 2**20, 16


@dataclass(frozen=True)
class Mistake:
    """An image that was classified wrongly."""

    index: int  # in its split
    label: int
    predicted: int
    probability: float  # of the predicted class


def no_readable_image(split: str) -> DataError:
    """The error of a split of which nothing can be read."""
    return DataError(f"there is no readable image in the {split} split; repair its files, or set data.root")


class Scores:
    """Loss, top-1, top-5, per-class mean accuracy and (two classes) ROC-AUC, in percent but for the loss."""

    thresholds: Sequence[float] = ()  # the most probable class is predicted (multi_label.py has some)

    def __init__(self, classes: int, device: torch.device, split: str, *, confusion: bool = False):
        """``split``: its name, for messages."""
        metrics: dict[str, Any] = {
            "top1": MulticlassAccuracy(classes, average="micro"),
            "per_class": MulticlassStatScores(classes, average="none"),
        }
        if classes >= TOP5_FROM:
            metrics["top5"] = MulticlassAccuracy(classes, average="micro", top_k=5)
        if classes == 2:
            metrics["auroc"] = MulticlassAUROC(classes, average="macro", thresholds=None)
        if confusion:
            metrics["confusion"] = MulticlassConfusionMatrix(classes)
        self.split = split
        self.scores = MetricCollection(metrics, compute_groups=False).to(device)
        if classes == 2:  # torchmetrics cannot gather from a process without examples
            self.scores["auroc"].preds.append(torch.empty(0, 2, device=device))
            self.scores["auroc"].target.append(torch.empty(0, dtype=torch.long, device=device))
        self.loss = MeanMetric().to(device)
        self._mistakes: list[Mistake] = []
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def update(self, logits_BK: Tensor, labels_B: Tensor, counts_B: Tensor, index_B: Tensor) -> None:
        """Add a batch; examples with count 0 (padding, skipped images) are left out.

        Batches wait on the device until they are many: scoring each would wait for the device over and over.
        """
        self._waiting.append((logits_BK, labels_B, counts_B, index_B))
        numbers = sum(logits_BK.numel() for logits_BK, *_ in self._waiting)
        if numbers > WAITING_NUMBERS or len(self._waiting) == WAITING_BATCHES:
            self._score_waiting()

    @property
    def mistakes(self) -> list[Mistake]:
        """The first images that were classified wrongly."""
        self._score_waiting()
        return self._mistakes

    def _score_waiting(self) -> None:
        if not self._waiting:
            return
        logits_BK, labels_B, counts_B, index_B = (torch.cat(column) for column in zip(*self._waiting, strict=True))
        self._waiting.clear()
        real = counts_B > 0
        logits_BK, labels_B, index_B = logits_BK[real], labels_B[real], index_B[real]
        if not len(labels_B):
            return
        probabilities_BK = logits_BK.float().softmax(1)
        self.scores.update(probabilities_BK, labels_B)
        self.loss.update(F.cross_entropy(logits_BK.float(), labels_B, reduction="none"))
        missing = MISTAKES_KEPT - len(self._mistakes)
        if missing:
            best, predicted = probabilities_BK.max(1)
            for i in (predicted != labels_B).nonzero().flatten()[:missing].tolist():
                self._mistakes.append(Mistake(int(index_B[i]), int(labels_B[i]), int(predicted[i]), float(best[i])))

    def compute(self) -> dict[str, Any]:
        """The scores over all processes, None for one that is not defined; a collective call."""
        self._score_waiting()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where this process has seen no image
            right_K, _, _, _, images_K = self.scores["per_class"].compute().unbind(1)
        if not images_K.any():
            raise no_readable_image(self.split)
        undefined = {"auroc"} if (images_K > 0).sum() < 2 else set()  # torchmetrics would warn and give 0
        names = [str(name) for name in self.scores if name not in {"confusion", "per_class", *undefined}]
        values = {name: self.scores[name].compute() for name in names}
        # Over the classes that the split has: torchmetrics' macro average counts one that is only predicted as 0.
        values["per_class"] = (right_K / images_K)[images_K > 0].mean()
        scores = {k: 100 * float(v) for k, v in values.items()} | dict.fromkeys(undefined & {*self.scores})
        return {"loss": float(self.loss.compute())} | dict(sorted(scores.items()))

    def confusion(self) -> Tensor:
        """Rows are labels, columns predictions, [K, K]; a collective call."""
        self._score_waiting()
        return self.scores["confusion"].compute()
