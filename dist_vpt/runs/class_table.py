"""per_class.csv of a run whose images have several labels: how well each class is found in test.

K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

COLUMNS = ("class", "images", "average_precision", "threshold", "predicted", "correct", "recall", "precision", "f1")


@dataclass(frozen=True)
class ClassScores:
    """Of one class."""

    images: int  # that have its label
    average_precision: float | None  # percent; None: it has no image
    threshold: float
    predicted: int  # images that are said to have the label
    correct: int  # of these, those that have it

    @property
    def row(self) -> list[str]:
        """Its cells in the table; what is not defined is empty, such as recall without images."""
        known = "" if self.average_precision is None else f"{self.average_precision:.4f}"
        shares = (
            (self.correct, self.images),
            (self.correct, self.predicted),
            (2 * self.correct, self.images + self.predicted),
        )
        parts = [f"{100 * part / whole:.4f}" if whole else "" for part, whole in shares]
        return [str(self.images), known, f"{self.threshold:.6g}", str(self.predicted), str(self.correct), *parts]


@dataclass(frozen=True)
class ClassTable:
    """Of all classes of a split."""

    of_classes: tuple[ClassScores, ...]

    def rows(self, classes: Sequence[str]) -> list[Sequence[str]]:
        """The lines of the table: names of columns, then one a class."""
        return [COLUMNS, *([name, *each.row] for name, each in zip(classes, self.of_classes, strict=True))]
