"""Signs that a training does not learn, said while it can still be stopped."""

import math

from dist_vpt.recipe.schema import OptimConfig, TrainConfig
from dist_vpt.training.step import DIVERGED_FIX

LOSS_OF_GUESSING = 3.0  # times ln(classes): a higher loss after warm-up is worse than any start
SIGMAS = 3.0  # an accuracy so close to that of the largest class may be luck,
PART = 0.1  # where it is not a tenth of the way from there to all correct


def warning_of(  # noqa: PLR0917 (an epoch, and what guessing would score)
    optim: OptimConfig,
    train: TrainConfig,
    epoch: int,
    scores: dict[str, float],
    classes: int,
    images: int,
    majority: float,
) -> str:
    """A warning about the epoch that just ended (counted from 1), or "".

    ``scores``: loss and top-1 (%) on the ``images`` that are trained on; ``majority``: share of the largest class in
    them.
    """
    guessing, warmed_up = math.log(classes), epoch > max(1, math.ceil(optim.warmup_epochs))
    if warmed_up and scores["loss"] > LOSS_OF_GUESSING * guessing:
        return (
            f"the training loss of epoch {epoch} is {scores['loss']:.4g}, and that of guessing {guessing:.2f}: "
            f"optim.lr = {optim.lr:g} may not suit this backbone; where the loss rises, {DIVERGED_FIX}, and where it "
            "stays, raise optim.lr"
        )
    luck = SIGMAS * math.sqrt(majority * (1 - majority) / images)
    bound = 100 * (majority + min(luck, PART * (1 - majority)))
    if warmed_up and epoch == math.ceil(train.epochs / 2) and scores["top1"] <= bound:
        return (
            f"after half of the epochs {scores['top1']:.1f} % of the training images are classified correctly, and the "
            f"largest class alone has {100 * majority:.1f} %: nothing is learned; try an optim.lr ten times smaller or "
            f"larger than {optim.lr:g}"
        )
    return ""
