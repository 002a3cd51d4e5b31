"""Which score of a split decides: by which epochs and trials are chosen, and which is shown first."""

from collections.abc import Mapping
from typing import Any

from dist_vpt.data.tasks import METRICS


def has_main_score(scores: Mapping[str, Any]) -> bool:
    """Whether the score that decides is among the scores of a split."""
    return any(name in scores for name in METRICS.values())


def metric_of(scores: Mapping[str, Any]) -> str:
    """The name of the score that decides among the scores of a split, as of ``Task.metric``."""
    return next(name for name in METRICS.values() if name in scores)


def main_score(scores: Mapping[str, Any]) -> Any:
    """The score that decides, in percent; or whatever ``scores`` has of it, such as its mean and values."""
    return scores[metric_of(scores)]
