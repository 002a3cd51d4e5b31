"""The vtab-1k folder: lists of ``relative/path label`` lines beside a folder of images.

The lists are train800.txt, val200.txt, train800val200.txt and test.txt; classes.txt, one name a line, may
be beside them. A path starts at the root or at its ``images`` folder. Labels count from 0. A known task's folder may
also be below the root, under any of its usual names.
"""

import re
from pathlib import Path

import numpy as np

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats.files import FileSource, Folder, Mistakes, open_home, read_text
from dist_vpt.data.images import Decoding
from dist_vpt.data.splits import Split, Splits, join
from dist_vpt.data.tasks import Task
from dist_vpt.errors import DataError

LISTS = {"train": "train800.txt", "val": "val200.txt", "trainval": "train800val200.txt", "test": "test.txt"}


def open_splits(recipe: DataConfig, task: Task) -> Splits:
    root = open_home(recipe, task.folders, LISTS["train"])
    names = _class_names(root / "classes.txt", task)
    folder, mistakes = Folder(root, ("", "images"), Decoding.of(task)), Mistakes()
    found, missing = {}, {}
    for name, list_name in LISTS.items():
        file = root / list_name
        if file.exists():
            found[name] = _read_list(name, file, folder, names, mistakes, own=task.group is None)
        else:
            missing[name] = f"there is no {file}; add the list, a 'relative/path label' line for each image"
    mistakes.check()
    if "train" in missing:
        raise DataError(f"split 'train' is missing: {missing['train']}")
    if "trainval" in missing:
        if "val" in missing:
            raise DataError(f"splits 'val' and 'trainval' are missing: {missing['val']}")
        found["trainval"] = join("trainval", found["train"], found["val"])
    if names is None:
        names = _names_by_number(root, found)
    return Splits(names, found["train"], found.get("val"), found["trainval"], found.get("test"), missing)


def _class_names(file: Path, task: Task) -> tuple[str, ...] | None:
    """The names in classes.txt; without the file the task's classes by number, or None if it has none."""
    if not file.exists():
        return None if task.classes is None else tuple(str(k) for k in range(task.classes))
    names = tuple(line.strip() for line in read_text(file).splitlines() if line.strip())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        what = f"class {twice[0]!r} occurs twice" if twice else "lists no class"
        raise DataError(f"{file}: {what}; use one line for each class, or remove the file")
    return names


def _read_list(
    name: str, file: Path, folder: Folder, names: tuple[str, ...] | None, mistakes: Mistakes, *, own: bool
) -> Split:
    """``own``: a list of the user's, where an image with two labels is a mistake; published lists are taken as is."""
    files, labels = [], []
    lines = read_text(file).split("\n")  # names may hold what splitlines() takes for an end, too
    seen: dict[str, int] = {}
    if not any(line.strip() for line in lines):
        mistakes.add(file, "is empty; add a 'relative/path label' line for each image")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            path, label = _path_and_label(line, names)
            if own and seen.setdefault(path, label) != label:
                raise ValueError(f"{path!r} has the label {seen[path]} on a line above, and {label} here; remove one")
            files.append(folder.find(path))
            labels.append(label)
        except ValueError as error:
            mistakes.add(f"{file}:{number}", str(error))
    return Split(name, np.array(labels, np.int64), FileSource(folder.root, tuple(files), folder.decoding))


def _path_and_label(line: str, names: tuple[str, ...] | None) -> tuple[str, int]:
    fields = line.strip().rsplit(maxsplit=1)
    if len(fields) < 2:
        raise ValueError(f"{line.strip()!r} has no label; write 'relative/path label'")
    path, label = fields
    if not re.fullmatch(r"[+-]?\d{1,9}", label, re.ASCII):
        raise ValueError(f"label {label!r} is not a class number; write 'relative/path label'")
    if int(label) < 0:
        raise ValueError(f"label {label} is negative; labels count from 0")
    if names is not None and int(label) >= len(names):
        raise ValueError(
            f"label {label} is out of range: {len(names)} classes have the labels 0 to {len(names) - 1}; "
            f"fix the label, or complete classes.txt"
        )
    return path, int(label)


def _names_by_number(root: Path, found: dict[str, Split]) -> tuple[str, ...]:
    """0, 1, 2 ... up to the largest label. A number without a training image counts as a mistake."""
    classes = 1 + max(int(split.labels.max()) for split in found.values())
    trained_on = np.union1d(found["train"].labels, found["trainval"].labels)
    if len(trained_on) < classes:
        gaps = np.flatnonzero(trained_on != np.arange(len(trained_on)))
        absent = gaps[0] if len(gaps) else len(trained_on)
        raise DataError(
            f"{root}: no image of train or trainval has label {absent} ({classes - len(trained_on)} of the "
            f"labels 0 to {classes - 1} are absent); fix the labels, or list all classes, one a line, in "
            f"{root / 'classes.txt'}"
        )
    return tuple(str(k) for k in range(classes))
