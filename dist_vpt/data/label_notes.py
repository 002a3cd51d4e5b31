"""What is good to know of a task whose images have several labels, for the log and ``dist-vpt data check``."""

import numpy as np

from dist_vpt.data.labels import class_counts
from dist_vpt.data.splits import Splits

NAMED = 5  # classes in a line


def label_notes(splits: Splits, *, val: bool) -> list[str]:
    """Lines about the labels; none where images have one label. ``val``: whether thresholds are chosen on val."""
    if not splits.train.multiple:
        return []
    per_image = splits.train.labels.sum(1)
    none = int((per_image == 0).sum())
    lines = [f"labels: {per_image.mean():.2f} an image of train" + (f", {none:,} have none" if none else "")]
    parts = [split for split in (splits.train, splits.val, splits.test) if split is not None]
    if all((split.labels.sum(1) == 1).all() for split in parts):
        lines.append("note: each image has exactly one label; data.labels=single trains for that, and reports top-1")
    if not val or splits.val is None:
        lines.append("note: there is no val to choose thresholds on: a class is predicted from a probability of 0.5 on")
        return lines
    absent = np.flatnonzero(class_counts(splits.val.labels, len(splits.classes)) == 0)
    if len(absent):
        names = ", ".join(splits.classes[k] for k in absent[:NAMED]) + (", ..." if len(absent) > NAMED else "")
        lines.append(f"note: no image of val has {names}: the threshold is 0.5 there")
    return lines
