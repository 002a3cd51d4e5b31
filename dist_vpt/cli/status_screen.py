"""What ``dist-vpt status`` shows: a table of runs, sweeps and suites that fits a terminal, and reasons below it."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from dist_vpt.runs.status import RunStatus

COLORS = {
    "running": "cyan",
    "waiting": "default",
    "done": "green",
    "failed": "red",
    "interrupted": "yellow",
    "dead": "red",
    "damaged": "red",
}
IN_NEED = ("failed", "dead", "damaged", "interrupted")  # of somebody who looks
WIDE = 100  # columns of a terminal from which steps and speeds are shown
NARROW = 72  # below which names are folded, and units left out
BETWEEN = 3  # columns between two columns of the table


def screen(found: Sequence[RunStatus], folders: Sequence[str], width: int, height: int | None = None) -> Any:
    """A table, and below it the reasons of failures and interruptions.

    ``height``: lines of the terminal, where it must fit one; what matters least is counted instead of shown.
    """
    from rich.console import Group
    from rich.text import Text

    if not found:
        return Text(f"{', '.join(folders)}: no runs here yet")
    reasons = [each for each in found if each.reason]
    if height is None:
        lines: list[Any] = [_table(found, found, width), *([Text("")] if reasons else [])]
        return Group(*lines, *(Text(_reason(each)) for each in reasons))
    reasons = reasons[: max(1, height // 4)]
    space = height - 2 - (len(reasons) + 1 if reasons else 0)  # below the heading
    shown = _most_important(found, space if len(found) <= space else space - 1)
    lines = [_table(shown, found, width)]
    if hidden := [each for each in found if each not in shown]:
        counts = Counter(each.status for each in hidden)
        text = ", ".join(f"{count} {status}" for status, count in counts.items())
        lines.append(Text(shorten(f"and {len(hidden)} more: {text}", width)))
    if reasons:
        lines += [Text(""), *(Text(shorten(_reason(each), width, at_end=True)) for each in reasons)]
    return Group(*lines)


def shorten(text: str, width: int, *, at_end: bool = False) -> str:
    """A text in so many columns: what is too long loses its middle, or its end."""
    if len(text) <= width or width < 2:
        return text
    if at_end:
        return f"{text[: width - 1]}…"
    end = (width - 1) // 2 + (width - 1) // 6  # the end of a name says more
    return f"{text[: width - 1 - end]}…{text[-end:]}"


def _table(shown: Sequence[RunStatus], found: Sequence[RunStatus], width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    rows = []
    for each in shown:
        left = str(timedelta(seconds=round(each.seconds_left))) if each.seconds_left is not None else ""
        speed = f"{each.images_per_s:.1f}" if each.images_per_s is not None and width >= WIDE else ""
        rows.append((each, _progress(each, width), left, speed))
    table = Table(show_edge=False, pad_edge=False)
    names = ("status", "done", "left", *(["images/s"] if width >= WIDE else []))
    cells = [(each.status, progress, left, speed) for each, progress, left, speed in rows]
    taken = sum(max(len(name), *(len(row[n]) for row in cells)) + BETWEEN for n, name in enumerate(names))
    table.add_column("folder", overflow="fold")
    for name in names:
        table.add_column(name, justify="left" if name in ("status", "done") else "right", no_wrap=True)
    for each, progress, left, speed in rows:
        label = _label(each, found)
        label = shorten(label, width - taken) if width >= NARROW else label
        state = Text(each.status, COLORS.get(each.status, ""))
        row: list[Any] = [Text(label), state, progress, left, speed]
        table.add_row(*row[: len(names) + 1])
    return table


def _label(each: RunStatus, found: Sequence[RunStatus]) -> str:
    """The folder; of a suite's sweep, what follows the suite's, which is listed above it."""
    for suite in found:
        if suite.kind == "suite" and each.folder.startswith(f"{suite.folder}/"):
            return f"  {each.folder.removeprefix(f'{suite.folder}/')}"
    return each.folder


def _progress(each: RunStatus, width: int) -> str:
    if each.done is None or each.total is None:
        return ""
    of_all = f"{each.done}/{each.total}"
    epoch = f"epoch {each.epoch}/{each.epochs}" if each.epoch is not None else ""
    if width < NARROW:
        return of_all
    if width >= WIDE or each.unit != "steps":
        unit = each.unit if width >= WIDE else each.unit.partition(" ")[0]
        return f"{of_all} {unit}" + (f", {epoch}" if epoch else "")
    return f"{100 * each.done // max(1, each.total):3} %" + (f", {epoch}" if epoch else "")


def _reason(each: RunStatus) -> str:
    assert each.reason is not None
    return each.reason if each.reason.startswith(each.folder) else f"{each.folder}: {each.reason}"


def _most_important(found: Sequence[RunStatus], count: int) -> list[RunStatus]:
    """So many of them in their order: suites and what runs first, then what somebody should look at, then the rest."""

    def order(each: RunStatus) -> int:
        if each.kind == "suite" or each.status == "running":
            return 0
        return 1 if each.status in IN_NEED else 2 if each.status == "waiting" else 3

    kept = sorted(range(len(found)), key=lambda number: (order(found[number]), number))[: max(1, count)]
    return [found[number] for number in sorted(kept)]
