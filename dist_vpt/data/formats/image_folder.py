"""A folder for each class: ``root/<split>/<class>/...``, or ``root/<class>/...`` with splits split off.

Hidden files and files without an image's extension are ignored. Classes are ordered by name.
"""

import os
from pathlib import Path

import numpy as np

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats.files import FileSource, Mistakes, open_root
from dist_vpt.data.splits import Split, Splits, with_missing_splits
from dist_vpt.data.tasks import Task
from dist_vpt.errors import DataError, nearest

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def open_splits(recipe: DataConfig, task: Task) -> Splits:
    root = open_root(recipe)
    folders = _split_folders(root)
    classes = tuple(_subfolders(folders["train"]))
    if not classes:
        raise DataError(f"{folders['train']}: has no class folders; give each class a folder of images")
    mistakes = Mistakes()
    found = {name: _read(name, folder, root, classes, mistakes) for name, folder in folders.items()}
    mistakes.check()
    has_folders = folders["train"] != root
    missing = {"test": f"there is no folder {root / 'test'}; add it, with a folder for each class"}
    return with_missing_splits(recipe, classes, found, holdout_test=not has_folders, missing=missing)


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split, or the root alone as train. A class may be called "train" (a vehicle)."""
    found = {
        split: root / name
        for split, names in SPLIT_FOLDERS.items()
        for name in names
        if (root / name).is_dir() and _subfolders(root / name)
    }
    if not found:
        return {"train": root}
    if "train" not in found:
        there = ", ".join(str(folder) for folder in found.values())
        raise DataError(f"{root}: has {there} but no folder {root / 'train'} of class folders; add it")
    return found


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _read(name: str, folder: Path, root: Path, classes: tuple[str, ...], mistakes: Mistakes) -> Split:
    label_of = {k: label for label, k in enumerate(classes)}
    files: list[str] = []
    labels: list[int] = []
    for class_name in _subfolders(folder):
        if class_name not in label_of:
            hint = nearest(class_name, classes)
            mistakes.add(folder / class_name, f"class {class_name!r} has no folder in train; {hint}")
            continue
        images = _images(folder / class_name, root)
        if not images:
            mistakes.add(folder / class_name, "holds no image; add images or remove the folder")
        files += images
        labels += [label_of[class_name]] * len(images)
    return Split(name, np.array(labels, np.int64), FileSource(root, tuple(files), exif_transpose=True))


def _images(folder: Path, root: Path) -> list[str]:
    return sorted(
        Path(inner, file).relative_to(root).as_posix()
        for inner, _, names in os.walk(folder, followlinks=True)
        for file in names
        if not file.startswith(".") and os.path.splitext(file)[1].lower() in EXTENSIONS
    )
