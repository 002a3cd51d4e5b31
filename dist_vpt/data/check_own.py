"""``dist-vpt data check --storage``: what one's own dataset holds, and what would spoil its scores."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from dist_vpt.data.config import DataConfig, resolve
from dist_vpt.data.depth import depth_warning
from dist_vpt.data.duplicates import Place, equal_files
from dist_vpt.data.formats import open_splits
from dist_vpt.data.images import decode, open_header
from dist_vpt.data.label_notes import label_notes
from dist_vpt.data.labels import class_counts
from dist_vpt.data.splits import Split, Splits, path_of
from dist_vpt.errors import DataError

FEW = 5  # images of a class in train, below which it is named
MAX_CLASSES = 60  # rows of the table of classes
MAX_LISTED = 10  # files of each kind of mistake
THREADS = 8  # Pillow decodes outside of Python's lock


class Seen(NamedTuple):
    """One image: its size and mode as stored, or why it cannot be read."""

    width: int
    height: int
    mode: str
    error: str = ""


@dataclass
class Findings:
    """What to print below the tables: mistakes that spoil a training or its scores, and what is good to know."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_own(config: DataConfig) -> Findings:
    """Decode every image, and print tables of splits and classes with all findings.

    Raises DataError, after the tables, for images that cannot be read and for equal files in two splits or classes.
    """
    splits, root = open_splits(config, resolve(config)), str(config.root)
    parts = [split for split in (splits.train, splits.val, splits.test) if split is not None]
    seen = {split.name: _look(split) for split in parts}
    findings = _findings(splits, parts, seen)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(_table_of_splits(root, parts, seen))
    console.print(_table_of_classes(splits, parts))
    for line in (*findings.wrong, *findings.notes):
        console.print(line)
    if findings.wrong:
        raise DataError(f"{root}: {len(findings.wrong)} kinds of mistakes, listed above; fix the files and check again")
    return findings


def _look(split: Split) -> list[Seen]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda i: _image(split, i), range(len(split))))


def _image(split: Split, i: int) -> Seen:
    try:
        path = path_of(split.source, i)
        if path is None:
            height, width, _ = np.asarray(split.read(i)).shape
            return Seen(width, height, "RGB")
        decode(path, split.where(i))
        with open_header(path) as image:
            return Seen(*image.size, image.mode)
    except DataError as error:
        return Seen(0, 0, "", str(error))


def _findings(splits: Splits, parts: Sequence[Split], seen: dict[str, list[Seen]]) -> Findings:
    found = Findings()
    unreadable = [image.error for images in seen.values() for image in images if image.error]
    found.wrong += _listed(f"{len(unreadable)} images cannot be read", unreadable)
    groups = equal_files(parts)
    across = [group for group in groups if _in_two_splits(group)]
    found.wrong += _listed(f"{len(across)} images are in two splits, byte for byte", map(_places, across))
    classes = [group for group in groups if _in_two_classes(group)]
    how = "have other labels in another place" if splits.train.multiple else "are in two classes"
    found.wrong += _listed(f"{len(classes)} images {how}, byte for byte", map(_places, classes))
    others = [group for group in groups if not _in_two_splits(group) and not _in_two_classes(group)]
    found.notes += _listed(f"{len(others)} images are there more than once", map(_places, others))
    counts_K = class_counts(splits.train.labels, len(splits.classes))
    few = [f"{splits.classes[k]} ({counts_K[k]})" for k in np.flatnonzero(counts_K < FEW)]
    found.notes += _listed(f"{len(few)} classes have fewer than {FEW} images in train", few)
    if splits.held_out:
        found.notes.append(f"split off train by a seed: {', '.join(splits.held_out)}")
    found.notes += label_notes(splits, val=True)
    found.notes += [*splits.notes, *splits.remarks, *filter(None, map(depth_warning, parts))]
    found.notes += [f"there is no {name}: {reason}" for name, reason in splits.missing.items() if splits.test is None]
    return found


def _in_two_splits(group: Sequence[Place]) -> bool:
    return len({place.split for place in group}) > 1


def _in_two_classes(group: Sequence[Place]) -> bool:
    return len({place.label for place in group}) > 1


def _listed(title: str, lines: "Sequence[str] | map[str]") -> list[str]:
    """One finding with its first lines, or none."""
    every = list(lines)
    more = [f"  and {len(every) - MAX_LISTED} more"] if len(every) > MAX_LISTED else []
    return ["\n".join([f"{title}:", *(f"  {line}" for line in every[:MAX_LISTED]), *more])] if every else []


def _places(group: Sequence[Place]) -> str:
    return " = ".join(place.where for place in group[:3]) + (", ..." if len(group) > 3 else "")


def _table_of_splits(root: str, parts: Sequence[Split], seen: dict[str, list[Seen]]) -> Table:
    table = Table(title=root, box=box.SIMPLE, pad_edge=False)
    for column in ("split", "images", "unreadable", "shorter side, px", "modes"):
        table.add_column(column, justify="left" if column in ("split", "modes") else "right")
    for split in parts:
        images = [image for image in seen[split.name] if not image.error]
        sides = sorted(min(image.width, image.height) for image in images) or [0]
        modes = ", ".join(f"{mode} {count}" for mode, count in Counter(image.mode for image in images).most_common())
        middle = f"{sides[0]} to {sides[-1]}, half below {sides[len(sides) // 2]}"
        table.add_row(split.name, f"{len(split):,}", str(len(seen[split.name]) - len(images)), middle, modes)
    return table


def _table_of_classes(splits: Splits, parts: Sequence[Split]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("class")
    counts = [class_counts(split.labels, len(splits.classes)) for split in parts]
    for split in parts:
        table.add_column(split.name, justify="right")
    for k, name in enumerate(splits.classes[:MAX_CLASSES]):
        table.add_row(name, *(str(counts_K[k]) for counts_K in counts))
    if len(splits.classes) > MAX_CLASSES:
        table.add_row(f"and {len(splits.classes) - MAX_CLASSES} more classes", *("" for _ in parts))
    return table
