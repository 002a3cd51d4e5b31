"""FGVC folders: train.json, val.json and test.json map an image's relative path to its class id.

A path starts at the root, at ``images`` or at ``Images``. Ids are whole numbers or text; their order on train
gives the labels of every split. A part of train (``data.fraction``) is that of train_PERCENT.json, if there is one.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats.files import FileSource, Folder, Mistakes, open_home, read_text
from dist_vpt.data.images import Decoding
from dist_vpt.data.splits import Split, Splits, class_order, with_missing_splits
from dist_vpt.data.tasks import Task
from dist_vpt.errors import DataError, nearest


def open_splits(recipe: DataConfig, task: Task) -> Splits:
    root = open_home(recipe, task.folders, "train.json")
    files = {name: root / f"{name}.json" for name in ("train", "val", "test")}
    reduced = root / f"train_{100 * recipe.fraction:g}.json"
    if recipe.fraction < 1 and reduced.exists():
        files["train"] = reduced
    entries = {name: _entries(file) for name, file in files.items() if name == "train" or file.exists()}
    mistakes = Mistakes()
    for name, pairs in entries.items():
        _check(files[name], pairs, mistakes)
    mistakes.check()
    classes = class_order(str(value) for _, value in entries["train"])
    folder = Folder(root, ("", "images", "Images"), Decoding.of(task))
    label_of = {name: k for k, name in enumerate(classes)}
    found = {
        name: _split(name, files[name], pairs, folder=folder, label_of=label_of, mistakes=mistakes)
        for name, pairs in entries.items()
    }
    mistakes.check()
    missing = {"test": f"there is no {files['test']}; add it: an object of 'relative/path': class id"}
    splits = with_missing_splits(recipe, classes, found, holdout_test=False, missing=missing)
    return replace(splits, fixed=str(reduced)) if files["train"] == reduced else splits


def _entries(file: Path) -> list[tuple[str, Any]]:
    """The object's pairs as in the file: a dict would hide a path that occurs twice."""
    try:
        parsed = json.loads(read_text(file), object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: is not JSON ({error.msg}); fix the syntax") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{file}: is not JSON that can be read ({error}); fix the syntax") from None
    if not isinstance(parsed, tuple):
        raise DataError(f"{file}: holds a {type(parsed).__name__}; use an object of 'relative/path': class id")
    return list(parsed)


def _check(file: Path, pairs: list[tuple[str, Any]], mistakes: Mistakes) -> None:
    if not pairs:
        mistakes.add(file, "holds no image; add a 'relative/path': class id")
    seen = set()
    for path, value in pairs:
        location = f"{file}: {path!r}"
        if isinstance(value, bool) or not isinstance(value, int | str):
            mistakes.add(location, f"class id {_brief(value)} is neither a whole number nor text; use one of these")
        if path in seen:
            mistakes.add(location, "occurs twice; remove one")
        seen.add(path)


def _brief(value: Any) -> str:
    text = "an object" if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _split(
    name: str,
    file: Path,
    pairs: list[tuple[str, Any]],
    *,
    folder: Folder,
    label_of: dict[str, int],
    mistakes: Mistakes,
) -> Split:
    files, labels = [], []
    for path, value in pairs:
        if str(value) not in label_of:
            hint = nearest(str(value), label_of)
            mistakes.add(f"{file}: {path!r}", f"class id {value!r} has no image in train; {hint}")
            continue
        try:
            files.append(folder.find(path))
        except ValueError as error:
            mistakes.add(f"{file}: {path!r}", str(error))
            continue
        labels.append(label_of[str(value)])
    return Split(name, np.array(labels, np.int64), FileSource(folder.root, tuple(files), folder.decoding))
