"""A folder for each class: ``root/<split>/<class>/...``, or ``root/<class>/...`` with splits split off.

Hidden files and folders are ignored, other files that are no images are counted. Classes are ordered by name.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats.files import (
    FileSource,
    Mistakes,
    alike_key,
    find_images,
    folder_id,
    is_hidden,
    kinds,
    open_root,
    passed_over,
    subfolders,
)
from dist_vpt.data.images import Decoding, image_extensions
from dist_vpt.data.splits import Split, Splits, with_missing_splits
from dist_vpt.data.tasks import Task
from dist_vpt.errors import DataError, nearest
from dist_vpt.files import printable

# Names of split folders, in any case, also with an ending such as _set, -data or 2017.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
ENDINGS = re.compile(r"(set|data|images|imgs|pics|photos|split)+$")


def open_splits(recipe: DataConfig, task: Task) -> Splits:
    root = open_root(recipe)
    folders, missing, names = find_folders(root)
    classes = tuple(map(printable, names))
    mistakes, others = Mistakes(), Counter[str]()
    source = FileSource(root, (), Decoding.of(task))
    found = {name: read_split(name, folder, source, names, mistakes, others) for name, folder in folders.items()}
    mistakes.check()
    has_folders = folders["train"] != root
    splits = with_missing_splits(recipe, classes, found, holdout_test=not has_folders, missing=missing)
    lines = [passed_over(others, root), *map(_loose_images, dict.fromkeys([root, *folders.values()]))]
    read = {folder.name for folder in folders.values()}
    if has_folders and (beside := [name for name in subfolders(root) if name not in read and split_of(name) is None]):
        lines.append(f"{root}: folders beside the splits are not read: {', '.join(beside)}")
    return replace(splits, remarks=tuple(line for line in lines if line))


def find_folders(root: Path) -> tuple[dict[str, Path], dict[str, str], tuple[str, ...]]:
    """The folder of each split, why there is no test, and the classes. Raises DataError; lists no images."""
    folders, missing = _split_folders(root)
    classes = tuple(subfolders(folders["train"]))
    if not classes:
        raise DataError(f"{folders['train']}: has no class folders; give each class a folder of images")
    return folders, missing, classes


def split_of(name: str) -> str | None:
    """The split that a folder's name stands for."""
    plain = ENDINGS.sub("", re.sub(r"[^a-z]", "", name.lower()))
    return next((split for split, names in SPLIT_NAMES.items() if plain in names), None)


def _split_folders(root: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The folder of each split, or the root alone as train; and why there is no test.

    A class may be called "train" (a vehicle). Raises DataError for split folders that cannot be meant.
    """
    top = subfolders(root)
    names = {split: [name for name in top if split_of(name) == split] for split in SPLIT_NAMES}
    names = {split: found for split, found in names.items() if found} or _named_loosely(root, top)
    if not any(subfolders(root / name) for found in names.values() for name in found):
        if len(names) > 1 or (names and len(top) == 1):
            raise DataError(f"{_without_classes(root / next(iter(names.values()))[0])}")
        return {"train": root}, {}
    for split, found in names.items():
        if len(found) > 1:
            raise DataError(f"{root}: {' and '.join(found)} could both be the split {split!r}; rename all but one")
    folders = {split: root / name for split, (name,) in names.items()}
    if "train" not in folders:
        there = ", ".join(map(str, folders.values()))
        raise DataError(f"{root}: has {there} but no folder {root / 'train'} of class folders; add it")
    others = [name for name in top if name not in names["train"] and holds_images(root / name)]
    if len(folders) == 1 and others:  # a split, or a class whose images lie a folder deeper
        raise DataError(
            f"{folders['train']}: is named like a split, and {root / others[0]} beside it holds images; move the class "
            "folders into it, or rename the class, or move away what is no class"
        )
    for split in ("train", "val"):
        if split in folders and not subfolders(folders[split]):
            raise DataError(_without_classes(folders[split]))
    no_test = "set train.test=false to train without it"
    if "test" not in folders:
        return folders, {
            "test": f"there is no folder {root / 'test'}; add it, with a folder for each class, or {no_test}"
        }
    if not subfolders(folders["test"]):  # often of images without labels
        return folders, {"test": f"{_without_classes(folders.pop('test'))}, or {no_test}"}
    return folders, {}


def _alike(name: str, names: Sequence[str]) -> str:
    """The only one of ``names`` that differs from a name in case or in the composition of accents alone, or ""."""
    found = [each for each in names if alike_key(each) == alike_key(name)]
    return found[0] if len(found) == 1 else ""


def _named_loosely(root: Path, top: Sequence[str]) -> dict[str, list[str]]:
    """Folders such as seg_train and seg_test, which hold folders of equal names."""
    found = {name: split for name in top for split in SPLIT_NAMES if split in re.split(r"[^a-z]+", name.lower())}
    classes = [set(subfolders(root / name)) for name in found]
    if len(set(found.values())) < 2 or not set.intersection(*classes):
        return {}
    return {split: [name for name in found if found[name] == split] for split in dict.fromkeys(found.values())}


def _loose_images(folder: Path) -> str:
    """A line about images that lie beside the class folders, or ""."""
    names = {name for name in os.listdir(folder) if not is_hidden(name)} - {*subfolders(folder)}
    count = sum(os.path.splitext(name)[1].lower() in image_extensions() for name in names)
    return f"{folder}: {count} images beside the class folders are not read" if count else ""


def holds_images(folder: Path) -> bool:
    """Whether images lie in a folder itself."""
    return any(os.path.splitext(name)[1].lower() in image_extensions() for name in os.listdir(folder))


def _without_classes(folder: Path) -> str:
    images, _ = find_images(folder)
    held = f"{len(images)} images but no class folders; move each image into a folder of its class there"
    if not images:
        held = "neither images nor class folders; fill it"
    return f"{folder}: is named like a split and holds {held}, or rename the folder"


def read_split(  # noqa: PLR0917 (a split, and what is counted on the way)
    name: str,
    folder: Path,
    source: FileSource,
    names: tuple[str, ...],
    mistakes: Mistakes,
    others: Counter[str],
    unknown: str = "has no folder in train",
) -> Split:
    """The images of the class folders in a folder; ``unknown``: what is wrong with one that is none of ``names``."""
    label_of = {k: label for label, k in enumerate(names)}
    elsewhere = [folder_id(path) for path in (source.root, folder, *(folder / name for name in subfolders(folder)))]
    files: list[str] = []
    labels: list[int] = []
    for class_name in subfolders(folder):
        meant = label_of.get(class_name, label_of.get(_alike(class_name, names)))
        if meant is None:
            hint = nearest(class_name, names)
            mistakes.add(folder / class_name, f"class {class_name!r} {unknown}; {hint}")
            continue
        images, more = find_images(folder / class_name, elsewhere)
        others += more
        if not images:
            held = f" ({kinds(more)})" if more else ""
            mistakes.add(printable(folder / class_name), f"holds no image{held}; add images or remove the folder")
        files += [image.relative_to(source.root).as_posix() for image in images]
        labels += [meant] * len(images)
    return Split(name, np.array(labels, np.int64), replace(source, files=tuple(files)))
