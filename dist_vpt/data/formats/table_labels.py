"""The labels of a table's rows where images have several: a separator in one column, a row for each label, or a column
of 0 and 1 for each class.

n images, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dist_vpt.data.config_table import TableConfig
from dist_vpt.data.formats.table_columns import find_column
from dist_vpt.data.formats.table_files import Table
from dist_vpt.errors import DataError, nearest
from dist_vpt.files import printable

Label = str | tuple[str, ...]  # a class, or all classes of an image
SEPARATORS = {"semicolon": ";", "pipe": "|", "comma": ",", "space": " "}
FOUND = ("semicolon", "pipe")  # separators that are seen without being named; names of classes have commas and spaces
YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false")


def class_columns(table: Table, settings: TableConfig, before: Sequence[str]) -> list[str]:
    """The columns of 0 and 1: those that the recipe names, or all but image and split where no column has labels.

    None where one column has the labels. ``before``: those of an earlier file, which this one must have, too. Raises
    DataError.
    """
    if lacks := [name for name in before if name not in table.columns]:
        raise DataError(f"{printable(table.file)}: has no column {lacks[0]!r}, as the split before it; add it")
    if before:
        return list(before)
    if settings.labels is None and find_column("label", table, settings) is not None:
        return []
    others = {find_column(role, table, settings) for role in ("image", "split")}  # type: ignore[arg-type]
    asked = [name for name in table.columns if name not in others] if settings.labels is None else settings.labels
    for name in asked:
        if name not in table.columns:
            raise DataError(
                f"data.table.labels {name!r}: {printable(table.file)} has no such column; "
                f"{nearest(name, table.columns)}"
            )
    if len(asked) < 2:
        raise DataError(
            f"{printable(table.file)}: has neither a column of labels nor columns of 0 and 1 for two classes or more; "
            "set data.table.label or data.table.labels"
        )
    return list(asked)


def labels_of_cells(cells: Sequence[Any], columns: Sequence[str]) -> tuple[str, ...]:
    """The classes of one row: those whose column has 1, or the text of the label column, which may be none.

    Raises ValueError, with the fix, for other cells.
    """
    if not columns:
        return _texts(cells[0])
    return tuple(name for name, cell in zip(columns, cells, strict=True) if _is_yes(cell, name))


def is_empty(cell: Any) -> bool:
    """Whether a cell has nothing, as a text has it or Parquet."""
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def _texts(cell: Any) -> tuple[str, ...]:
    if is_empty(cell):
        return ()
    if isinstance(cell, list):
        return tuple(text for each in cell for text in _texts(each))
    if isinstance(cell, float) and cell.is_integer():
        return (str(int(cell)),)
    if not isinstance(cell, str | int):
        raise ValueError(f"label {cell!r} is no class; use text or whole numbers, or choose another data.table.label")
    return (str(cell),)


def _is_yes(cell: Any, name: str) -> bool:
    text = "" if is_empty(cell) else str(cell).lower()
    if text not in (*YES, *NO):
        found = f"has {cell!r}" if text else "is empty"
        raise ValueError(
            f"column {name!r} {found}; write 1 or 0 for each class, or name the columns of classes: "
            "'data.table.labels=[...]'"
        )
    return text in YES


def separator_of(labels: Sequence[Label], settings: TableConfig) -> str | None:
    """The name of what separates the labels in a cell: the recipe's, else one that is found; None: nothing does."""
    if settings.separator is not None:
        return settings.separator
    texts = [text for label in labels for text in (label if isinstance(label, tuple) else (label,))]
    return next((name for name in FOUND if any(SEPARATORS[name] in text for text in texts)), None)


def separated(label: tuple[str, ...], separator: str | None) -> tuple[str, ...]:
    """The labels of an image, each once, in order."""
    parts = [part.strip() for text in label for part in (text.split(SEPARATORS[separator]) if separator else [text])]
    return tuple(sorted({part for part in parts if part}))


def several_in_one(labels: Sequence[str]) -> str:
    """A label that names several classes which other labels name, too; "" where there is none."""
    name = separator_of(labels, TableConfig())
    if name is None:
        return ""
    parts = {label: separated((label,), name) for label in dict.fromkeys(labels)}
    for label, own in parts.items():
        elsewhere = {part for other, some in parts.items() if other != label for part in some}
        if len(own) > 1 and elsewhere.issuperset(own):
            return label
    return ""


def label_array(labels: Sequence[Label], number_of: Mapping[str, int], *, multiple: bool) -> np.ndarray:
    """int64 [n], or uint8 [n, K] where images have several labels."""
    if not multiple:
        return np.array([number_of[label] for label in labels if isinstance(label, str)], np.int64)
    array_nK = np.zeros((len(labels), len(number_of)), np.uint8)
    for i, label in enumerate(labels):
        array_nK[i, [number_of[name] for name in label]] = 1
    return array_nK
