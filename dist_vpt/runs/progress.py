"""The position, scores and counters of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_vpt.recipe.schema import EarlyStopConfig
from dist_vpt.runs.scores import main_score


@dataclass
class Progress:
    """Everything but tensors that a resumed run needs to continue as if it had never stopped.

    Random state needs no keeping: data order, augmentation and dropout are functions of (seed, step, process).
    """

    epoch: int = 0  # the current one
    step: int = 0  # optimizer steps done in it
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # of this epoch: loss, correct, images
    best: dict[str, Any] = field(default_factory=dict)  # epoch and scores of the best validation
    last: dict[str, Any] = field(default_factory=dict)
    without_rise: int = 0  # evaluations since the last rise by early stopping's min_delta
    to_beat: float = -1.0  # score at that rise
    skipped: list[str] = field(default_factory=list)  # files that could not be read
    metrics_bytes: int = 0  # length of metrics.jsonl
    seconds: float = 0.0  # of training so far, over all starts
    images: int = 0  # trained on so far
    ended: bool = False  # early stopping ended it
    warnings: list[str] = field(default_factory=list)  # that it does not learn

    def count(self, loss: float, correct: float, images: float) -> None:
        """Add what one step computed: its mean loss, its correctly classified images and all its images."""
        self.images += int(images)
        self.sums = [self.sums[0] + loss * images, self.sums[1] + correct, self.sums[2] + images]

    def end_epoch(self, score: str = "top1") -> dict[str, float]:
        """End the current epoch; returns its loss and accuracy (named ``score``) on the training split."""
        loss, correct, images = self.sums
        scores = {"loss": loss / max(images, 1.0), score: 100 * correct / max(images, 1.0)}
        self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0, 0.0, 0.0]
        self.last = {"epoch": self.epoch, "train": scores}  # counted from 1
        return scores

    def scored(
        self, scores: dict[str, float], stopping: EarlyStopConfig | None, thresholds: Sequence[float] = ()
    ) -> bool:
        """Add the val scores of the epoch that just ended, decide on early stopping; returns whether it is the best.

        ``thresholds``: of each class, chosen on val, where images have several labels.
        """
        self.last["val"], score = scores, main_score(scores)
        if thresholds:
            self.last["thresholds"] = list(thresholds)
        best = not self.best or score > main_score(self.best["val"])
        if best:
            self.best = self.last
        if stopping is not None:
            # Rounded below what any split resolves: scores are computed in more than one dtype.
            rose = round(score - self.to_beat - stopping.min_delta, 4) > 0
            self.to_beat = score if rose else self.to_beat
            self.without_rise = 0 if rose else self.without_rise + 1
            self.ended = self.without_rise >= stopping.patience
        return best


def epoch_facts(scored: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter file says of its epoch (``last`` or ``best``): its number and its thresholds, if it has any."""
    return {key: scored[key] for key in ("epoch", "thresholds") if key in scored}
