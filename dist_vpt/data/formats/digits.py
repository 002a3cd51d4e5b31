"""The 1,797 handwritten digits of scikit-learn, as dark ink on white paper: for the quick start and tests."""

import numpy as np

from dist_vpt.data.config import DataConfig
from dist_vpt.data.splits import ArraySource, Split, Splits, join, stratified_holdout
from dist_vpt.data.tasks import Task

VAL, TEST = 200, 597  # images, as in VTAB-1k: 800 + 200 would leave few to test on, so train has 1,000


def open_splits(recipe: DataConfig, task: Task) -> Splits:
    from sklearn.datasets import load_digits

    digits = load_digits()
    paper = np.rint(255 - digits.images * (255 / 16)).astype(np.uint8)  # ink 0..16 -> dark on white, 255..0
    pixels = np.repeat(paper[..., None], 3, axis=-1)
    every = Split("every", digits.target.astype(np.int64), ArraySource(pixels, "digits"))
    trainval_rows, test_rows = stratified_holdout(every.labels, TEST, recipe.split_seed)
    trainval = every.subset("trainval", trainval_rows)
    train_rows, val_rows = stratified_holdout(trainval.labels, VAL, recipe.split_seed)
    train, val = trainval.subset("train", train_rows), trainval.subset("val", val_rows)
    classes = tuple(str(k) for k in range(10))
    return Splits(classes, train, val, join("trainval", train, val), every.subset("test", test_rows))
