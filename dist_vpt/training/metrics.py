"""Scores of a split, reduced over processes by torchmetrics: every example counts once.

B batch, K classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassStatScores,
)

from dist_vpt.errors import DataError
from dist_vpt.runs.score_files import Predictions

TOP5_FROM = 6  # classes: with fewer, top-5 is always right
MISTAKES_KEPT = 16  # for the panel of wrongly classified images
BINS = 15  # of the calibration error
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


class CalibrationError(Metric):
    """Expected calibration error: the mean distance of probability and accuracy over images, in bins of probability.

    Of the predicted class, in 15 bins of equal width, each without its lower edge and with its upper one (Guo et al.
    2017, arXiv 1706.04599, section 2). torchmetrics' own keeps every image, and cannot gather from a process without
    any; sums of a bin are small, and equal however images are divided.
    """

    full_state_update = False
    sums: Tensor  # of each bin: images, probability, right answers, [3, BINS]

    def __init__(self, device: torch.device):
        super().__init__()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.add_state("sums", torch.zeros(3, BINS, dtype=dtype), dist_reduce_fx="sum")
        self.to(device)

    def update(self, probabilities_BK: Tensor, labels_B: Tensor) -> None:
        sure_B, predicted_B = probabilities_BK.max(1)
        sure_B = sure_B.to(self.sums.dtype)
        edges = torch.arange(1, BINS, dtype=self.sums.dtype, device=sure_B.device) / BINS
        facts_3B = torch.stack([torch.ones_like(sure_B), sure_B, (predicted_B == labels_B).to(sure_B.dtype)])
        bins_B15 = torch.bucketize(sure_B, edges)[:, None] == torch.arange(BINS, device=sure_B.device)
        self.sums += facts_3B @ bins_B15.to(sure_B.dtype)

    def compute(self) -> Tensor:
        """In 0 to 1, []."""
        images, sure, right = self.sums
        return (sure - right).abs().sum() / images.sum()


class Scores:
    """Loss, top-1, top-5, per-class mean accuracy, macro F1, expected calibration error and (two classes) ROC-AUC.

    In percent but for the loss.
    """

    thresholds: Sequence[float] = ()  # the most probable class is predicted (multi_label.py has some)

    def __init__(
        self,
        classes: int,
        device: torch.device,
        split: str,
        *,
        confusion: bool = False,
        keep: Literal["", "predictions", "logits"] = "",
        temperature: float | None = None,
        among: Tensor | None = None,
    ):
        """``split``: its name, for messages.

        ``keep``: what ``predictions`` or ``logits`` will be asked for. ``temperature``: logits are divided by it for
        the score ``ece_scaled``. ``among``: the only classes that are predicted, bool [K]; None: all.
        """
        metrics: dict[str, Any] = {
            "top1": MulticlassAccuracy(classes, average="micro"),
            "per_class": MulticlassStatScores(classes, average="none"),
            "ece": CalibrationError(device),
        }
        if (classes if among is None else int(among.sum())) >= TOP5_FROM:
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
        self.loss = MeanMetric(nan_strategy="disable").to(device)  # one that is not finite shows
        self.scaled = None if temperature is None else CalibrationError(device)
        self._temperature, self.keep = temperature, keep
        self._others = None if among is None else ~among.to(device)
        self._kept: list[tuple[Tensor, ...]] = []  # index, label, and what is kept of each image
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
        logits_BK = logits_BK.float()
        if self._others is not None:
            logits_BK = logits_BK.masked_fill(self._others, -torch.inf)
        probabilities_BK = logits_BK.softmax(1)
        self.scores.update(probabilities_BK, labels_B)
        self.loss.update(F.cross_entropy(logits_BK, labels_B, reduction="none"))
        if self.scaled is not None and self._temperature is not None:
            self.scaled.update((logits_BK / self._temperature).softmax(1), labels_B)
        if self.keep == "logits":
            self._kept.append((index_B, labels_B, logits_BK))
        elif self.keep == "predictions":
            of_label_B = probabilities_BK.gather(1, labels_B[:, None])[:, 0]
            self._kept.append((index_B, labels_B, probabilities_BK.argmax(1), of_label_B))
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
            return self._computed()

    def _computed(self) -> dict[str, Any]:
        right_K, wrongly_K, _, missed_K, images_K = self.scores["per_class"].compute().unbind(1)
        if not images_K.any():
            raise no_readable_image(self.split)
        undefined = {"auroc"} if (images_K > 0).sum() < 2 else set()  # torchmetrics would warn and give 0
        names = [str(name) for name in self.scores if name not in {"confusion", "per_class", *undefined}]
        values = {name: self.scores[name].compute() for name in names}
        # Over the classes that the split has: torchmetrics' macro average counts one that is only predicted as 0.
        values["per_class"] = (right_K / images_K)[images_K > 0].mean()
        # Over the classes that the split has or that are predicted, as scikit-learn does.
        met_K = 2 * right_K + wrongly_K + missed_K
        values["f1_macro"] = (2 * right_K / met_K)[met_K > 0].mean()
        if self.scaled is not None and self._temperature is not None:
            values["ece_scaled"] = self.scaled.compute()
        scores = {k: 100 * float(v) for k, v in values.items()} | dict.fromkeys(undefined & {*self.scores})
        return {"loss": float(self.loss.compute())} | dict(sorted(scores.items()))

    def predictions(self) -> Predictions:
        """What each image of the split was taken for, in the split's order; a collective call."""
        assert self.keep == "predictions"
        return Predictions(*self._gathered())

    def logits(self) -> tuple[Tensor, Tensor]:
        """float32 [n, K] and labels [n] of the split's images, in its order, on the CPU; a collective call."""
        assert self.keep == "logits"
        _, labels_n, logits_nK = self._gathered()
        return torch.from_numpy(logits_nK), torch.from_numpy(labels_n)

    def _gathered(self) -> list[Any]:
        """The columns of what was kept, as arrays in the split's order. The device is read once."""
        self._score_waiting()
        columns = zip(*self._kept, strict=True)
        found = gather_object([[torch.cat(column).cpu().numpy() for column in columns]])
        columns = zip(*(arrays for arrays in found if arrays), strict=True)  # a process may have seen no image
        index_n, *rest = (np.concatenate(column) for column in columns)
        order_n = np.argsort(index_n)
        return [index_n[order_n], *(array[order_n] for array in rest)]

    def confusion(self) -> Tensor:
        """Rows are labels, columns predictions, [K, K]; a collective call."""
        self._score_waiting()
        return self.scores["confusion"].compute()
