"""Signs that a training does not learn, said while it can still be stopped.

n images, K classes.
"""

import math
from typing import NamedTuple

import numpy as np

from dist_vpt.data.labels import are_multiple, class_counts
from dist_vpt.recipe.schema import OptimConfig, TrainConfig
from dist_vpt.training.step import DIVERGED_FIX

LOSS_OF_GUESSING = 3.0  # times that of equal probabilities: a higher loss after warm-up is worse than any start
SIGMAS = 3.0  # an accuracy so close to that of the largest class may be luck,
PART = 0.1  # where it is not a tenth of the way from there to all correct
BELOW_SHARES = 0.99  # times the loss of the classes' shares: a higher loss has learned no more than these


class Guessing(NamedTuple):
    """What guessing would score on the images that are trained on."""

    loss: float = math.inf  # of equal probabilities
    majority: float | None = None  # share of the largest class; None: images have several labels
    loss_of_shares: float = math.inf  # of several labels an image: each class as probable as it is frequent

    @classmethod
    def of(
        cls, labels: np.ndarray, class_weights_K: np.ndarray, smoothing: float, *, balanced: bool = False
    ) -> "Guessing":
        """Of these labels, under the loss of ``step.image_losses``; ``balanced``: all classes are drawn alike."""
        counts_K = class_counts(labels, len(class_weights_K))
        if not are_multiple(labels):
            majority = 1 / np.count_nonzero(counts_K) if balanced else counts_K.max() / len(labels)
            return cls(math.log(len(counts_K)), float(majority))
        targets_K = counts_K / len(labels) * (1 - smoothing) + smoothing / 2
        yes_K, no_K = class_weights_K * targets_K, 1 - targets_K
        parts_2K = np.stack([yes_K, no_K])
        shares_2K = np.maximum(parts_2K / parts_2K.sum(0), 1e-12)
        return cls(math.log(2) * parts_2K.sum(0).mean(), None, -(parts_2K * np.log(shares_2K)).sum(0).mean())


def warning_of(  # noqa: PLR0917 (an epoch, and what guessing would score)
    optim: OptimConfig, train: TrainConfig, epoch: int, scores: dict[str, float], images: int, guessing: Guessing
) -> str:
    """A warning about the epoch that just ended (counted from 1), or "".

    ``scores``: loss and accuracy (%) on the ``images`` that are trained on.
    """
    warmed_up = epoch > max(1, math.ceil(optim.warmup_epochs))
    if warmed_up and scores["loss"] > LOSS_OF_GUESSING * guessing.loss:
        return (
            f"the training loss of epoch {epoch} is {scores['loss']:.4g}, and that of guessing {guessing.loss:.2f}: "
            f"optim.lr = {optim.lr:g} may not suit this backbone; where the loss rises, {DIVERGED_FIX}, and where it "
            "stays, raise optim.lr"
        )
    if not warmed_up or epoch != math.ceil(train.epochs / 2):
        return ""
    fix = f"nothing is learned; try an optim.lr ten times smaller or larger than {optim.lr:g}"
    if guessing.majority is None:
        if scores["loss"] <= BELOW_SHARES * guessing.loss_of_shares:
            return ""
        return (
            f"after half of the epochs the training loss is {scores['loss']:.4g}, and {guessing.loss_of_shares:.4g} "
            f"where each class is as probable as it is frequent: {fix}"
        )
    luck = SIGMAS * math.sqrt(guessing.majority * (1 - guessing.majority) / images)
    bound = 100 * (guessing.majority + min(luck, PART * (1 - guessing.majority)))
    if scores["top1"] <= bound:
        return (
            f"after half of the epochs {scores['top1']:.1f} % of the training images are classified correctly, and the "
            f"largest class alone has {100 * guessing.majority:.1f} %: {fix}"
        )
    return ""
