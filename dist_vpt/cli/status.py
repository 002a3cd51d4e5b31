"""``dist-vpt status``: a table of runs, sweeps and suites, or JSON."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_vpt.cli.status_screen import screen
from dist_vpt.errors import UserError
from dist_vpt.runs.status import RunStatus, run_statuses


def status(folders: Sequence[str], *, as_json: bool = False, watch: float | None = None) -> None:
    """Show the status of all runs in and below folders; with ``watch``, again every so many seconds until control-C.

    Raises UserError for paths that are no folders, for all of them at once.
    """
    if watch is not None and watch <= 0:
        raise UserError(f"--watch {watch:g}: must be above 0 seconds")
    wrong = [folder for folder in folders if not Path(folder).is_dir()]
    if wrong:
        raise UserError("\n  ".join(f"{folder}: {_reason(folder)}" for folder in wrong))
    if watch is None:
        _show(folders, as_json)
        return
    try:
        _watch(folders, as_json, watch)
    except KeyboardInterrupt:
        return


def _reason(folder: str) -> str:
    """Why a folder has no status, with the fix."""
    if folder.startswith("hub:"):
        return "is a run on the hub, which is finished; name a folder that train, sweep or suite writes to"
    return "there is no such folder; name one that train, sweep or suite writes to"


def _all(folders: Sequence[str]) -> list[RunStatus]:
    return [each for folder in folders for each in run_statuses(Path(folder))]


def _show(folders: Sequence[str], as_json: bool) -> None:
    found = _all(folders)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=1), flush=True)
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(screen(found, folders, console.width))


def _watch(folders: Sequence[str], as_json: bool, seconds: float) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    if as_json or not console.is_terminal:
        while True:
            _show(folders, as_json)
            time.sleep(seconds)
    found: list[RunStatus] = []

    def shown() -> Any:
        heading = f"{time.strftime('%H:%M:%S')}, every {seconds:g} s; Ctrl-C ends"
        return Group(Text(heading, "dim"), screen(found, folders, console.width, console.height - 1))

    try:
        # On the terminal's other screen: what is redrawn there does not flicker, and leaves what was printed before.
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                found = _all(folders)
                live.update(shown(), refresh=True)
                time.sleep(seconds)
    except KeyboardInterrupt:
        console.print(screen(found, folders, console.width))  # what was seen last stays
        raise
