"""The storage formats, and opening the splits of a recipe's task."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np

from dist_vpt.data.config import DataConfig, resolve
from dist_vpt.data.formats.files import Mistakes, alike_key, open_home, open_root
from dist_vpt.data.labels import class_counts
from dist_vpt.data.splits import Splits, draw
from dist_vpt.data.tasks import Format, Task
from dist_vpt.data.waiting import stoppable
from dist_vpt.errors import DataError

# Storage format -> module:function that opens it, imported lazily.
FORMATS: dict[Format, str] = {
    "digits": "dist_vpt.data.formats.digits:open_splits",
    "shapes": "dist_vpt.data.formats.shapes:open_splits",
    "tfds": "dist_vpt.data.formats.tfds:open_splits",
    "vtab_folder": "dist_vpt.data.formats.vtab_folder:open_splits",
    "fgvc_json": "dist_vpt.data.formats.fgvc_json:open_splits",
    "image_folder": "dist_vpt.data.formats.image_folder:open_splits",
    "hf": "dist_vpt.data.formats.hf:open_splits",
    "webdataset": "dist_vpt.data.formats.webdataset:open_splits",
    "table": "dist_vpt.data.formats.table:open_splits",
}


def open_splits(recipe: DataConfig, task: Task | None = None) -> Splits:
    """The splits of the recipe's task, checked as far as possible without decoding an image.

    ``task``: what the recipe resolves to, where that is known already.
    """
    task = task or resolve(recipe)
    storage = stored_as(recipe, task)
    module, function = FORMATS[storage].split(":")
    open_stored: Callable[[DataConfig, Task], Splits] = getattr(import_module(module), function)
    with stoppable() if recipe.streamed else nullcontext():
        splits = open_stored(recipe, task)
    notes = (*splits.notes, *_beside(recipe, task, storage))
    remarks = (*splits.remarks, *_twins(splits.classes))
    splits = replace(splits, storage=splits.storage or storage, notes=notes, remarks=remarks)
    location = recipe.root or task.name
    if task.classes is not None and len(splits.classes) != task.classes:
        raise DataError(
            f"{location}: {len(splits.classes)} classes, but task {task.name!r} has "
            f"{task.classes}; complete the dataset, or use another task name"
        )
    _check_several(location, splits.classes)
    _check_counts(location, task, splits)
    if not task.allow_missing_classes:
        _check_absent(location, recipe.train_on, splits)
    _check_labeled(location, splits)
    splits = draw(splits, recipe)
    if recipe.streamed:
        from dist_vpt.data.streaming import check_disk, streaming_remarks

        check_disk(recipe, splits)
        splits = replace(splits, remarks=(*splits.remarks, *streaming_remarks(recipe, splits)))
    if not recipe.extra_tests:
        return splits
    from dist_vpt.data.formats.extra_tests import open_extra_tests

    extra, lines = open_extra_tests(recipe, task, splits.classes)
    return replace(splits, extra=extra, remarks=(*splits.remarks, *lines))


def check_root(recipe: DataConfig, *, test: bool) -> None:
    """Raises the DataErrors that need no look at the images: those of data.root, its class folders or its table.

    ``test``: whether the test split is needed.
    """
    if recipe.extra_tests:
        from dist_vpt.data.formats.extra_tests import check_extra_roots

        check_extra_roots(recipe)
    task = resolve(recipe)
    if recipe.root is None or stored_as(recipe, task) == "hf":
        return
    if stored_as(recipe, task) == "table":
        from dist_vpt.data.formats.table import read_rows

        missing = read_rows(recipe).missing
        if test and missing:
            raise DataError(f"split 'test' is missing: {missing['test']}")
        return
    if recipe.streamed:  # shards behind addresses
        from dist_vpt.data.formats.tar_spans import check_addresses

        check_addresses(recipe)
        return
    root = open_root(recipe)
    if stored_as(recipe, task) == "webdataset":
        from dist_vpt.data.formats.webdataset import find_shards

        find_shards(recipe)
    if stored_as(recipe, task) == "image_folder":
        from dist_vpt.data.formats.image_folder import find_folders

        _, missing, classes = find_folders(root)
        _check_several(root, classes)
        if test and missing:
            raise DataError(f"split 'test' is missing: {missing['test']}")


def _twins(classes: Sequence[str]) -> list[str]:
    """A line about classes that are probably one."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(alike_key(" ".join(name.split())), []).append(name)
    twins = [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    return [f"classes whose names differ in case, accents or spaces alone: {'; '.join(twins)}"] if twins else []


def _check_several(location: str | Path, classes: Sequence[str]) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{location}: has one class only, {classes[0]!r}; is data.root a folder too high or too low? It must hold "
            "the folders of the splits or of the classes, or lists that name several classes"
        )


def stored_as(recipe: DataConfig, task: Task) -> Format:
    """The storage format: the recipe's, else for a task of VTAB-1k the one found below the root."""
    if recipe.format is not None or task.tfds is None:
        return task.format
    from dist_vpt.data.formats import tfds, vtab_folder

    if tfds.find(open_root(recipe), task.tfds) is not None:
        return "tfds"
    home = open_home(recipe, task.folders, vtab_folder.LISTS["train"])
    if (home / vtab_folder.LISTS["train"]).is_file():
        return "vtab_folder"
    folders = " or ".join(f"{name}/{vtab_folder.LISTS['train']}" for name in task.folders)
    raise DataError(f"{tfds.missing(recipe, task)}; nor is there a vtab-1k folder ({folders})")


def _beside(recipe: DataConfig, task: Task, storage: Format) -> list[str]:
    """A note if both formats exist below the root and the recipe does not choose between them."""
    if recipe.format is not None or storage != "tfds" or not task.folders:
        return []
    from dist_vpt.data.formats.vtab_folder import LISTS

    home = open_home(recipe, task.folders, LISTS["train"])
    return [f"{home} exists too; data.format=vtab_folder uses it"] if (home / LISTS["train"]).is_file() else []


def _check_counts(location: str, task: Task, splits: Splits) -> None:
    mistakes = Mistakes()
    for name, count in task.expected_counts:
        split = getattr(splits, name)
        if split is not None and len(split) != count:
            mistakes.add(
                f"{location}: split {name!r} of task {task.name!r}",
                f"{len(split):,} images, and the published one has {count:,}; complete the dataset, or set "
                "data.check_counts=false",
            )
    mistakes.check()


def _check_labeled(location: str, splits: Splits) -> None:
    """Where images have several labels or none: without any label a split has no mean average precision."""
    for split in (splits.val, splits.test):
        if split is not None and split.multiple and not split.labels.any():
            raise DataError(f"{location}: no image of split {split.name!r} has a label; add labels or images to it")


def _check_absent(location: str, train_on: str, splits: Splits) -> None:
    absent = np.flatnonzero(class_counts(splits[train_on].labels, len(splits.classes)) == 0)
    if len(absent):
        names = ", ".join(splits.classes[k] for k in absent[:10]) + (", ..." if len(absent) > 10 else "")
        raise DataError(
            f"{location}: {len(absent)} of {len(splits.classes)} classes have no image in split "
            f"{train_on!r} ({names}); complete it, or set data.absent_classes=allow"
        )
