"""Scores of a split whose images have several labels, and the thresholds above which a class is predicted.

n images of all processes, B batch, K classes.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.functional.classification import multilabel_f1_score
from torchmetrics.utilities.data import dim_zero_cat

from dist_vpt.data.loaders import EvalBatches
from dist_vpt.errors import DataError
from dist_vpt.runs.class_table import ClassScores, ClassTable
from dist_vpt.training.metrics import Scores, no_readable_image

DEFAULT_THRESHOLD = 0.5  # of a class that has no positive among the images on which thresholds are chosen


class _Scored(MultilabelAveragePrecision):
    """The average precision of each class, the thresholds, and F1 at them; torchmetrics keeps all probabilities."""

    thresholds_K: Tensor | None = None  # the ones to use; None: the best on these images

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Average precision [K], thresholds [K], F1 micro and macro [2]; positives, predicted and both [K, 3]."""
        probabilities_nK, labels_nK = dim_zero_cat(self.preds).cpu().double(), dim_zero_cat(self.target).cpu()
        classes = labels_nK.shape[1]
        if not len(labels_nK):
            return torch.zeros(classes), torch.zeros(classes), torch.zeros(2), torch.zeros(classes, 3).long()
        found_K = best_thresholds(probabilities_nK, labels_nK) if self.thresholds_K is None else self.thresholds_K
        predicted_nK = (probabilities_nK >= found_K).int()
        f1 = [multilabel_f1_score(predicted_nK, labels_nK, classes, average=kind) for kind in ("micro", "macro")]
        counts_K3 = torch.stack([each.sum(0) for each in (labels_nK, predicted_nK, labels_nK * predicted_nK)], 1)
        return super().compute().cpu(), found_K, torch.stack(f1), counts_K3


def best_thresholds(probabilities_nK: Tensor, labels_nK: Tensor) -> Tensor:
    """For each class the threshold with the highest F1, [K], of probabilities in float64; of equal ones the highest.

    It lies in the middle between the lowest probability that is predicted and the next lower one, so that neither
    depends on the last digit. DEFAULT_THRESHOLD for a class without a positive.
    """
    sorted_nK, order_nK = probabilities_nK.sort(dim=0, descending=True, stable=True)
    right_nK = labels_nK.gather(0, order_nK).cumsum(0).double()  # positives among the most probable
    predicted_n1 = torch.arange(1, len(sorted_nK) + 1, dtype=torch.float64)[:, None]
    f1_nK = 2 * right_nK / (predicted_n1 + right_nK[-1])
    next_nK = torch.cat([sorted_nK[1:], torch.zeros_like(sorted_nK[:1])])
    f1_nK = torch.where(sorted_nK > next_nK, f1_nK, -1.0)  # equal probabilities are predicted together
    best_1K = f1_nK.argmax(0, keepdim=True)
    middle_K = ((sorted_nK + next_nK) / 2).gather(0, best_1K)[0]
    return torch.where(right_nK[-1] > 0, middle_K, DEFAULT_THRESHOLD)


class MultiLabelScores:
    """Loss, mean average precision, and F1 over all decisions (micro) and over classes (macro), in percent but for the
    loss.

    The mean average precision is over the classes with a positive. Macro F1 is over all classes, and 0 for one that has
    no positive, as in scikit-learn.
    """

    def __init__(
        self, classes: int, device: torch.device, split: str, *, keep: str = "", given: Sequence[float] | None = None
    ):
        """``split``: its name, for messages. ``keep``: whether ``predictions`` will be asked for.

        ``given``: a threshold for each class; None: those with the highest F1 on these images.
        """
        self.split, self.classes, self.keep, self.given = split, classes, keep, given
        # Nothing is cached, since other thresholds may follow.
        self.scored = _Scored(classes, average="none", thresholds=None, compute_with_cache=False).to(device)
        # torchmetrics cannot gather from a process without examples.
        self.scored.preds.append(torch.empty(0, classes, device=device))
        self.scored.target.append(torch.empty(0, classes, dtype=torch.long, device=device))
        self.loss = MeanMetric(nan_strategy="disable").to(device)  # one that is not finite shows
        self.thresholds: Sequence[float] = ()  # those that ``compute`` used, one a class
        self.of_classes: Sequence[ClassScores] = ()  # after ``compute``

    def update(self, logits_BK: Tensor, labels_BK: Tensor, counts_B: Tensor, index_B: Tensor) -> None:
        """Add a batch; examples with count 0 (padding, skipped images) are left out."""
        real_B = counts_B > 0
        logits_BK, labels_BK = logits_BK[real_B].float(), labels_BK[real_B]
        if not len(labels_BK):
            return
        self.scored.update(logits_BK.sigmoid(), labels_BK.long())
        self.loss.update(F.binary_cross_entropy_with_logits(logits_BK, labels_BK, reduction="none").mean(1))

    def compute(self) -> dict[str, Any]:
        """The scores over all processes; a collective call. Raises DataError where no image has a label."""
        self.scored.thresholds_K = None if self.given is None else torch.tensor(self.given, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes without a positive, and a process without images
            precision_K, thresholds_K, f1, counts_K3 = self.scored.compute()
            loss = float(self.loss.compute())
        there_K = counts_K3[:, 0] > 0
        if not there_K.any() and math.isnan(loss):
            raise no_readable_image(self.split)
        if not there_K.any():
            raise DataError(f"no image of the {self.split} split has a label, so there is no mAP; add labels to it")
        self.thresholds = thresholds_K.tolist()
        percent_K = 100 * precision_K.double()
        self.of_classes = [
            ClassScores(images, value if images else None, threshold, predicted, correct)
            for (images, predicted, correct), value, threshold in zip(
                counts_K3.tolist(), percent_K.tolist(), self.thresholds, strict=True
            )
        ]
        micro, macro = (100 * f1).tolist()
        return {"loss": loss, "mAP": float(percent_K[there_K].mean()), "f1_micro": micro, "f1_macro": macro}

    def predictions(self) -> ClassTable:
        """How well each class is found, for the tables of a run; after ``compute``."""
        return ClassTable(tuple(self.of_classes))


AnyScores = Scores | MultiLabelScores


def scores_of(batches: EvalBatches, classes: int, device: torch.device, **options: Any) -> AnyScores:
    """The scores of a split, with the options of ``Scores``, or of ``MultiLabelScores`` for several labels an image."""
    kind = MultiLabelScores if batches.multiple else Scores
    return kind(classes, device, batches.split, **options)
