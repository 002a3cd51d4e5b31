"""Tables of image paths and labels: one CSV, TSV or Parquet file, or a file for each split.

The columns are found by their usual names or by the keys of ``data.table``. A column, or the files' names, say which
split an image is in; without them val and test are split off. A path starts at the table's folder or at its ``images``
folder, unless ``data.table.images`` names another one.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats.files import FileSource, Folder, MissingFile, Mistakes, read_text, subfolders
from dist_vpt.data.formats.table_columns import WHOLE, find_column, find_tables, missing_column, split_values
from dist_vpt.data.formats.table_files import Table, open_table
from dist_vpt.data.formats.table_labels import (
    Label,
    class_columns,
    is_empty,
    label_array,
    labels_of_cells,
    separated,
    separator_of,
    several_in_one,
)
from dist_vpt.data.images import Decoding, image_extensions
from dist_vpt.data.splits import Split, Splits, class_order, with_missing_splits
from dist_vpt.data.tasks import Task
from dist_vpt.errors import DataError, nearest
from dist_vpt.files import printable

SHOWN = 3  # rows that a message about many of them names
NO_TEST = "set train.test=false to train without it"


class Row(NamedTuple):
    """An image as the table has it."""

    table: Table
    number: int
    path: str
    label: Label

    @property
    def where(self) -> str:
        """File and line."""
        return self.table.where(self.number)

    @property
    def labels(self) -> tuple[str, ...]:
        """All classes of the row; mostly one."""
        return self.label if isinstance(self.label, tuple) else (self.label,)

    @property
    def line(self) -> str:
        """The line alone."""
        return f"{self.table.unit} {self.number}"


@dataclass
class Rows:
    """The rows of a table by split, before any image is looked for."""

    folder: Path  # of the table
    images: Path  # where paths begin
    of: dict[str, list[Row]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # why there is no test
    holdout_test: bool = True  # nothing says which split a row is in
    classes: tuple[str, ...] = ()
    several: bool = False  # labels an image
    columns: list[str] = field(default_factory=list)  # of 0 and 1, one for each class, where there are such
    remarks: list[str] = field(default_factory=list)


def open_splits(recipe: DataConfig, task: Task) -> Splits:
    rows = read_rows(recipe)
    below = ("",) if recipe.table.images else ("", "images")
    folder, mistakes = Folder(rows.images, below, Decoding.of(task)), Mistakes()
    number_of = {name: k for k, name in enumerate(rows.classes)}
    lost: list[Row] = []
    seen: dict[str, Row] = {}
    found = {}
    for name, entries in rows.of.items():
        files, labels = [], []
        for row in entries:
            try:
                file = _find(folder, row.path + (recipe.table.suffix or ""))
                first = seen.setdefault(file, row)
                if first.label != row.label:
                    raise ValueError(_contradiction(row, first))
            except MissingFile:
                lost.append(row)
            except ValueError as error:
                mistakes.add(row.where, str(error))
            else:
                files.append(file)
                labels.append(row.label)
        given = label_array(labels, number_of, multiple=rows.several)
        found[name] = Split(name, given, FileSource(folder.root, tuple(files), folder.decoding))
    if lost:
        mistakes.add(_lost(lost, sum(map(len, rows.of.values())), folder, recipe))
    mistakes.check()
    splits = with_missing_splits(recipe, rows.classes, found, holdout_test=rows.holdout_test, missing=rows.missing)
    return replace(splits, remarks=tuple(rows.remarks))


def read_rows(recipe: DataConfig) -> Rows:
    """All of a table that is known without looking for an image. Raises DataError."""
    root, files, beside = find_tables(recipe)
    rows, mistakes = Rows(root, _images_folder(recipe, root), several=recipe.labels == "multiple"), Mistakes()
    if beside:
        rows.remarks.append(beside)
    for split, file in files.items():
        table = open_table(file, recipe.table)
        if rows.several and (split != "test" or not rows.columns or not {*rows.columns}.isdisjoint(table.columns)):
            rows.columns = class_columns(table, recipe.table, rows.columns)
        if split == WHOLE:
            _read_whole(table, recipe, rows, mistakes)
        else:
            _read_split(split, table, recipe, rows, mistakes)
    mistakes.check()
    if "train" not in rows.of:
        raise DataError(
            f"{recipe.root}: no row is in split 'train', but in {' and '.join(rows.of) or 'none'}; add rows, or say "
            "which are train: 'data.table.splits={train: ...}'"
        )
    if not rows.holdout_test and "test" not in rows.of:
        source = "row of split 'test'" if WHOLE in files else "file test.csv"
        rows.missing.setdefault("test", f"{recipe.root} has no {source}; add it, or {NO_TEST}")
    if rows.several:
        _join_labels(recipe, rows)
    _name_classes(recipe, rows)
    return rows


def _join_labels(recipe: DataConfig, rows: Rows) -> None:
    """Separate the labels of each cell, and make one row of all that an image has in a split."""
    separator = separator_of([row.label for entries in rows.of.values() for row in entries], recipe.table)
    if rows.columns:
        separator = None
    elif separator and recipe.table.separator is None:
        rows.remarks.append(f"an image's labels are separated by a {separator} (data.table.separator)")
    for split, entries in rows.of.items():
        joined: dict[str, Row] = {}
        for row in entries:
            first = joined.setdefault(row.path, row._replace(label=()))
            joined[row.path] = first._replace(label=separated((*first.labels, *row.labels), separator))
        rows.of[split] = list(joined.values())


def _contradiction(row: Row, first: Row) -> str:
    """The message about two rows of one image."""
    if isinstance(row.label, tuple):
        this, other = (", ".join(each.labels) or "none" for each in (row, first))
        return (
            f"{row.path!r} has the labels {this}, and {other} in {first.line}, which is in another split or has "
            "another path of the same file; remove one of the rows"
        )
    return (
        f"{row.path!r} has the label {row.label!r}, and {first.label!r} in {first.line}; an image has one label: "
        "remove one of the rows, or set data.labels=multiple"
    )


def label_of_cell(cell: Any) -> str:
    """The class that a cell of the label column names. Raises ValueError, with the fix, where it names none."""
    nothing = isinstance(cell, float) and math.isnan(cell)  # as some programs write it to Parquet
    if cell is None or cell == "" or nothing:
        raise ValueError("the label is empty; write its class, or remove the row")
    if isinstance(cell, float) and cell.is_integer():  # a column of whole numbers that once had gaps
        return str(int(cell))
    if not isinstance(cell, str | int):
        raise ValueError(f"label {cell!r} is no class; use text or whole numbers, or choose another data.table.label")
    return str(cell)


def _read_whole(table: Table, recipe: DataConfig, rows: Rows, mistakes: Mistakes) -> None:
    """One table: its splits by a column, or all rows are train."""
    column = find_column("split", table, recipe.table)
    cells = list(_cells(table, recipe, rows, column))
    if column is None:
        _add("train", table, cells, rows, mistakes)
        return
    rows.holdout_test = False
    empty = [number for number, _, _, split in cells if split in (None, "")]
    if empty:
        count = f"{len(empty)} rows have" if len(empty) > 1 else "the row has"
        raise DataError(
            f"{table.where(empty[0])}: {count} no value in the split column {column!r}; write train, val or test, or "
            "set data.table.split=none to have the splits made"
        )
    values = list(dict.fromkeys(str(split) for _, _, _, split in cells))
    of = split_values(values, recipe.table, f"{printable(table.file)}: column {column!r}")
    for split in ("train", "val", "test"):
        if chosen := [cell for cell in cells if of.get(str(cell[3])) == split]:
            _add(split, table, chosen, rows, mistakes)
    if unused := sum(str(split) not in of for _, _, _, split in cells):
        rows.remarks.append(
            f"{printable(table.file)}: rows in none of data.table.splits, which are not read: {unused:,}"
        )


def _read_split(split: str, table: Table, recipe: DataConfig, rows: Rows, mistakes: Mistakes) -> None:
    """A file that is one split."""
    rows.holdout_test = False
    if recipe.table.split not in (None, "none"):
        raise DataError(
            f"data.table.split {recipe.table.split!r}: {printable(table.file)} is split {split!r} as a whole; leave "
            "the key out, or give the file alone: data.root=FILE"
        )
    column = find_column("label", table, recipe.table)
    if split == "test" and column is None and {*rows.columns}.isdisjoint(table.columns):
        rows.missing["test"] = f"{printable(table.file)} has no column of labels; add it, or {NO_TEST}"
        return
    _add(split, table, list(_cells(table, recipe, rows, None)), rows, mistakes)


def _cells(table: Table, recipe: DataConfig, rows: Rows, split: str | None) -> Iterator[tuple[int, Any, Any, Any]]:
    """The number, path, label (several: a list of cells) and split of each row that is not empty."""
    image, label = find_column("image", table, recipe.table), None
    if not rows.columns:
        label = find_column("label", table, recipe.table)
    if image is None or (label is None and not rows.columns):
        raise missing_column("image" if image is None else "label", table)
    if image == label:
        raise DataError(f"{printable(table.file)}: column {image!r} cannot hold paths and labels; set data.table.label")
    names = [*([] if split is None else [split]), image, *(rows.columns or [str(label)])]
    count = 0
    for number, cells in table.rows(names):
        count += 1
        of = None if split is None else cells.pop(0)
        yield number, cells[0], cells[1:] if rows.several else cells[1], of
    if not count:
        raise DataError(f"{printable(table.file)}: has no row below its names of columns; add one for each image")


def _add(split: str, table: Table, cells: Sequence[tuple[int, Any, Any, Any]], rows: Rows, mistakes: Mistakes) -> None:
    if split == "test" and all(_has_nothing(label) for _, _, label, _ in cells):
        rows.missing["test"] = f"{printable(table.file)} has no label for any row of test; add them, or {NO_TEST}"
        return
    entries = rows.of.setdefault(split, [])
    for number, path, cell, _ in cells:
        try:
            label = labels_of_cells(cell, rows.columns) if rows.several else label_of_cell(cell)
            entries.append(Row(table, number, _checked_path(path), label))
        except ValueError as error:
            mistakes.add(table.where(number), str(error))


def _has_nothing(label: Any) -> bool:
    """Whether the cell of a label, or all of several, are empty."""
    return all(map(is_empty, label if isinstance(label, list) else [label]))


def _checked_path(path: Any) -> str:
    if path in (None, ""):
        raise ValueError("the image's path is empty; write it, or remove the row")
    if not isinstance(path, str):
        path = str(path)  # a column of numbers, with data.table.suffix
    if "://" in path and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise ValueError(f"{path!r} is an address; download the images, and write the paths of their files")
    return path


def _name_classes(recipe: DataConfig, rows: Rows) -> None:
    """Find the classes: those that are given, or the labels of train; where they are given, numbers become names."""
    file = rows.folder / "classes.txt"
    given, source = recipe.table.classes, "data.table.classes"
    if given is None and file.is_file():
        lines = (line.strip() for line in read_text(file).splitlines())
        given, source = tuple(line for line in lines if line), printable(file)
        rows.remarks.append(f"classes in the order of {source}")
    labels = {label for entries in rows.of.values() for row in entries for label in row.labels}
    if given is None:
        trained = [label for row in rows.of["train"] for label in row.labels]
        rows.classes = tuple(rows.columns) or class_order(trained)
        if not rows.several and (both := several_in_one(trained)):
            raise DataError(
                f"{recipe.root}: label {both!r} names several classes that other labels name, too; set "
                "data.labels=multiple, or if it is one class name all of them in data.table.classes"
            )
        if not rows.classes:
            raise DataError(f"{recipe.root}: no image of train has a label; fill the column of the labels")
        if len(rows.classes) < 2:
            raise DataError(
                f"{recipe.root}: has one class only, {rows.classes[0]!r}, in all {len(rows.of['train']):,} rows "
                "of train; add images of another one, or choose the column of the labels with data.table.label"
            )
        _check_known(rows, {*rows.classes}, "has no image in train")
        return
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice or not given:
        what = f"class {twice[0]!r} occurs twice" if twice else "names no class"
        raise DataError(f"{source}: {what}; name each class once")
    rows.classes = given
    if not labels <= {*given} and all(re.fullmatch(r"\d{1,9}", label) for label in labels):
        outside = {label for label in labels if int(label) >= len(given)}
        rule = f"is out of range: {source} names {len(given)} classes, with the numbers 0 to {len(given) - 1}"
        _check_known(rows, labels - outside, rule, "name all of them, or fix the label")
        named = {label: given[int(label)] for label in labels}
        rows.of = {split: [_renamed(row, named) for row in entries] for split, entries in rows.of.items()}
    _check_known(rows, {*given}, f"is none of the classes of {source}")


def _renamed(row: Row, named: Mapping[str, str]) -> Row:
    return row._replace(label=tuple(named[k] for k in row.labels) if isinstance(row.label, tuple) else named[row.label])


def _check_known(rows: Rows, known: set[str], rule: str, fix: str = "") -> None:
    """Raise a DataError that names each label that is not known, with its first row."""
    mistakes = Mistakes()
    for split, entries in rows.of.items():
        unknown: dict[str, list[Row]] = {}
        for row in entries:
            for label in set(row.labels) - known:
                unknown.setdefault(label, []).append(row)
        for label, some in unknown.items():
            more = f", as in {len(some) - 1} more rows of {split}" if len(some) > 1 else ""
            hint = fix or nearest(label, known)
            if not fix and not hint.startswith("did you mean"):
                hint = "remove its rows, or add it"
            mistakes.add(some[0].where, f"label {label!r} {rule}{more}; {hint}")
    mistakes.check()


def _images_folder(recipe: DataConfig, folder: Path) -> Path:
    images = folder / Path(recipe.table.images or "").expanduser()
    if not images.is_dir():
        near = nearest(recipe.table.images or "", subfolders(folder))
        raise DataError(f"data.table.images {recipe.table.images!r}: {printable(images)} is not a folder; {near}")
    return images


def _find(folder: Folder, path: str) -> str:
    """An image's path relative to the folder. Raises ValueError; MissingFile where there is no such file."""
    if not path.startswith("/"):
        return folder.find(path)
    if not Path(path).is_relative_to(folder.root):
        raise ValueError(
            f"{path!r} is not below {printable(folder.root)}; data.table.images=/ reads absolute paths as they are"
        )
    return folder.find(Path(path).relative_to(folder.root).as_posix())


def _lost(lost: Sequence[Row], every: int, folder: Folder, recipe: DataConfig) -> str:
    """The message about images that do not exist."""
    named = ", ".join(f"{row.path!r} ({row.line})" for row in lost[:SHOWN]) + (", ..." if len(lost) > SHOWN else "")
    fix = _where_else(lost[0].path, folder, recipe) or "restore them, remove their rows, or set data.table.images"
    places = " or ".join(dict.fromkeys(printable(folder.root / start) for start in folder.below))
    return (
        f"{printable(lost[0].table.file)}: {len(lost):,} of {every:,} images do not exist in {places}: {named}; {fix}"
    )


def _where_else(path: str, folder: Folder, recipe: DataConfig) -> str:
    """The key with which an image that was not found would be, or ""."""
    name = Path(path.replace("\\", "/"))
    for start in folder.below:
        for extension in sorted(image_extensions()) if recipe.table.suffix is None else ():
            if (folder.root / start / f"{name}{extension}").is_file():
                return f"data.table.suffix={extension} finds {name}{extension}"
    for inner in subfolders(folder.root) if folder.root != Path("/") else ():
        if (folder.root / inner / f"{name}{recipe.table.suffix or ''}").is_file():
            images = os.path.join(recipe.table.images or "", inner)
            return f"data.table.images={images} finds {name}"
    return ""
