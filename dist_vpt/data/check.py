"""``dist-vpt data``: what lies below a folder of each known task, and preparing what TensorFlow Datasets can fetch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits, tfds
from dist_vpt.data.splits import Split
from dist_vpt.data.tasks import TASKS, Task, Tfds
from dist_vpt.errors import DataError, UserError, nearest

SPLITS = ("train", "val", "trainval", "test")
BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 110  # characters that the table needs
BUCKETS = 12  # of neighbouring classes, in a picture of all their counts


@dataclass
class Checked:
    """What was found of a task."""

    task: str
    storage: str = ""  # format and version; "": it is not there
    splits: dict[str, np.ndarray] = field(default_factory=dict)  # split -> images of each class, int64 [K]
    sample: str = ""  # width and height of the first image of the last split that could be read
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what differs from the protocol without being damage


def check(root: str, tasks: Sequence[str]) -> list[Checked]:
    """Open each task (none named: all), read all labels and a picture of each split; print a table.

    Raises DataError, after the table, where something is damaged or differs, where a task that was named is not there,
    and where there is none at all.
    """
    rows = [_row(name) for name in tasks] or [row for row in TASKS.values() if row.group]
    found = [_checked(root, row) for row in rows]
    show(root, found)
    bad = [one.task for one in found if one.wrong or (tasks and not one.storage)]
    if bad:
        raise DataError(f"{root}: {len(bad)} of {len(found)} tasks are not as published: {', '.join(bad)}")
    if not any(one.storage for one in found):
        raise DataError(f"{root}: holds none of the known tasks; name the folder in which the datasets lie")
    return found


def show(root: str, found: Sequence[Checked]) -> None:
    """Print what was found as a table, and below it what is wrong."""
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
    console.print("of a class: fewest to most images of train and val together; classes: their counts in order")
    absent = [one.task for one in found if not one.storage]
    if absent:
        console.print(f"not there: {', '.join(absent)}")
    for one in found:
        for line in (*one.wrong, *one.notes):
            console.print(f"{one.task}: {line}", markup=False, soft_wrap=True)


def histogram(counts_K: np.ndarray) -> str:
    """Images of the classes as bars, neighbours together where there are many: a blank is a bucket without images."""
    buckets = [bucket.sum() for bucket in np.array_split(counts_K, min(BUCKETS, max(1, len(counts_K))))]
    most = max(buckets)
    return "".join(BARS[-(-int(each) * (len(BARS) - 1) // int(most))] for each in buckets) if most else ""


def prepare(root: str, tasks: Sequence[str], file_format: str = "array_record") -> None:
    """Download and prepare the builders of tasks with tensorflow-datasets and TensorFlow.

    All tasks are tried. Raises UserError, at the end, with what could not be prepared and what to fetch by hand.
    """
    rows = [_row(name) for name in tasks]
    unknown = [row.name for row in rows if row.tfds is None]
    if unknown:
        raise UserError(
            f"{unknown[0]}: TensorFlow Datasets does not have it; what its folder is stands in "
            f"configs/fgvc/{unknown[0]}.yaml"
        )
    library, console, failed = tfds.packages(), Console(highlight=False), []
    left: dict[str, Tfds] = {}
    for row in rows:
        assert row.tfds is not None
        there = tfds.find(Path(root), row.tfds)
        if there is None:
            left[row.tfds.builder] = row.tfds  # one builder may serve two tasks
        else:
            console.print(f"{row.name}: prepared already, {there}", soft_wrap=True)
    if left and not _has_tensorflow():
        raise UserError("preparing needs TensorFlow, training does not: pip install 'dist-vpt[prepare]'")
    for name, wanted in left.items():
        builder: Any = None
        console.print(f"{name}: is being prepared in {root}", soft_wrap=True)
        try:
            builder = _builder(wanted, library, root)
            _prepare(builder, library, file_format)
        except Exception as error:  # downloads fail in many ways; the other datasets go on
            failed.append(f"{name}: {_reason(builder, error)}")
            continue
        console.print(f"{name}: done")
    if failed:
        raise UserError("\n".join(failed))


def _has_tensorflow() -> bool:
    return find_spec("tensorflow") is not None


def _builder(wanted: Tfds, library: Any, root: str) -> Any:
    """Of the version that the published numbers were made with, or of the newest where that is made no more."""
    try:
        return library.builder(wanted.builder, version=wanted.version, data_dir=root)
    except AssertionError:
        return library.builder(wanted.builder, data_dir=root)


def _prepare(builder: Any, library: Any, file_format: str) -> None:
    config = library.download.DownloadConfig(compute_stats=library.download.ComputeStatsMode.SKIP)
    builder.download_and_prepare(file_format=file_format, download_config=config)


def _reason(builder: Any, error: Exception) -> str:
    text = f"{type(error).__name__}: {str(error).strip()}"
    by_hand = getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    if by_hand:
        folder = Path(builder._data_dir_root) / "downloads" / "manual"
        return f"must be fetched by hand ({text[:300]}): {' '.join(by_hand.split())} Put it into {folder}"
    return f"{text[:600]}; see the message, and start the command again"


def _checked(root: str, row: Task) -> Checked:
    one = Checked(row.name)
    try:
        splits = open_splits(DataConfig(task=row.name, root=root, check_counts=False, absent_classes="allow"))
    except DataError as error:
        if not _is_absent(root, row):
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
            one.splits[name] = np.bincount(split.labels, minlength=len(splits.classes))
            if name != "trainval":
                one.sample = _sample(split)
        except DataError as error:
            one.wrong += str(error).splitlines()
    for name, count in row.counts:
        split = getattr(splits, name)
        if split is not None and len(split) != count:
            one.wrong.append(f"split {name} has {len(split):,} images, the published one {count:,}")
    if splits.carved:
        one.notes.append(f"has no {' and no '.join(splits.carved)}, which is taken out of train by data.split_seed")
    return one


def _is_absent(root: str, row: Task) -> bool:
    """Whether nothing of the task lies below the root, damaged or not."""
    names = {name.lower() for name in row.folders} | ({row.tfds.builder.split("/")[0]} if row.tfds else set())
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"--root {root}: is not a folder; name the one in which the datasets lie")
    return not any(path.name.lower() in names for path in folder.iterdir())


def _sample(split: Split) -> str:
    pixels = np.asarray(split.read(0))
    height, width, _ = pixels.shape
    return f"{width}x{height}"


def _row(name: str) -> Task:
    known = {row.name: row for row in TASKS.values() if row.group}
    if name not in known:
        raise UserError(f"{name}: no such task; {nearest(name, known)}")
    return known[name]
