"""Figures of the report: SVG for an HTML page, in the page's colors."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dist_vpt.report.comparison import ResultRow, Table

INK = "#123456"  # drawn elements of this color get the page's text color
COLORS = ("#3b82c4", "#e0782f", "#2fa36b", "#b35fc0", "#c9a227", "#d9534f", "#17a2b8", "#8d6e63")  # light and dark
LOCAL_MARKERS, PUBLISHED_MARKERS = "oPXd*h", "^s<>vp"
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a method's name is not a formula
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#88888855",
}


@dataclass(frozen=True)
class Picture:
    """One figure."""

    title: str
    text: str  # alternative text
    svg: str
    wide: bool = False


@dataclass(frozen=True)
class _Series:
    row: ResultRow
    label: str
    style: dict[str, Any]  # of matplotlib's plot and errorbar


def figures(table: Table, name: str) -> list[Picture]:
    """All figures for which there are numbers. ``name`` keeps their ids apart from those of other tables."""
    import matplotlib

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        return _figures(table, name)


def _figures(table: Table, name: str) -> list[Picture]:
    drawn = _series([row for row in table.rows if row.local or row.means])  # others have means alone
    local = [series for series in drawn if series.row.local]
    tasks = [c.task for c in table.columns if c.task and any(c.task in series.row.means for series in local)]
    common = table.common()
    pictures = []
    if tasks:
        pictures.append(_per_task(tasks, drawn, f"{name}-tasks"))
    if common:
        pictures += _costs(common, drawn, name, _which(common, [c.task for c in table.columns if c.task]))
    repeated = [t for t in tasks if any(len(_values(series.row, t)) > 1 for series in local)]
    if repeated:
        pictures.append(_spreads(repeated, local, f"{name}-seeds"))
    return pictures


def _which(common: Sequence[str], every: Sequence[str]) -> str:
    """A short text about the tasks of a mean."""
    absent = [task for task in every if task not in common]
    if not absent:
        return f"all {len(every)} tasks" if len(every) > 1 else every[0]
    named = f"without {', '.join(absent)}" if len(absent) < len(common) else ", ".join(common)
    return f"the {len(common)} of {len(every)} tasks that all local rows have ({named})"


def _series(rows: Sequence[ResultRow]) -> list[_Series]:
    """A color for each method, a marker for each source; local numbers filled, published ones hollow."""
    methods = list(dict.fromkeys(row.method for row in rows))
    sources = list(dict.fromkeys(row.source for row in rows if row.published))
    backbones = len({row.backbone for row in rows if row.local}) > 1
    seen: dict[str, int] = {}
    series = []
    for row in rows:
        color = COLORS[methods.index(row.method) % len(COLORS)]
        if row.published:
            marker = PUBLISHED_MARKERS[sources.index(row.source) % len(PUBLISHED_MARKERS)]
            style = {"marker": marker, "color": color, "markerfacecolor": "none", "markersize": 5}
        else:
            marker = LOCAL_MARKERS[seen.setdefault(row.method, 0) % len(LOCAL_MARKERS)]
            seen[row.method] += 1
            style = {"marker": marker, "color": color, "markersize": 6}
        label = f"{row.name}, {row.source}" + (f", {row.backbone}" if row.local and backbones else "")
        series.append(_Series(row, label, style | {"linestyle": "none"}))
    return series


def _per_task(tasks: Sequence[str], drawn: Sequence[_Series], name: str) -> Picture:
    figure, axes = _axes(len(tasks), len(drawn))
    for at, series in enumerate(drawn):
        there = [(index, task) for index, task in enumerate(tasks) if task in series.row.means]
        x = [index + _beside(at, len(drawn)) for index, _ in there]
        errors = [_std(series.row, task) for _, task in there]
        y = [series.row.means[task] for _, task in there]
        axes.errorbar(x, y, yerr=errors if series.row.local else None, elinewidth=1, label=series.label, **series.style)
    _name_tasks(axes, tasks)
    axes.set_ylabel(f"test {_score_name(drawn, tasks)}, %")
    title = "Accuracy per task"
    text = "Local rows are filled, with the standard deviation over seeds; published rows are hollow."
    return Picture(title, text, _svg(figure, name, f"{title}. {text}"), wide=True)


def _spreads(tasks: Sequence[str], local: Sequence[_Series], name: str) -> Picture:
    figure, axes = _axes(len(tasks), len(local))
    for at, series in enumerate(local):
        points = [
            (index + _beside(at, len(local)), value - series.row.means[task])
            for index, task in enumerate(tasks)
            for value in _values(series.row, task)
            if len(_values(series.row, task)) > 1
        ]
        axes.plot(
            *zip(*points, strict=True) if points else ([], []), label=series.label, **series.style | {"markersize": 4}
        )
    _name_tasks(axes, tasks)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_ylabel(f"{_score_name(local, tasks)} less its mean, points")
    title = "Spread over seeds"
    text = "Each seed's test accuracy less the mean of the task's seeds, local rows."
    return Picture(title, text, _svg(figure, name, f"{title}. {text}"), wide=True)


def _costs(tasks: Sequence[str], drawn: Sequence[_Series], name: str, which: str) -> list[Picture]:
    """Mean accuracy against three costs. A row that lacks a task or a cost is left out; one row makes no figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    devices = sorted(
        {local.result.device for series in drawn for local in series.row.local.values() if local.result.device}
    )
    on = f" On {'; '.join(devices)}." if devices else ""
    pictures = []
    for key, title, label, cost, more in (
        ("parameters", "Accuracy against trained parameters", "trained parameters, mean of the tasks", _trained,
         " Published counts leave the head out."),
        ("seconds", "Accuracy against training time", "seconds of training a task, all trials and seeds", _seconds, on),
        ("memory", "Accuracy against peak memory", "peak memory, MiB, largest of the tasks", _memory, on),
    ):  # fmt: skip
        points = [
            (series, amount, sum(series.row.means[task] for task in tasks) / len(tasks))
            for series in drawn
            if all(task in series.row.means for task in tasks) and (amount := cost(series.row, tasks))
        ]
        if len(points) < 2:
            continue
        figure = Figure(figsize=(4.6, 3.4 + 0.2 * len(points)), layout="constrained")
        axes = figure.subplots()
        for series, amount, mean in points:
            axes.plot([amount], [mean], label=series.label, **series.style)
        amounts = [amount for _, amount, _ in points]
        if key == "parameters" or max(amounts) > 10 * min(amounts):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(0.12)
        of = f"{len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}"
        axes.set(xlabel=label, ylabel=f"mean {_score_name(drawn, tasks)} of {of}, %")
        figure.legend(loc="outside lower left", frameon=False)
        text = f"Mean over {which}.{more}"
        pictures.append(Picture(title, text, _svg(figure, f"{name}-{key}", f"{title}. {text}")))
    return pictures


def _trained(row: ResultRow, tasks: Sequence[str]) -> float:
    if row.published:
        return row.published.trained or 0.0
    counts = [parameters.trained for task in tasks if (parameters := row.local[task].result.parameters)]
    return sum(counts) / len(counts) if len(counts) == len(tasks) else 0.0


def _seconds(row: ResultRow, tasks: Sequence[str]) -> float:
    return _measured(row, tasks, lambda found: sum(found) / len(found), "seconds")


def _memory(row: ResultRow, tasks: Sequence[str]) -> float:
    return _measured(row, tasks, max, "peak_memory_mib")


def _measured(row: ResultRow, tasks: Sequence[str], of: Callable[[list[float]], float], name: str) -> float:
    """The measurement over all tasks; zero if one was not measured."""
    found = [getattr(row.local[task].result, name) for task in tasks] if row.local else []
    return of(found) if found and all(found) else 0.0


def _score_name(drawn: Sequence[_Series], tasks: Sequence[str]) -> str:
    """What the numbers of these tasks are."""
    local = [series.row.local[task].result for series in drawn for task in tasks if task in series.row.local]
    found = {result.metric for result in local if result.scored}
    return " or ".join({"top1": "top-1"}.get(name, name) for name in sorted(found, reverse=True)) or "top-1"


def _values(row: ResultRow, task: str) -> Sequence[float]:
    local = row.local.get(task)
    return local.result.main.values if local and local.result.scored else ()


def _std(row: ResultRow, task: str) -> float:
    return row.local[task].result.main.std if row.local else 0.0


def _axes(tasks: int, rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 1.2 + 0.55 * tasks), 4 + 0.2 * -(-rows // 3)), layout="constrained")
    return figure, figure.subplots()


def _beside(at: int, number: int) -> float:
    """The offset of a row's points from their task's position."""
    return 0.7 * ((at + 0.5) / number - 0.5)


def _name_tasks(axes: Any, tasks: Sequence[str]) -> None:
    axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(tasks) - 0.4)
    axes.grid(visible=False, axis="x")
    for index in range(1, len(tasks)):
        axes.axvline(index - 0.5, color="#88888833", linewidth=0.8)
    axes.figure.legend(loc="outside lower left", ncols=3, frameon=False)


def _svg(figure: Any, name: str, text: str) -> str:
    """For a page: without a header, with the page's ids and colors."""
    written = io.BytesIO()
    figure.savefig(written, format="svg", transparent=True)
    svg = written.getvalue().decode()
    # Metadata holds the time of day.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg).replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(text)}" ', 1)
