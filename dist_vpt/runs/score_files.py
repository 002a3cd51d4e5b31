"""Tables of a scored split in a run folder: its confusion matrix, its classes, and what each image was taken for.

n images that could be read, K classes.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_vpt.data.splits import Split, Splits, path_of
from dist_vpt.errors import UserError
from dist_vpt.files import printable, write_atomically
from dist_vpt.runs.class_table import ClassTable

COLUMNS = ("image", "label", "predicted", "probability")


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the images of a split were taken for, in the split's order."""

    index_n: np.ndarray  # int64, in the split
    label_n: np.ndarray  # int64
    predicted_n: np.ndarray  # int64
    probability_n: np.ndarray  # float32, of the label

    def confusion(self, classes: int) -> np.ndarray:
        """Numbers of images, rows are labels and columns predictions, int64 [K, K]."""
        pairs_n = self.label_n * classes + self.predicted_n
        return np.bincount(pairs_n, minlength=classes**2).reshape(classes, classes)


def table_file(folder: Path, table: str, split: str = "test", adapters: str = "last") -> Path:
    """``table``: confusion, per_class or predictions. Those of test by the last adapters have the plain name."""
    parts = [table, *([split.replace("/", "-")] if split != "test" else []), *(["best"] if adapters == "best" else [])]
    return folder / f"{'-'.join(parts)}.csv"


def write_tables(  # noqa: PLR0917 (where, what, and its names)
    folder: Path,
    predictions: Predictions | ClassTable,
    split: Split,
    classes: Sequence[str],
    name: str,
    adapters: str = "last",
) -> list[Path]:
    """Write the three tables of a split, or that of classes where images have several labels; returns their files.

    Raises OSError where one cannot be written.
    """
    shown, rows = [printable(each) for each in classes], dict[str, Iterable[Sequence[Any]]]()
    if isinstance(predictions, ClassTable):
        rows["per_class"] = predictions.rows(shown)
    else:
        confusion_KK = predictions.confusion(len(classes))
        rows["confusion"] = _confusion_rows(confusion_KK, shown)
        rows["per_class"] = _class_rows(confusion_KK, shown)
        rows["predictions"] = _prediction_rows(predictions, split, shown)
    files = []
    for table, lines in rows.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        files.append(table_file(folder, table, name, adapters))
        write_atomically(files[-1], text.getvalue())
    return files


def write_all_tables(
    folder: Path, predictions: Mapping[str, Predictions | ClassTable], splits: Splits, adapters: str = "last"
) -> str:
    """Write the tables of several splits, by name; returns a warning where the disk is full, which fails no run."""
    try:
        for name, found in predictions.items():
            write_tables(folder, found, splits[name], splits.classes, name, adapters)
    except OSError as error:
        return (
            f"warning: {folder}: tables of the scores could not be written ({error}); free space there, then "
            f"`dist-vpt eval {folder} --out {folder}` writes them"
        )
    return ""


def read_predictions(file: Path) -> list[dict[str, str]]:
    """The rows of a predictions.csv. Raises UserError where it is damaged."""
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            reader = csv.DictReader(opened)
            rows = list(reader)
        if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row.values() for row in rows) or not rows:
            raise ValueError(f"its columns must be {', '.join(COLUMNS)}, in each of its rows")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); fix its permissions") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file}: damaged ({error}); remove it, and `dist-vpt eval` writes it anew") from error
    return rows


def _confusion_rows(confusion_KK: np.ndarray, classes: Sequence[str]) -> Iterable[Sequence[Any]]:
    yield ["label", *classes]
    yield from ([name, *row] for name, row in zip(classes, confusion_KK.tolist(), strict=True))


def _class_rows(confusion_KK: np.ndarray, classes: Sequence[str]) -> Iterable[Sequence[Any]]:
    """A line a class; what is not defined is empty: recall without images, precision without predictions."""
    right_K, images_K, predicted_K = np.diag(confusion_KK), confusion_KK.sum(1), confusion_KK.sum(0)
    yield ["class", "images", "correct", "recall", "precision", "f1"]
    for name, right, images, predicted in zip(classes, right_K, images_K, predicted_K, strict=True):
        shares = ((right, images), (right, predicted), (2 * right, images + predicted))
        yield [name, images, right, *(f"{100 * part / whole:.4f}" if whole else "" for part, whole in shares)]


def _prediction_rows(predictions: Predictions, split: Split, classes: Sequence[str]) -> Iterable[Sequence[Any]]:
    yield COLUMNS
    names = _image_names(split, predictions.index_n.tolist())
    facts = (predictions.label_n.tolist(), predictions.predicted_n.tolist(), predictions.probability_n.tolist())
    for name, label, predicted, probability in zip(names, *facts, strict=True):
        yield [name, classes[label], classes[predicted], f"{probability:.6g}"]


def _image_names(split: Split, rows: Sequence[int]) -> list[str]:
    """Files, or records of files, below the folder that all share, since a dataset may be moved."""
    texts = [printable(str(path_of(split.source, i) or split.where(i))) for i in range(len(split))]
    if not texts:
        return []
    first, last = min(texts), max(texts)  # all others share what these do
    same = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    below = first.rfind("/", 0, same) + 1
    return [texts[i][below:] for i in rows]
