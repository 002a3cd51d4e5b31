"""``dist-vpt report``: results next to published numbers, on the terminal and as Markdown, CSV and one HTML page."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from dist_vpt.errors import UserError
from dist_vpt.report.comparison import Cell, ResultRow, Table, compare
from dist_vpt.report.csv import csv_text
from dist_vpt.report.legend import LEGEND, MISSING
from dist_vpt.report.local import LocalResult
from dist_vpt.report.markdown import markdown
from dist_vpt.report.published import published
from dist_vpt.runs.results import FILE, identity, read


def report(folders: Sequence[str], out: str | None = None, *, with_published: bool = True) -> list[Table]:
    """Show the tables of all results in and below folders; with ``out``, write report.md, .csv and .html there.

    Unreadable lines are reported on stderr. Raises UserError for a folder without results.
    """
    results, warnings = gather(folders)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    rows = published() if with_published else []
    tables = compare(results, rows)
    show(tables, Console())
    if out is not None:
        from dist_vpt.files import write_atomically  # loads torch

        folder = Path(out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for ending, text in forms(tables, results, warnings).items():
                write_atomically(folder / f"report.{ending}", text)
                print(folder / f"report.{ending}")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
    return tables


def forms(tables: Sequence[Table], results: Sequence[LocalResult], warnings: Sequence[str]) -> dict[str, str]:
    """The written reports by file extension."""
    from dist_vpt.report.html import html  # loads Matplotlib

    return {
        "md": markdown(tables, warnings),
        "csv": csv_text(tables),
        "html": html(tables, results, warnings),
    }


def gather(folders: Sequence[str]) -> tuple[list[LocalResult], list[str]]:
    """Results of all files in and below folders, the newest of each recipe, and warnings about unreadable lines.

    Raises UserError where a folder has none, for all such folders at once.
    """
    files: dict[Path, Path] = {}
    mistakes = []
    for folder in map(Path, folders):
        found = [folder] if folder.is_file() else sorted(folder.rglob(FILE))
        if not folder.exists():
            mistakes.append(f"{folder}: there is no such folder; use one with a {FILE} in it or below it")
        elif not found:
            mistakes.append(f"{folder}: no {FILE} in it or below it; use the folder of a suite")
        for file in found:
            files.setdefault(file.resolve(), file)
    if mistakes:
        raise UserError("\n  ".join(mistakes))
    newest: dict[tuple[str, ...], LocalResult] = {}
    warnings = []
    for file in files.values():
        results, wrong = read(file)
        warnings += wrong
        for result in results:
            key = identity(result)
            if key not in newest or newest[key].result.finished <= result.finished:
                newest[key] = LocalResult(str(file.parent), result)
                if len(key) > 4:
                    newest.pop(key[:4], None)  # a failure, which has no storage
    if not newest:
        raise UserError(
            "\n  ".join([f"{', '.join(folders)}: no results yet; wait for the first task of the suite", *warnings])
        )
    return list(newest.values()), warnings


def show(tables: Sequence[Table], console: Console) -> None:
    """Print tables with tasks in rows, since a terminal is narrow; as many methods side by side as fit."""
    print_line = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    for table in tables:
        texts = [[_plain(cell) for cell in row.cells] for row in table.rows]
        labels = [column.label for column in table.columns]
        width = max(12, *(len(text) for column in texts for text in column))
        block = max(1, (console.width - max(map(len, labels)) - 4) // (width + 3))
        for start in range(0, len(table.rows), block):
            shown = RichTable(title=f"{table.title}: test top-1, %")
            shown.add_column("task", no_wrap=True)
            rows = table.rows[start : start + block]
            for row in rows:
                heading = Text(row.name + (f" {row.marks}" if row.marks else ""))
                shown.add_column(heading, justify="right", width=width, overflow="fold")
            shown.add_row("from", *(Text(row.source) for row in rows))
            shown.add_row("backbone", *(Text(row.backbone) for row in rows))
            shown.add_row("seeds", *(row.seeds for row in rows), end_section=True)
            for index, column in enumerate(table.columns):
                last = table.columns[index + 1 : index + 2]
                ends = bool(last) and last[0].group != column.group
                cells = [
                    Text(texts[at][index], "bold" if row.cells[index].best else "") for at, row in _at(rows, start)
                ]
                shown.add_row(Text(labels[index]), *cells, end_section=ends)
            console.print(shown)
        for note, mark in table.notes.items():
            print_line(f"{mark}  {note}")
        for remark in table.remarks:
            print_line(remark)
    print_line(f"{LEGEND} {MISSING}")


def _at(rows: Sequence[ResultRow], start: int) -> list[tuple[int, ResultRow]]:
    return list(enumerate(rows, start=start))


def _plain(cell: Cell) -> str:
    return cell.number + (f" ± {cell.spread}" if cell.spread else "") + (f" {cell.marks}" if cell.marks else "")
