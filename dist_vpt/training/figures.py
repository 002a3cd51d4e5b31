"""Figures of a test split: the confusion matrix and wrongly classified images, or the precision of several labels."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_vpt.data.splits import Split
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.runs.class_table import ClassScores
from dist_vpt.training.metrics import Mistake


def confusion_figure(confusion_KK: np.ndarray, classes: tuple[str, ...]) -> Any:
    """Rows are labels, columns predictions; counts are written where they can be read."""
    from matplotlib.figure import Figure

    classes, number = _plain(classes), len(classes)
    side = min(4 + 0.28 * number, 24)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion_KK / np.maximum(confusion_KK.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the label's images")
    axes.set(xlabel="predicted", ylabel="label", title="Confusion matrix, test split")
    if number <= 60:
        axes.set_xticks(range(number), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(number), classes, fontsize=7)
    if number <= 30:
        for (row, column), count in np.ndenumerate(confusion_KK):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=6, color=color)
    return figure


def precision_figure(scores: Sequence[ClassScores], classes: tuple[str, ...]) -> Any:
    """The average precision of each class, the lowest at the bottom."""
    from matplotlib.figure import Figure

    known = [(each.average_precision, k) for k, each in enumerate(scores) if each.average_precision is not None]
    order = [k for _, k in sorted(known)]
    names, plain = _plain(classes), range(len(order))
    figure = Figure(figsize=(6, min(2 + 0.25 * len(order), 24)), layout="constrained")
    axes = figure.subplots()
    axes.barh(plain, [scores[k].average_precision or 0.0 for k in order])
    axes.set_yticks(plain, [f"{names[k]} ({scores[k].images})" for k in order], fontsize=7)
    axes.set(xlim=(0, 100), xlabel="average precision, %", title="Classes (with their images), test split")
    return figure


def mistakes_figure(mistakes: list[Mistake], split: Split, view: ImageTransform, classes: tuple[str, ...]) -> Any:
    """Wrongly classified images with label, prediction and its probability."""
    from matplotlib.figure import Figure

    classes, columns = _plain(classes), min(4, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, mistake in zip(figure.axes, mistakes, strict=False):
        axes.imshow(view.eval(split.read(mistake.index, max_megapixels=math.inf)).permute(1, 2, 0).byte().numpy())
        axes.set_title(
            f"{classes[mistake.label]}\nread as {classes[mistake.predicted]} ({mistake.probability:.0%})",
            fontsize=8,
        )
    return figure


def _plain(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Class names that matplotlib does not read as formulas."""
    return tuple(name.replace("$", r"\$") for name in classes)
