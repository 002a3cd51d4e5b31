"""``dist-vpt status``: a table of runs, sweeps and suites, or JSON."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from dist_vpt.errors import UserError
from dist_vpt.runs.status import RunStatus, run_statuses

COLORS = {
    "running": "cyan",
    "waiting": "default",
    "done": "green",
    "failed": "red",
    "interrupted": "yellow",
    "dead": "red",
    "damaged": "red",
}
NARROW = 72  # columns of a terminal below which units and speeds are left out


def status(folders: Sequence[str], *, as_json: bool = False, watch: float | None = None) -> None:
    """Show the status of all runs in and below folders; with ``watch``, again every so many seconds until control-C.

    Raises UserError for paths that are no folders, for all of them at once.
    """
    if watch is not None and watch <= 0:
        raise UserError(f"--watch {watch:g}: must be above 0 seconds")
    wrong = [folder for folder in folders if not Path(folder).is_dir()]
    if wrong:
        raise UserError(
            "\n  ".join(
                f"{folder}: there is no such folder; name one that train, sweep or suite writes to" for folder in wrong
            )
        )
    if watch is None:
        _show(folders, as_json)
        return
    try:
        _watch(folders, as_json, watch)
    except KeyboardInterrupt:
        return


def _all(folders: Sequence[str]) -> list[RunStatus]:
    return [each for folder in folders for each in run_statuses(Path(folder))]


def _show(folders: Sequence[str], as_json: bool) -> None:
    found = _all(folders)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=1), flush=True)
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_screen(found, folders, console.width))


def _watch(folders: Sequence[str], as_json: bool, seconds: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if as_json or not console.is_terminal:
        while True:
            _show(folders, as_json)
            time.sleep(seconds)
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            live.update(_screen(_all(folders), folders, console.width), refresh=True)
            time.sleep(seconds)


def _screen(found: Sequence[RunStatus], folders: Sequence[str], width: int) -> Any:
    """A table, and below it the reasons of failures and interruptions."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not found:
        return Text(f"{', '.join(folders)}: no runs here yet")
    wide, table = width >= NARROW, Table(show_edge=False, pad_edge=False)
    table.add_column("folder", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("done", no_wrap=True)
    table.add_column("left", justify="right", no_wrap=True)
    if wide:
        table.add_column("images/s", justify="right")
    for each in found:
        speed = f"{each.images_per_s:.1f}" if each.images_per_s is not None else ""
        left = str(timedelta(seconds=round(each.seconds_left))) if each.seconds_left is not None else ""
        state = Text(each.status, COLORS.get(each.status, ""))
        cells: list[Any] = [Text(each.folder), state, _progress(each, wide), left, speed]
        table.add_row(*cells[: len(table.columns)])
    reasons = [
        Text(each.reason if each.reason.startswith(each.folder) else f"{each.folder}: {each.reason}")
        for each in found
        if each.reason
    ]
    return Group(table, *([Text("")] if reasons else []), *reasons)


def _progress(each: RunStatus, wide: bool) -> str:
    if each.done is None or each.total is None:
        return ""
    epoch = f", epoch {each.epoch}/{each.epochs}" if each.epoch is not None else ""
    return f"{each.done}/{each.total}" + (f" {each.unit}{epoch}" if wide else "")
