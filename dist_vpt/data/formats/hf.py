"""Hugging Face datasets: from the hub, saved to disk, or a folder that the library can read as a dataset.

With ``data.streaming`` their Parquet files are read where they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_vpt.data.addresses import expand, is_address, shown
from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats.image_folder import SPLIT_NAMES, split_of
from dist_vpt.data.formats.parquet import ParquetPart
from dist_vpt.data.images import AS_PUBLISHED, Decoding, decode
from dist_vpt.data.splits import Source, Split, Splits, class_order, with_missing_splits
from dist_vpt.data.spool import open_spool
from dist_vpt.data.tasks import Task
from dist_vpt.data.waiting import answer_to
from dist_vpt.errors import DataError, Interrupted, UserError, nearest

ENCODED = ("binary", "bytes and path")  # columns of encoded images that nobody has declared to be images
SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder written by save_to_disk


@dataclass(frozen=True, eq=False)
class HfSource:
    """The image column of a dataset, undecoded. Pickles as paths where the dataset is a file on disk."""

    dataset: Any  # datasets.Dataset with one column
    column: str
    name: str  # of the dataset and split, for messages
    decoding: Decoding = AS_PUBLISHED

    def read(self, i: int, max_megapixels: float) -> Image.Image:
        stored = self.dataset[i][self.column]
        if stored is None:
            raise DataError(f"{self.where(i)}: has no image; remove the record, or set data.on_decode_error=skip")
        encoded = stored["path"] if stored["bytes"] is None else stored["bytes"]
        return decode(encoded, self.where(i), max_megapixels, self.decoding)

    def where(self, i: int) -> str:
        stored = self.dataset[i][self.column]
        path = stored and stored["path"]
        return f"{self.name} record {i}" + (f" ({path})" if path else "")

    def identity(self, i: int) -> str:
        return f"{self.dataset._fingerprint} {i} {self.decoding}"


def open_splits(recipe: DataConfig, task: Task) -> Splits:
    try:
        import datasets
    except ImportError:
        raise UserError("format 'hf' needs the package datasets; pip install 'dist-vpt[hf]'") from None
    parts = _parts(recipe, datasets)
    features = parts["train"].features
    image = _column(recipe, "image", recipe.hf.image, features)
    label = _column(recipe, "label", recipe.hf.label, features)
    labels, classes = _labels(recipe, parts, label)
    found, missing = {}, {}
    for name, part in parts.items():
        if not len(labels[name]):
            raise DataError(f"{recipe.root} split {name!r}: has no record; add some, or leave it out of data.hf.splits")
        hidden = np.flatnonzero(labels[name] < 0)
        location = f"{recipe.root} split {name!r}"
        if len(hidden):
            missing[name] = f"{location} record {hidden[0]} has label -1, so its labels are hidden"
            continue
        if not _holds_images(part.features.get(image)):
            raise DataError(f"{location}: column {image!r} is not an Image column; fix the dataset")
        source: Source
        if isinstance(part, ParquetPart):
            spool = open_spool(recipe.streaming_disk_gib)
            source = part.source(image, recipe.streaming_shuffle, spool, Decoding.of(task))
        else:
            column = part.select_columns([image]).cast_column(image, datasets.Image(decode=False))
            source = HfSource(column, image, location, Decoding.of(task))
        found[name] = Split(name, labels[name], source)
    for name in ("train", "val"):
        if name in missing:
            named = ", ".join(f"{each}: ..." for each in dict.fromkeys(("train", name)))
            raise DataError(f"{missing[name]}; list the splits that have labels: 'data.hf.splits={{{named}}}'")
    return with_missing_splits(recipe, classes, found, holdout_test="test" not in missing, missing=missing)


def _parts(recipe: DataConfig, datasets: Any) -> dict[str, Any]:
    """Splits by this package's names: chosen by the recipe, or by the dataset's names."""
    available = _streamed(recipe, datasets) if recipe.streaming else _open(recipe, datasets)
    chosen = {str(split): name for split, name in recipe.hf.splits.items()}
    if not chosen:
        for split, names in SPLIT_NAMES.items():
            exact = [name for name in names if name in available]
            alike = [name for name in available if split_of(name) == split]  # Train, TRAIN_SET, Testing, ...
            if len(alike) > 1 and not exact:
                raise DataError(
                    f"data.root {recipe.root!r}: {' and '.join(alike)} could both be the split {split!r}; choose one: "
                    f"'data.hf.splits={{{split}: ...}}'"
                )
            if exact or alike:
                chosen[split] = (exact or alike)[0]
    for split, name in chosen.items():
        if recipe.streaming and "[" in name:
            raise DataError(
                f"data.hf.splits.{split} {name!r}: whole splits alone are streamed; leave the slice out, and use "
                "data.fraction or data.val_fraction"
            )
        if name not in available:
            raise DataError(f"data.hf.splits.{split} {name!r}: no such saved split; {nearest(name, available)}")
    if "train" not in chosen:
        raise DataError(
            f"data.root {recipe.root!r}: has no split 'train' but {', '.join(map(repr, available))}; "
            "set the one to train on: 'data.hf.splits={train: ...}'"
        )
    return {split: available[name] for split, name in chosen.items()}


def _open(recipe: DataConfig, datasets: Any) -> dict[str, Any]:
    """The dataset's splits, or the expressions that the recipe chooses."""
    assert recipe.root is not None  # DataConfig requires it
    folder = Path(recipe.root).expanduser()
    root = str(folder) if folder.is_dir() else recipe.root
    with _opening(recipe, folder):
        try:
            if any((folder / file).is_file() for file in SAVED):
                stored = datasets.load_from_disk(root)
                return stored if isinstance(stored, datasets.DatasetDict) else {"train": stored}
            where = {"path": root, "name": recipe.hf.config, "revision": recipe.hf.revision}
            if recipe.hf.splits:
                return {name: datasets.load_dataset(**where, split=name) for name in recipe.hf.splits.values()}
            found: dict[str, Any] = datasets.load_dataset(**where)
            return found
        except IndexError as error:  # of a split that was saved without a file
            raise DataError(
                f"data.root {recipe.root!r}: one of its splits has no record; save the dataset without this split"
            ) from error


def _streamed(recipe: DataConfig, datasets: Any) -> dict[str, Any]:
    """The dataset's splits as Parquet files, none of which is read yet."""
    assert recipe.root is not None  # DataConfig requires it
    if is_address(recipe.root):
        patterns = {str(name): pattern for name, pattern in recipe.hf.splits.items()}
        addresses = {
            pattern: expand(f"data.hf.splits.{name}", recipe.root, pattern) for name, pattern in patterns.items()
        }
        return {name: ParquetPart(f"{shown(recipe.root)} {name}", some, None) for name, some in addresses.items()}
    folder = Path(recipe.root).expanduser()
    if any((folder / file).is_file() for file in SAVED):
        raise DataError(
            f"data.root {recipe.root!r}: was saved by save_to_disk, so it is read in place; remove data.streaming"
        )
    with _opening(recipe, folder):
        root = str(folder) if folder.is_dir() else recipe.root
        names = {"name": recipe.hf.config, "revision": recipe.hf.revision}
        builder = answer_to(lambda: datasets.load_dataset_builder(root, **names), root)
    files = builder.config.data_files or {}
    other = next((str(file) for some in files.values() for file in some if not str(file).endswith(".parquet")), None)
    if other is not None or not files:
        held = f"holds {other.rpartition('/')[2]!r}" if other else "has no data files"
        raise DataError(
            f"data.root {recipe.root!r}: {held}, and Parquet files alone are streamed; use the copy in Parquet that "
            "the hub makes of most datasets (data.hf.revision=refs/convert/parquet), data.format=webdataset for shards "
            "(hf://datasets/NAME), or remove data.streaming"
        )
    features = builder.info.features
    return {
        str(name): ParquetPart(f"{recipe.root} {name}", list(map(str, some)), features) for name, some in files.items()
    }


@contextmanager
def _opening(recipe: DataConfig, folder: Path) -> Iterator[None]:
    """Say what to do where the library cannot open a dataset."""
    try:
        yield
    except (DataError, Interrupted):
        raise
    except Exception as error:  # the library and its network clients raise errors of many families
        kind = "" if folder.is_dir() else "is not a folder, and as a dataset of the hub it "
        raise DataError(
            f"data.root {recipe.root!r}: {kind}cannot be opened ({type(error).__name__}: {error}); check the "
            f"name and data.hf, and without a network download the dataset first"
        ) from error


def _column(recipe: DataConfig, role: str, asked: str | None, features: Any) -> str:
    """The column of images or labels: the one that the recipe names, or the only one of its kind."""
    if asked is not None:
        if asked not in features:
            raise DataError(f"data.hf.{role} {asked!r}: no such column; {nearest(asked, features)}")
        if role == "image" and not _holds_images(features[asked]):
            raise DataError(
                f"data.hf.image {asked!r}: is a column of {_kind(features[asked])}; choose one of images, of their "
                "bytes, or of their paths"
            )
        return asked
    kind = "Image" if role == "image" else "ClassLabel"
    columns = [name for name, feature in features.items() if _kind(feature) == kind]
    if role == "image" and not columns:
        columns = [name for name, feature in features.items() if _kind(feature) in ENCODED]
    if len(columns) != 1:
        listed = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
        raise DataError(
            f"{recipe.root}: has {len(columns)} columns of type {kind} among {listed}; one is needed; choose it with "
            f"data.hf.{role}"
        )
    return columns[0]


def _kind(feature: Any) -> str:
    """A column's type as the library's own messages write it: Image, ClassLabel, binary, string, int64, ..."""
    if isinstance(feature, dict):
        return "bytes and path" if feature.keys() == {"bytes", "path"} else "a structure"
    name = type(feature).__name__
    return str(feature.dtype) if name == "Value" else name


def _holds_images(feature: Any) -> bool:
    return _kind(feature) in ("Image", "string", *ENCODED)


def _labels(recipe: DataConfig, parts: dict[str, Any], column: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels int64 [n] of each split, and the class names: a ClassLabel's, or the values found in train."""
    values = {name: _values(f"{recipe.root} split {name!r}", part, column) for name, part in parts.items()}
    declared = {name: getattr(part.features[column], "names", None) for name, part in parts.items()}
    for name, names in declared.items():
        if names != declared["train"]:
            raise DataError(
                f"{recipe.root} split {name!r}: the classes of column {column!r} differ from those of train; "
                f"save all splits with the same ClassLabel"
            )
    if declared["train"] is not None:
        numbers = {name: np.array(part, np.int64) for name, part in values.items()}
        for name, numbers_n in numbers.items():
            outside = np.flatnonzero(numbers_n >= len(declared["train"]))
            if len(outside):
                raise DataError(
                    f"{recipe.root} split {name!r} record {outside[0]}: {column} {numbers_n[outside[0]]} must be below "
                    f"{len(declared['train'])}, the number of its classes; fix the record"
                )
        return numbers, tuple(declared["train"])
    classes = class_order(map(str, values["train"]))
    label_of = {value: k for k, value in enumerate(classes)}
    labels = {name: np.empty(len(part), np.int64) for name, part in values.items()}
    for name, part in values.items():
        for i, value in enumerate(map(str, part)):
            if value not in label_of:
                raise DataError(
                    f"{recipe.root} split {name!r} record {i}: {column} {value!r} has no image in train; "
                    f"{nearest(value, classes)}"
                )
            labels[name][i] = label_of[value]
    return labels, classes


def _values(location: str, part: Any, column: str) -> list[int | str]:
    if column not in part.features:
        raise DataError(f"{location}: has no column {column!r}; {nearest(column, part.features)}")
    values = list(part[column])
    for i, value in enumerate(values):
        if not isinstance(value, int | str):
            raise DataError(
                f"{location} record {i}: {column} {value!r:.40} is not a class; fix the record, or choose the column "
                f"of the labels with data.hf.label"
            )
    return values
