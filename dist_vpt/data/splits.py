"""A dataset's splits: labels in memory, images read one by one. n examples, k of a class."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dist_vpt.data.config import VAL_SHOTS, DataConfig
from dist_vpt.data.labels import are_multiple, class_counts
from dist_vpt.data.pieces import Pieces, pieces_of
from dist_vpt.data.stratify import stratified_rows
from dist_vpt.errors import DataError, nearest

Picture = Image.Image | np.ndarray  # RGB, or uint8 [height, width, 3]


class Source(Protocol):
    """The images of a split. It is pickled to worker processes, so it holds paths, not open files."""

    def read(self, i: int, max_megapixels: float) -> Picture: ...

    def where(self, i: int) -> str: ...

    def identity(self, i: int) -> str:
        """A text that changes when the image changes."""
        ...


@dataclass(frozen=True, eq=False)
class LazyLabels:
    """Labels that are read when first needed, since that means reading whole records."""

    count: int
    read: Callable[[], np.ndarray]  # int64 [count]

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True, eq=False)
class Split:
    """Labeled images under one name."""

    name: str
    given: np.ndarray | LazyLabels
    source: Source

    @property
    def multiple(self) -> bool:
        """Whether an image may have several labels."""
        return isinstance(self.given, np.ndarray) and are_multiple(self.given)

    def __len__(self) -> int:
        return len(self.given)

    def __reduce__(self) -> tuple:
        return Split, (self.name, self.labels, self.source)  # for worker processes

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [n], or uint8 [n, K] of several labels an image. Raises DataError for lazy ones that are damaged."""
        return self.given.read() if isinstance(self.given, LazyLabels) else self.given

    def read(self, i: int, max_megapixels: float = 178.0) -> Picture:
        """The i-th image, or a DataError that names it."""
        return self.source.read(i, max_megapixels)

    def where(self, i: int) -> str:
        """The file or record of the i-th image, for messages."""
        return self.source.where(i)

    def subset(self, name: str, rows: np.ndarray) -> "Split":
        return Split(name, self.labels[rows], _Subset(self.source, rows))


@dataclass(frozen=True)
class Splits:
    """The four splits of a task. ``missing`` gives the reason and the fix for a split that is None."""

    classes: tuple[str, ...]
    train: Split
    val: Split | None
    trainval: Split
    test: Split | None
    missing: Mapping[str, str] = field(default_factory=dict)
    storage: str = ""  # format and version, for result.json
    notes: tuple[str, ...] = ()  # differences from the task's published protocol
    held_out: tuple[str, ...] = ()  # splits that the storage lacks and that were split off train, by a seed
    remarks: tuple[str, ...] = ()  # about what was found and not read, for the log
    fixed: str = ""  # the file that says which fraction of train is used, where a dataset has one
    drawn: tuple[str, ...] = ()  # splits of which only some images are used (data.shots, data.fraction)
    extra: Mapping[str, Split] = field(default_factory=dict)  # extra tests (data.extra_tests)

    def __getitem__(self, name: str) -> Split:
        if name in self.extra:
            return self.extra[name]
        names = ("train", "val", "trainval", "test")
        if name not in names:
            raise DataError(f"split {name!r}: there is no such split; {nearest(name, names)}")
        split = getattr(self, name)
        if split is None:
            raise DataError(f"split {name!r} is missing: {self.missing.get(name, 'the dataset has none')}")
        return split


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in memory."""

    pixels: np.ndarray  # uint8 [n, height, width, 3]
    name: str  # of the dataset, for messages

    def read(self, i: int, max_megapixels: float) -> np.ndarray:
        return self.pixels[i]

    def where(self, i: int) -> str:
        return f"{self.name} record {i}"

    def identity(self, i: int) -> str:
        return hashlib.sha256(self.pixels[i].tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class _Subset:
    source: Source
    rows: np.ndarray

    def read(self, i: int, max_megapixels: float) -> Picture:
        return self.source.read(int(self.rows[i]), max_megapixels)

    def where(self, i: int) -> str:
        return self.source.where(int(self.rows[i]))

    def identity(self, i: int) -> str:
        return self.source.identity(int(self.rows[i]))

    def path(self, i: int) -> Path | None:
        return path_of(self.source, int(self.rows[i]))

    @property
    def pieces(self) -> Pieces | None:
        found = pieces_of(self.source)
        return None if found is None else found.subset(self.rows)


@dataclass(frozen=True, eq=False)
class _Concatenated:
    first: Split
    second: Split

    def _at(self, i: int) -> tuple[Split, int]:
        return (self.first, i) if i < len(self.first) else (self.second, i - len(self.first))

    def read(self, i: int, max_megapixels: float) -> Picture:
        split, i = self._at(i)
        return split.read(i, max_megapixels)

    def where(self, i: int) -> str:
        split, i = self._at(i)
        return split.where(i)

    def identity(self, i: int) -> str:
        split, i = self._at(i)
        return split.source.identity(i)

    def path(self, i: int) -> Path | None:
        split, i = self._at(i)
        return path_of(split.source, i)

    @property
    def pieces(self) -> Pieces | None:
        first, second = pieces_of(self.first.source), pieces_of(self.second.source)
        return None if first is None or second is None else first.join(second)


def path_of(source: Source, i: int) -> Path | None:
    """The file of the i-th image; None where a source has no file for each."""
    find: Callable[[int], Path | None] | None = getattr(source, "path", None)
    return None if find is None else find(i)


def join(name: str, first: Split, second: Split) -> Split:
    """The images of the first split, then those of the second."""

    def labels() -> np.ndarray:
        return np.concatenate([first.labels, second.labels])

    lazy = isinstance(first.given, LazyLabels) or isinstance(second.given, LazyLabels)
    return Split(name, LazyLabels(len(first) + len(second), labels) if lazy else labels(), _Concatenated(first, second))


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), a pure function of the key on every machine and numpy version."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(n), kind="stable")


def stratified_holdout(labels: np.ndarray, count: int, *key: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows kept and ``count`` rows held out, in proportion to the classes and never the last image of one; both sorted.

    Fewer than ``count`` are held out if the classes are too small.
    """
    order = shuffled(len(labels), *key)
    if are_multiple(labels):
        return stratified_rows(labels, count, order)
    rows_of_class = [order[labels[order] == k] for k in np.unique(labels)]
    sizes = np.array([len(rows) for rows in rows_of_class])
    wanted = count * sizes / len(labels)
    quota = np.minimum(np.floor(wanted).astype(np.int64), sizes - 1)
    for k in np.argsort(quota - wanted, kind="stable"):  # what rounding left goes to the largest remainders
        if quota.sum() < count and quota[k] < sizes[k] - 1:
            quota[k] += 1
    held_out = np.sort(np.concatenate([rows[:q] for rows, q in zip(rows_of_class, quota, strict=True)]))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def with_missing_splits(
    recipe: DataConfig,
    classes: tuple[str, ...],
    found: Mapping[str, Split],
    *,
    holdout_test: bool = True,
    missing: Mapping[str, str] | None = None,
) -> Splits:
    """The four splits from those of a storage: a val or test that it lacks is split off train."""
    train, val, test = found["train"], found.get("val"), found.get("test")
    every = len(train)
    held_out = (*(("test",) if test is None and holdout_test else ()), *(("val",) if val is None else ()))
    if test is None and holdout_test:
        train, test = _holdout_fraction(train, "test", recipe.test_fraction, every, recipe.split_seed)
    if val is None:
        trainval = replace(train, name="trainval")
        train, val = _holdout_fraction(train, "val", recipe.val_fraction, every, recipe.split_seed)
    else:
        trainval = join("trainval", train, val)
    return Splits(classes, train, val, trainval, test, missing or {}, held_out=held_out)


def draw(splits: Splits, recipe: DataConfig) -> Splits:
    """The splits with those images alone that data.shots or data.fraction leaves; test stays whole.

    ``split_seed`` and ``try_index`` choose them, whatever the format. Of shots, train has so many images of each class
    and val at most VAL_SHOTS of each, as in CoOp (arXiv 2109.01134); a draw of few shots is a part of that of more. A
    fraction leaves val as it is. Raises DataError where a class has too few images.
    """
    if not recipe.draws:
        return splits
    if splits.fixed:
        if recipe.tries > 1 or recipe.try_index > 0:
            raise DataError(
                f"{splits.fixed}: is one draw of data.fraction {recipe.fraction:g}, and every try would have its "
                "images; remove the file, or data.tries and data.try_index"
            )
        return splits
    key, train, val = (recipe.split_seed, recipe.try_index), splits.train, splits.val
    if recipe.shots is None:
        rows = _fraction_rows(splits, recipe.fraction, *key)
    else:
        _check_shots(splits, recipe.shots)
        rows = first_of_each_class(train.labels, recipe.shots, *key)
        if val is not None:
            val = val.subset("val", first_of_each_class(val.labels, min(recipe.shots, VAL_SHOTS), *key, 1))
    train = train.subset("train", rows)
    trainval = replace(train, name="trainval") if val is None else join("trainval", train, val)
    drawn = ("train", "val") if recipe.shots is not None and val is not None else ("train",)
    return replace(splits, train=train, val=val, trainval=trainval, drawn=drawn)


def first_of_each_class(labels: np.ndarray, count: int, *key: int) -> np.ndarray:
    """Rows of ``count`` examples of each class, or all where it has fewer; sorted. ``key``: as of ``shuffled``."""
    order = shuffled(len(labels), *key)
    by_class = order[np.argsort(labels[order], kind="stable")]
    first = np.searchsorted(labels[by_class], labels[by_class])  # where the example's class begins
    return np.sort(by_class[np.arange(len(labels)) - first < count])


def _check_shots(splits: Splits, shots: int) -> None:
    counts_K = class_counts(splits.train.labels, len(splits.classes))
    short = np.flatnonzero(counts_K < shots)
    if len(short):
        fewest = short[np.argmin(counts_K[short])]
        others = "1 other class has" if len(short) == 2 else f"{len(short) - 1} other classes have"
        more = f", and {others} too few" if len(short) > 1 else ""
        fix = f"use data.shots={counts_K[fewest]} or less" if counts_K[fewest] else "use data.fraction"
        raise DataError(
            f"data.shots {shots}: class {splits.classes[fewest]!r} has {counts_K[fewest]} images in train{more}; "
            f"{fix}, or add images"
        )


def _fraction_rows(splits: Splits, fraction: float, *key: int) -> np.ndarray:
    labels = splits.train.labels
    held_out = round((1 - fraction) * len(labels))
    classes = int(np.count_nonzero(class_counts(labels, len(splits.classes))))
    if len(labels) - held_out < classes:
        raise DataError(
            f"data.fraction {fraction:g}: {len(labels) - held_out} of {len(labels):,} images of train leave some of "
            f"{classes} classes without any; use {math.ceil(1000 * classes / len(labels)) / 1000:g} or more"
        )
    return stratified_holdout(labels, held_out, *key)[0]


def _holdout_fraction(split: Split, name: str, fraction: float, every: int, seed: int) -> tuple[Split, Split]:
    kept_rows, holdout_rows = stratified_holdout(split.labels, round(fraction * every), seed)
    if not len(holdout_rows):
        raise DataError(
            f"{split.where(0)} and the rest of split {split.name!r}: {name}_fraction {fraction:g} of {every} "
            f"images splits off none, since every class keeps one; raise data.{name}_fraction or add images"
        )
    return split.subset(split.name, kept_rows), split.subset(name, holdout_rows)


def class_order(ids: Iterable[str]) -> tuple[str, ...]:
    """Class ids, sorted by value if all are whole numbers (such as 7, 07 or 7.0), else alphabetically."""
    unique = sorted(set(ids))
    kinds = ((r"-?\d+", int), (r"-?\d{1,15}(\.0+)?", float))
    value = next((of for pattern, of in kinds if all(re.fullmatch(pattern, k) for k in unique)), None)
    return tuple(sorted(unique, key=value))
