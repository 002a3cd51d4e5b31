"""Results side by side: a row for each method, a column for each task, and notes on what makes numbers differ.

Data only: tables.py, markdown.py, csv.py and html.py render it.
"""

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from dist_vpt.data.tasks import TASKS
from dist_vpt.report.local import ABSENT, LocalResult, extra_results, local_rows, newest, notes
from dist_vpt.report.published import Published

LOCAL = "local"  # source of the rows of the user's runs
OTHER = "Other tasks"
SECTIONS = {"VTAB-1k": ("natural", "specialized", "structured"), "FGVC": ("fgvc",)}


@dataclass(frozen=True)
class Column:
    """A task, or a mean: of each part's tasks, then of the parts."""

    label: str
    group: str  # heading above it
    task: str = ""
    parts: tuple[tuple[str, ...], ...] = ()
    mean: str = ""  # its key among published means: a group, or "mean" of the groups

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the column shows."""
        return (self.task,) if self.task else tuple(chain.from_iterable(self.parts))


@dataclass
class Cell:
    """A number, or a text in its place."""

    mean: float | None = None  # percent
    std: float | None = None  # over seeds; none: one seed, a mean over tasks, or a published number
    instead: str = ABSENT  # "failed", or how many tasks of a mean have results
    notes: list[str] = field(default_factory=list)
    marks: str = ""  # of these notes
    best: bool = False  # among the rows of local results

    @property
    def number(self) -> str:
        """The mean to one decimal, or the text in its place."""
        return self.instead if self.mean is None else f"{self.mean:.1f}"

    @property
    def spread(self) -> str:
        """Standard deviation to one decimal; empty where there is none."""
        return "" if self.std is None else f"{self.std:.1f}"


@dataclass
class ResultRow:
    """One method under one protocol, or a published row."""

    method: str
    backbone: str
    source: str  # LOCAL, or a short citation
    detail: str = ""  # distinguishes rows of the same method and backbone
    notes: list[str] = field(default_factory=list)  # that hold for all of its cells
    marks: str = ""
    local: dict[str, LocalResult] = field(default_factory=dict)  # by task
    published: Published | None = None
    cells: list[Cell] = field(default_factory=list)  # one for each column

    @property
    def name(self) -> str:
        """The method, with what distinguishes it from other rows."""
        return f"{self.method} ({self.detail})" if self.detail else self.method

    @property
    def means(self) -> dict[str, float]:
        """Top-1 accuracy by task, in percent; mAP of a task with several labels an image."""
        if self.published:
            return self.published.top1
        return {task: local.result.main.mean for task, local in self.local.items() if local.result.scored}

    @property
    def seeds(self) -> str:
        """Number of seeds behind each number, such as 5, or 3 to 5."""
        counts = sorted({len(local.result.main.values) for local in self.local.values() if local.result.scored})
        return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else "".join(map(str, counts)) or ABSENT


@dataclass
class Table:
    """Rows over the same columns."""

    title: str
    columns: list[Column]
    rows: list[ResultRow]
    remarks: list[str]  # on tasks that failed and results that are not shown
    notes: dict[str, str] = field(default_factory=dict)  # note -> its mark

    def common(self) -> list[str]:
        """Tasks for which all local rows with any number have one, in the order of the columns."""
        local = [row.means for row in self.rows if row.local and row.means]
        tasks = [column.task for column in self.columns if column.task]
        return [task for task in tasks if local and all(task in means for means in local)]


def compare(results: Sequence[LocalResult], published: Sequence[Published]) -> list[Table]:
    """A table for VTAB-1k, FGVC and other tasks, each if it has results; extra tests are among the other tasks.

    Published rows are those of the table's methods; one of group means alone appears if a local row has one of these
    means. A local row has one protocol: results under another protocol
    fill tasks that the row lacks, with a note, or else get a row for themselves.
    """
    tables, results = [], [*results, *chain.from_iterable(map(extra_results, results))]
    for title in (*SECTIONS, OTHER):
        here = [local for local in results if _section(local.result.task) == title]
        if here:
            tables.append(_table(title, _columns(title, here), here, published))
    return tables


def _section(task: str) -> str:
    group = TASKS[task].group if task in TASKS else None
    return next((title for title, groups in SECTIONS.items() if group in groups), OTHER)


def _columns(title: str, results: Sequence[LocalResult]) -> list[Column]:
    if title == OTHER:
        several = {each.result.task for each in results if each.result.scored and each.result.metric == "mAP"}
        found = dict.fromkeys(local.result.task for local in results)
        return [Column(f"{task} (mAP)" if task in several else task, OTHER, task) for task in found]
    columns, parts = [], []
    for group in SECTIONS[title]:
        tasks = tuple(task.name for task in TASKS.values() if task.group == group)
        heading = title if len(SECTIONS[title]) == 1 else group.capitalize()
        columns += [Column(task, heading, task) for task in tasks]
        label = f"mean of {len(tasks)}" + (f" {group}" if heading != title else "")
        columns.append(Column(label, heading, parts=(tasks,), mean=group))
        parts.append(tasks)
    if len(parts) > 1:
        together = tuple(chain.from_iterable(parts))
        columns.append(Column(f"mean of {len(parts)} groups", "All", parts=tuple(parts), mean="mean"))
        columns.append(Column(f"mean of {len(together)}", "All", parts=(together,)))
    return columns


def _table(title: str, columns: list[Column], results: Sequence[LocalResult], published: Sequence[Published]) -> Table:
    shown, remarks = newest(results)
    own, rows = [_local_row(detail, row) for detail, row in local_rows(shown)], []
    for row in own:
        row.cells = _cells(columns, row)
        _lift(row)
    tasks = {column.task for column in columns if column.task}
    means = {
        column.mean for row in own for column, cell in zip(columns, row.cells, strict=True) if cell.mean is not None
    }
    for method in dict.fromkeys(row.method for row in own):
        rows += [row for row in own if row.method == method]
        for paper in published:
            if paper.method == method and (tasks >= paper.top1.keys() if paper.top1 else means & paper.groups.keys()):
                rows.append(_published_row(paper, columns))
    for row in own:
        for column, cell in zip(columns, row.cells, strict=True):
            if cell.instead == "failed" and column.task:
                reason = row.local[column.task].result.failed or "no test score"
                remarks.append(f"{column.task}, {row.name}: failed: {' '.join(reason.split())}")
    _mark_best([row.cells for row in own])
    table = Table(title, columns, rows, remarks)
    for row in rows:
        row.marks = _marks(row.notes, table.notes)
        for cell in row.cells:
            cell.marks = _marks(cell.notes, table.notes)
    return table


def _marks(notes: Sequence[str], known: dict[str, str]) -> str:
    marks = {known.setdefault(note, _letters(len(known))) for note in notes}
    return ",".join(sorted(marks, key=lambda mark: (len(mark), mark)))


def _local_row(detail: str, results: Sequence[LocalResult]) -> ResultRow:
    first = results[0].result
    return ResultRow(first.method, first.backbone, LOCAL, detail, local={each.result.task: each for each in results})


def _published_row(row: Published, columns: Sequence[Column]) -> ResultRow:
    source = row.label if row.verified else f"{row.label}, unverified"
    detail = row.name if row.name != row.method else ""
    shown = ResultRow(row.method, row.backbone, source, detail, row.notes, published=row)
    shown.cells = _cells(columns, shown)
    return shown


def _cells(columns: Sequence[Column], row: ResultRow) -> list[Cell]:
    return [_mean(column, row) if column.parts else _cell(column.task, row) for column in columns]


def _cell(task: str, row: ResultRow) -> Cell:
    if row.published:
        return Cell(row.published.top1.get(task))
    if task not in row.local:
        return Cell()
    local = row.local[task]
    if not local.result.scored:
        return Cell(instead="failed")
    main = local.result.main
    std = main.std if len(main.values) > 1 else None
    return Cell(main.mean, std, notes=notes(local, next(iter(row.local.values()))))


def _mean(column: Column, row: ResultRow) -> Cell:
    """The mean if all of its tasks have results, else the number of those that have; a published mean as it is."""
    known = row.means
    if row.published and not known:
        return Cell(row.published.groups.get(column.mean))
    there = [task for task in column.tasks if task in known]
    if len(there) < len(column.tasks):
        return Cell(instead=f"{len(there)}/{len(column.tasks)}")
    means = [sum(known[task] for task in part) / len(part) for part in column.parts]
    found = [] if row.published else [note for task in column.tasks for note in _cell(task, row).notes]
    return Cell(sum(means) / len(means), notes=list(dict.fromkeys(found)))


def _lift(row: ResultRow) -> None:
    """Move notes that all numbers of a row share to the row."""
    numbers = [cell for cell in row.cells if cell.mean is not None]
    row.notes = [note for note in (numbers[0].notes if numbers else []) if all(note in cell.notes for cell in numbers)]
    for cell in numbers:
        cell.notes = [note for note in cell.notes if note not in row.notes]


def _mark_best(rows: Iterable[Sequence[Cell]]) -> None:
    """Mark the best of each column, compared to one decimal; a single number is not marked."""
    for cells in zip(*rows, strict=True):
        numbers = [cell for cell in cells if cell.mean is not None]
        best = max((float(cell.number) for cell in numbers), default=0.0)
        for cell in numbers:
            cell.best = len(numbers) > 1 and float(cell.number) == best


def _letters(number: int) -> str:
    """a to z, then aa, ab, ..."""
    letters = string.ascii_lowercase
    return letters[number] if number < 26 else _letters(number // 26 - 1) + letters[number % 26]
