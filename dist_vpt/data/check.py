"""``dist-vpt data``: what lies below a folder of each known task, and preparing what TensorFlow Datasets can fetch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dist_vpt.data import DataRecipe, Split, Splits, open_splits, tfds
from dist_vpt.data.tasks import TASKS, Task
from dist_vpt.errors import DataError, UserError, nearest

SPLITS = ("train", "val", "trainval", "test")


@dataclass
class Checked:
    """What was found of a task."""

    task: str
    storage: str = ""  # format and version; "": it is not there
    splits: dict[str, str] = field(default_factory=dict)  # split -> images, and images of a class
    sample: str = ""  # pixels of the first test image
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
    table = Table(title=f"{root}: images (of a class: fewest to most)")
    for column in ("task", "stored as", *SPLITS, "first image", ""):
        table.add_column(column, justify="right" if column in SPLITS else "left")
    for one in found:
        verdict = "wrong" if one.wrong else "differs" if one.notes else "ok" if one.storage else "not there"
        table.add_row(one.task, one.storage, *(one.splits.get(name, "") for name in SPLITS), one.sample, verdict)
    console = Console(highlight=False)
    console.print(table)
    for one in found:
        for line in (*one.wrong, *one.notes):
            console.print(f"{one.task}: {line}", markup=False, soft_wrap=True)


def prepare(root: str, tasks: Sequence[str], file_format: str = "array_record") -> None:
    """Download and prepare the builders of tasks with tensorflow-datasets and TensorFlow.

    All tasks are tried. Raises UserError, at the end, with what could not be prepared and what to fetch by hand.
    """
    rows = [_row(name) for name in tasks]
    unknown = [row.name for row in rows if row.tfds is None]
    if unknown:
        raise UserError(f"{unknown[0]}: TensorFlow Datasets does not have it; its folder is described in the README")
    library, console, failed = tfds.library(), Console(highlight=False), []
    builders = {row.tfds.builder: row.name for row in rows if row.tfds}
    for name, task in builders.items():
        builder = library.builder(name, data_dir=root)
        if tfds.find(Path(root), TASKS[task].tfds) is not None:  # type: ignore[arg-type]
            console.print(f"{name}: prepared already, {builder.data_dir}", soft_wrap=True)
            continue
        console.print(f"{name}: is being prepared in {builder.data_dir}", soft_wrap=True)
        try:
            _prepare(builder, library, file_format)
        except Exception as error:  # downloads fail in many ways; the other datasets go on
            failed.append(f"{name}: {_reason(builder, error)}")
            continue
        console.print(f"{name}: done")
    if failed:
        raise UserError("\n".join(failed))


def _prepare(builder: Any, library: Any, file_format: str) -> None:
    config = library.download.DownloadConfig(compute_stats=library.download.ComputeStatsMode.SKIP)
    builder.download_and_prepare(file_format=file_format, download_config=config)


def _reason(builder: Any, error: Exception) -> str:
    text = f"{type(error).__name__}: {str(error).strip()}"
    if isinstance(error, ImportError) or "No module named 'tensorflow'" in text:
        return "preparing needs TensorFlow, reading does not: pip install 'dist-vpt[prepare]'"
    by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if by_hand:
        folder = Path(builder._data_dir_root) / "downloads" / "manual"
        return f"must be fetched by hand ({text[:300]}): {' '.join(by_hand.split())} Put it into {folder}"
    return f"{text[:600]}; see the message, and start the command again"


def _checked(root: str, row: Task) -> Checked:
    one = Checked(row.name)
    try:
        splits = open_splits(DataRecipe(task=row.name, root=root, counts="any", absent_classes="allow"))
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
            one.splits[name] = _counted(split, splits)
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


def _counted(split: Split, splits: Splits) -> str:
    counts = np.bincount(split.labels, minlength=len(splits.classes))
    absent = int((counts == 0).sum())
    lacking = f", {absent} without" if absent else ""
    return f"{len(split):,} ({counts.min()}-{counts.max()}{lacking})"


def _sample(split: Split) -> str:
    pixels = np.asarray(split.read(0))
    height, width, _ = pixels.shape
    return f"{width} x {height}"


def _row(name: str) -> Task:
    known = {row.name: row for row in TASKS.values() if row.group}
    if name not in known:
        raise UserError(f"{name}: no such task; {nearest(name, known)}")
    return known[name]
