"""What a training comes to in the end: a temperature fitted on val, and the scores of test and of extra tests.

K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from dist_vpt.data.formats.extra_tests import classes_in, mean_scores
from dist_vpt.data.loaders import EvalBatches
from dist_vpt.data.splits import Splits
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.runs.class_table import ClassTable
from dist_vpt.runs.score_files import Predictions
from dist_vpt.training.calibration import NO_VAL, temperature_on_val
from dist_vpt.training.engine import evaluate
from dist_vpt.training.metrics import Scores
from dist_vpt.training.multi_label import DEFAULT_THRESHOLD, AnyScores
from dist_vpt.training.trial_state import Trial
from dist_vpt.training.trials import TrialGroup, score_batches, score_trials


@dataclass
class FinalScores:
    """Of what is trained, after the last epoch or the best one."""

    scores: dict[str, Any] = field(default_factory=dict)  # temperature, test, extra_tests: for result.json
    predictions: dict[str, Predictions | ClassTable] = field(default_factory=dict)  # by split
    test: AnyScores | None = None

    def add(self, split: str, found: AnyScores, temperature: float | None) -> None:
        """Add the scores of a split that has been read; a collective call."""
        scores = found.compute()
        if temperature is None and isinstance(found, Scores):
            scores["ece_scaled"] = None
        if split == "test":
            self.scores["test"], self.test = scores, found
        else:
            self.scores.setdefault("extra_tests", {})[split] = scores
        if found.keep == "predictions":
            self.predictions[split] = found.predictions()

    def end(self) -> "FinalScores":
        """Add the means over the sets of an extra test that has several."""
        if "extra_tests" in self.scores:
            self.scores["extra_tests"] = mean_scores(self.scores["extra_tests"])
        return self


def options_of(
    split: str, splits: Splits, temperature: float | None = None, thresholds: Sequence[float] | None = None
) -> dict[str, Any]:
    """How a split is scored, as of ``scores_of``. Of an extra test only the classes that it has are predicted.

    ``thresholds``: where images have several labels; None: 0.5 for all classes.
    The sets of an extra test that has several are not kept image by image: ImageNet-C has 95 of 50,000 images.
    """
    if splits.train.multiple:
        return {"given": thresholds or [DEFAULT_THRESHOLD] * len(splits.classes), "keep": "predictions"}
    options: dict[str, Any] = {"temperature": temperature, "keep": "" if "/" in split else "predictions"}
    if split in splits.extra:
        options["among"] = torch.from_numpy(classes_in(splits.extra[split], len(splits.classes)))
    return options


def score_at_end(  # noqa: PLR0917 (a model, and what it is scored on)
    accelerator: RankAccelerator,
    model: nn.Module,
    splits: Splits,
    val: EvalBatches | None,
    tests: Mapping[str, EvalBatches],
    stop: StopSignal,
    thresholds: Sequence[float] | None = None,
) -> FinalScores:
    """Fit a temperature on ``val``, where there is one, and score ``tests``, by split. A collective call.

    Where images have several labels there is no temperature, and classes are predicted from ``thresholds`` on.
    """
    classes, final, several = len(splits.classes), FinalScores(), splits.train.multiple
    temperature: dict[str, Any] = {"value": None, "reason": NO_VAL}
    if val is not None and not several:
        kept = evaluate(accelerator, model, val, classes, stop, keep="logits")
        assert isinstance(kept, Scores)
        temperature = temperature_on_val(kept)
    if not several:
        final.scores["temperature"] = temperature
    for split, batches in tests.items():
        options = options_of(split, splits, temperature["value"], thresholds)
        options |= {"confusion": True} if split == "test" and not several else {}
        final.add(split, evaluate(accelerator, model, batches, classes, stop, **options), temperature["value"])
    return final.end()


def score_trials_at_end(group: TrialGroup, trials: Sequence[Trial]) -> list[FinalScores]:
    """The same for trials, which share each pass over a split; added to their last epoch. A collective call."""
    if not trials:
        return []
    splits, several = group.parts.splits, group.parts.splits.train.multiple
    temperatures: list[dict[str, Any]] = [{"value": None, "reason": NO_VAL} for _ in trials]
    finals = [FinalScores() for _ in trials]
    if group.val is not None and not several:
        group.accelerator.status.set("the end", "fitting temperatures on val")
        kept = score_batches(group, trials, group.val, [{"keep": "logits"}] * len(trials))
        temperatures = [temperature_on_val(cast(Scores, scores)) for scores in kept]
    for split in ("test", *splits.extra):
        options = [
            options_of(split, splits, temperature["value"], trial.progress.last.get("thresholds"))
            for trial, temperature in zip(trials, temperatures, strict=True)
        ]
        found = score_trials(group, trials, split, options)
        for final, scores, temperature in zip(finals, found, temperatures, strict=True):
            final.add(split, scores, temperature["value"])
    for trial, final, temperature in zip(trials, finals, temperatures, strict=True):
        trial.progress.last |= ({} if several else {"temperature": temperature}) | final.end().scores
    return finals
