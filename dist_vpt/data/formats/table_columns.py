"""Which columns of a table hold the paths, the labels and the splits, and which files of a folder are its splits."""

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from dist_vpt.data.config import DataConfig
from dist_vpt.data.config_table import TableConfig
from dist_vpt.data.formats.files import is_hidden, open_root
from dist_vpt.data.formats.image_folder import SPLIT_NAMES, split_of
from dist_vpt.data.formats.table_files import FOUND_IN_FOLDERS, Table
from dist_vpt.data.images import image_extensions
from dist_vpt.errors import DataError, nearest
from dist_vpt.files import printable

Role = Literal["image", "label", "split"]
WHOLE = ""  # the table of a dataset that is one file

# Usual names by role, without their blanks, signs and capitals; those of the second row where there is none of the
# first.
USUAL: dict[Role, tuple[str, ...]] = {
    "image": (
        "image imagepath imagefile imagefilename imagename imageindex img imgpath imgfile imgname path paths filepath "
        "file filename filenames relativepath relpath picture photo fname images",
        "id imageid imgid name",
    ),
    "label": (
        "label labels class classes classname classlabel labelname category categories categoryname target targets "
        "tag tags y species",
        "classid classindex classidx labelid labelindex labelidx categoryid targetid",
    ),
    "split": ("split splits set subset partition phase usage datasplit splitname", "fold"),
}
WHAT: dict[Role, str] = {"image": "the images' paths", "label": "the labels", "split": "the splits"}


def find_column(role: Role, table: Table, settings: TableConfig) -> str | None:
    """The column of a role: the one that the recipe names, or the only one with a usual name; None: there is none.

    Raises DataError for one that does not exist, and for several that could be meant.
    """
    asked: str | None = getattr(settings, role)
    if role == "split" and asked == "none":
        return None
    found = _alike(asked, table.columns) if asked is not None else _usual(role, table.columns)
    if asked is not None and not found:
        raise DataError(
            f"data.table.{role} {asked!r}: {printable(table.file)} has no such column; {nearest(asked, table.columns)}"
        )
    if len(found) > 1:
        fix = f"choose one: data.table.{role}={found[0]}"
        if len(set(found)) < len(found):
            fix = "rename all but one in the table"
        raise DataError(
            f"{printable(table.file)}: {len(found)} columns could hold {WHAT[role]}: {', '.join(found)}; {fix}"
        )
    return found[0] if found else None


def missing_column(role: Role, table: Table) -> DataError:
    """The error for a table without a column of a role."""
    file = printable(table.file)
    first = [cell for cell in table.columns if os.path.splitext(cell)[1].lower() in image_extensions()]
    if first:
        return DataError(
            f"{file}: its first line has no names of columns but {first[0]!r}; add a line above it, such as image,label"
        )
    if len(table.columns) == 1:
        return DataError(
            f"{file}: has one column only, {table.columns[0]!r}; separate paths and labels by commas (or semicolons, "
            "tabs, |), or set data.table.delimiter"
        )
    listed = ", ".join(map(repr, table.columns))
    each = " (or data.labels=multiple, where each class has a column of 0 and 1)" if role == "label" else ""
    return DataError(
        f"{file}: none of its columns {listed} has a usual name of {WHAT[role]}; set data.table.{role}{each}"
    )


def find_tables(recipe: DataConfig) -> tuple[Path, dict[str, Path], str]:
    """The table's folder, its file or one for each split, and a line about tables that are not read, or "".

    Raises DataError where there is none, or where several could be meant.
    """
    assert recipe.root is not None  # DataConfig requires it
    file = Path(recipe.root).expanduser().absolute()
    if file.is_file():
        return file.parent, {WHOLE: file}, ""
    if not file.exists() and file.parent.is_dir():
        near = get_close_matches(file.name, [path.name for path in file.parent.iterdir()], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "give the table's file or its folder"
        raise DataError(f"data.root {recipe.root!r}: {printable(file)} does not exist; {hint}")
    root = open_root(recipe)
    names = _tables_in(root)
    chosen = _named_files(root, named_splits(recipe.table)) or _files_by_name(root, names)
    if not chosen:
        if len(names) != 1:
            there = f"{len(names)} tables ({', '.join(names)})" if names else "no table (.csv, .tsv, .parquet)"
            raise DataError(f"data.root {recipe.root!r}: the folder holds {there}; give the file, data.root=FILE")
        chosen = {WHOLE: names[0]}
    beside = [name for name in names if name not in chosen.values()]
    line = f"{printable(root)}: tables that are not read: {', '.join(beside)}" if beside else ""
    return root, {split: root / name for split, name in chosen.items()}, line


def named_splits(settings: TableConfig) -> dict[str, str]:
    """split -> what the recipe calls it."""
    return {str(split): name for split, name in settings.splits.items()}


def split_values(values: Sequence[str], settings: TableConfig, where: str) -> dict[str, str]:
    """value -> split, of the values of a split column that are used. Raises DataError where that is not clear."""
    if chosen := named_splits(settings):
        for split, value in chosen.items():
            if value not in values:
                raise DataError(
                    f"data.table.splits.{split} {value!r}: {where} has no such value; {nearest(value, values)}"
                )
        return {value: split for split, value in chosen.items()}
    of = {value: split_of(value) for value in values}
    for split in SPLIT_NAMES:
        alike = [value for value in values if of[value] == split]
        if len({value.casefold() for value in alike}) > 1:
            raise DataError(
                f"{where}: {' and '.join(map(repr, alike))} could both be the split {split!r}; choose one: "
                f"'data.table.splits={{{split}: ...}}'"
            )
    unknown = [value for value in values if of[value] is None]
    if unknown:
        listed = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError(
            f"{where}: {listed} {'is no split' if len(unknown) == 1 else 'are no splits'}; name those to use: "
            "'data.table.splits={train: ..., val: ..., test: ...}', or set data.table.split=none"
        )
    return {value: split for value, split in of.items() if split is not None}


def _alike(asked: str, columns: Sequence[str]) -> list[str]:
    """The columns of a name, else those that differ from it in case or blanks alone."""
    exact = [name for name in columns if name == asked]
    return exact or [name for name in columns if name.strip().casefold() == asked.strip().casefold()]


def _usual(role: Role, columns: Sequence[str]) -> list[str]:
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in columns]
    ranks = ([name for name, key in zip(columns, plain, strict=True) if key in usual.split()] for usual in USUAL[role])
    return next((found for found in ranks if found), [])


def _tables_in(folder: Path) -> list[str]:
    names = (entry.name for entry in os.scandir(folder) if not is_hidden(entry.name) and entry.is_file())
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in FOUND_IN_FOLDERS)


def _named_files(root: Path, splits: Mapping[str, str]) -> dict[str, str]:
    """The files that data.table.splits names, or none where it names values of a column."""
    there = {split: name for split, name in splits.items() if (root / name).is_file()}
    gone = [split for split in splits if split not in there]
    if there and gone:
        raise DataError(f"data.table.splits.{gone[0]} {splits[gone[0]]!r}: there is no such file in {printable(root)}")
    if there and "train" not in there:
        raise DataError("data.table.splits: has no train; name the file to train on: 'data.table.splits={train: ...}'")
    return there


def _files_by_name(root: Path, names: Sequence[str]) -> dict[str, str]:
    """The files that are called like splits: train.csv, or train_labels.csv."""

    def meant(name: str) -> str | None:
        stem = os.path.splitext(name)[0].lower()
        words = {split_of(word) for word in re.split(r"[^a-z]+", stem)} - {None}
        return split_of(stem) or (words.pop() if len(words) == 1 else None)

    found = {split: [name for name in names if meant(name) == split] for split in SPLIT_NAMES}
    found = {split: some for split, some in found.items() if some}
    for split, some in found.items():
        if len(some) > 1:
            raise DataError(
                f"{printable(root)}: {' and '.join(some)} could both be the split {split!r}; choose the files: "
                f"'data.table.splits={{{split}: ...}}'"
            )
    if found and "train" not in found:
        there = ", ".join(name for some in found.values() for name in some)
        raise DataError(
            f"{printable(root)}: has {there} but no train.csv; add it, or name the files: "
            "'data.table.splits={train: ...}'"
        )
    return {split: name for split, (name,) in found.items()}
