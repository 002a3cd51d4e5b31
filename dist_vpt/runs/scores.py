"""Which score of a split decides: by which epochs and trials are chosen, and which is shown first."""

from collections.abc import Mapping
from typing import Any

from dist_vpt.data.tasks import METRICS


def metric_of(scores: Mapping[str, Any]) -> str:
    """The name of the score that decides among the scores of a split, as of ``Task.metric``."""
    return next(name for name in METRICS.values() if name in scores)


def main_score(scores: Mapping[str, Any]) -> float:
    """The score that decides, in percent."""
    return scores[metric_of(scores)]
