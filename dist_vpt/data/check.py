"""``dist-vpt data check``: find known tasks below a folder and compare them with the published ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.data.labels import class_counts
from dist_vpt.data.splits import Split
from dist_vpt.data.tasks import EMBEDDED, TASKS, Task, published_task
from dist_vpt.errors import DataError, UserError

SPLITS = ("train", "val", "trainval", "test")
BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 110  # characters that the table needs
BUCKETS = 12  # of neighboring classes, in a picture of all their counts


@dataclass
class CheckedTask:
    """The result of checking one task."""

    task: str
    storage: str = ""  # format and version; "": not found
    splits: dict[str, np.ndarray] = field(default_factory=dict)  # split -> images of each class, int64 [K]
    sample: str = ""  # width and height of the first image of the last split that could be read
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # differences from the protocol that are not damage


def check(root: str | None, tasks: Sequence[str]) -> list[CheckedTask]:
    """Open each task (none named: all), read all labels and a picture of each split; print a table.

    ``root`` may be None where all of them come with the package. Raises DataError, after the table, where something is
    damaged or differs, where a named task does not exist, and where there is none at all.
    """
    wanted = [published_task(name, embedded=True) for name in tasks] or [task for task in TASKS.values() if task.group]
    if root is None and any(task.format not in EMBEDDED for task in wanted):
        raise UserError("--root DIR is missing: the folder that contains the datasets")
    found = [_checked(None if task.format in EMBEDDED else root, task) for task in wanted]
    root = root or "in the package"
    show(root, found)
    bad = [one.task for one in found if one.wrong or (tasks and not one.storage)]
    if bad:
        raise DataError(f"{root}: {len(bad)} of {len(found)} tasks are not as published: {', '.join(bad)}")
    if not any(one.storage for one in found):
        raise DataError(
            f"{root}: holds none of the known tasks; use the folder with the datasets, or "
            "for your own data add --storage image_folder"
        )
    return found


def show(root: str, found: Sequence[CheckedTask]) -> None:
    """Print a table of the tasks that were found, and the differences and mistakes below it."""
    table = Table(title=str(root), box=box.SIMPLE, pad_edge=False)
    for column in ("task", "", "stored as", "train/val/test", "of a class", "classes", "first"):
        table.add_column(column, no_wrap=column != "stored as", overflow="fold")
    for one in found:
        if not one.storage:
            continue
        verdict = "wrong" if one.wrong else "differs" if one.notes else "ok"
        counts_K = one.splits.get("trainval", np.zeros(0, np.int64))
        images = "/".join(
            str(one.splits[name].sum()) if name in one.splits else "-" for name in SPLITS if name != "trainval"
        )
        spread = f"{counts_K.min()}-{counts_K.max()}" if len(counts_K) else ""
        storage = re.sub(r"^tfds .*:(\S+) \((\w+)\)$", r"\2 \1", one.storage)
        table.add_row(one.task, verdict, storage, images, spread, histogram(counts_K), one.sample)
    console = Console(highlight=False, width=max(WIDTH, Console().width))  # whole lines, also in a pipe
    console.print(table)
    console.print("of a class: fewest to most images in train and val; classes: their counts in order")
    absent = [one.task for one in found if not one.storage]
    if absent:
        console.print(f"not found: {', '.join(absent)}")
    for one in found:
        for line in (*one.wrong, *one.notes):
            console.print(f"{one.task}: {line}", markup=False, soft_wrap=True)


def histogram(counts_K: np.ndarray) -> str:
    """Images of the classes as bars, neighbors together where there are many; a blank is a bucket without images."""
    buckets = [bucket.sum() for bucket in np.array_split(counts_K, min(BUCKETS, max(1, len(counts_K))))]
    most = max(buckets)
    return "".join(BARS[-(-int(each) * (len(BARS) - 1) // int(most))] for each in buckets) if most else ""


def _checked(root: str | None, task: Task) -> CheckedTask:
    one = CheckedTask(task.name)
    try:
        splits = open_splits(DataConfig(task=task.name, root=root, check_counts=False, absent_classes="allow"))
    except DataError as error:
        if root is None or not _is_absent(root, task):
            one.storage = one.storage or "?"
            one.wrong += str(error).splitlines()
        return one
    one.storage = splits.storage
    one.notes += splits.notes
    for name in SPLITS:
        split = getattr(splits, name)
        if split is None:
            one.wrong.append(splits.missing.get(name, f"has no split {name}"))
            continue
        try:
            one.splits[name] = class_counts(split.labels, len(splits.classes))
            if name != "trainval":
                one.sample = _sample(split)
        except DataError as error:
            one.wrong += str(error).splitlines()
    for name, count in task.expected_counts:
        split = getattr(splits, name)
        if split is not None and len(split) != count:
            one.wrong.append(f"split {name} has {len(split):,} images, the published one {count:,}")
    if splits.held_out:
        one.notes.append(f"has no {' and no '.join(splits.held_out)}, which is split off train by data.split_seed")
    return one


def _is_absent(root: str, task: Task) -> bool:
    """Whether the root has no folder of the task, damaged or not."""
    names = {name.lower() for name in task.folders} | ({task.tfds.builder.split("/")[0]} if task.tfds else set())
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"--root {root}: is not a folder; use the folder with the datasets")
    return not any(path.name.lower() in names for path in folder.iterdir())


def _sample(split: Split) -> str:
    pixels = np.asarray(split.read(0))
    height, width, _ = pixels.shape
    return f"{width}x{height}"
