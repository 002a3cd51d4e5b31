"""``dist-vpt status``: how runs, sweeps and suites stand, read from what they write; no process is asked.

A run that says of itself that it is running is dead where no process holds its lock any more.
"""

import json
import math
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dist_vpt.distributed.rank_status import read_rank_status
from dist_vpt.distributed.watchdog import SILENT_SECONDS
from dist_vpt.errors import RunFolderError, UserError
from dist_vpt.files import is_locked, read_json
from dist_vpt.recipe.schema import grid_axes

COLORS = {
    "running": "cyan",
    "waiting": "default",
    "done": "green",
    "failed": "red",
    "interrupted": "yellow",
    "dead": "red",
    "damaged": "red",
}
DAMAGED = (RunFolderError, OSError, AttributeError, KeyError, TypeError)  # what a file that is not as written raises
NARROW = 72  # columns of a terminal below which units and speeds are left out
NOBODY = "no process is at it; the same command goes on"


@dataclass(frozen=True)
class RunStatus:
    """How a run, a sweep or a suite stands."""

    folder: str
    kind: str  # run, sweep, suite
    status: str  # one of COLORS
    reason: str | None = None  # of a failure, an interruption, a death
    done: int | None = None
    total: int | None = None
    unit: str = "steps"  # that are counted: steps, trials and seeds, sweeps
    epoch: int | None = None  # the one under way
    epochs: int | None = None
    images_per_s: float | None = None
    seconds_left: float | None = None
    updated: str | None = None  # ISO date and time of the last sign of life

    def told(self, wide: bool) -> str:
        """What is done, as people say it."""
        if self.done is None or self.total is None:
            return ""
        epoch = f", epoch {self.epoch}/{self.epochs}" if self.epoch is not None else ""
        return f"{self.done}/{self.total}" + (f" {self.unit}{epoch}" if wide else "")


def status(folders: Sequence[str], *, as_json: bool = False, watch: float | None = None) -> None:
    """Show all that is in and below folders; with ``watch``, again every so many seconds until control-C.

    Raises UserError for what is no folder, for all of them at once.
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


def run_statuses(folder: Path) -> list[RunStatus]:
    """Of a run, of a sweep, of a suite with all its sweeps, or of all that lie below a folder."""
    return [standing for place in _found(folder) for standing in _standings(place)]


def _found(folder: Path) -> Iterator[Path]:
    """The topmost folders that something has begun in."""
    if any((folder / name).is_file() for name in ("manifest.json", "run.json")):
        yield folder
        return
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return
    for path in inner:
        yield from _found(path)


def _standings(folder: Path) -> list[RunStatus]:
    try:
        if (folder / "manifest.json").is_file():
            return _suite(folder)
        suite = folder.absolute().parent.parent
        if (suite / "manifest.json").is_file():
            name = f"{folder.absolute().parent.name}/{folder.absolute().name}"
            return [pair for pair in _suite(suite)[1:] if pair.folder == str(suite / name)]
        info = read_json(folder / "run.json")
        return [_sweep(folder, info) if info.get("kind") == "sweep" else _run(folder, info)]
    except DAMAGED as error:
        return [_damaged(folder, "run", error)]


def _damaged(folder: Path, kind: str, error: Exception) -> RunStatus:
    return RunStatus(str(folder), kind, "damaged", str(error) or type(error).__name__)


def _run(folder: Path, info: dict[str, Any]) -> RunStatus:
    state, reason = _state(folder, info)
    if state == "done":
        read_json(folder / "result.json")  # it ended well, and its numbers may be lost since
    place = read_rank_status(folder, 0)
    progress = place.get("progress", {})
    running = state == "running"
    updated = max(info.get("updated", ""), _iso(place["time"]) if place else "")
    return RunStatus(
        str(folder),
        "run",
        state,
        reason,
        progress.get("step"),
        progress.get("steps"),
        epoch=progress.get("epoch"),
        epochs=progress.get("epochs"),
        images_per_s=progress.get("images_per_s") if running else None,
        seconds_left=progress.get("seconds_left") if running else None,
        updated=updated or None,
    )


def _state(folder: Path, info: dict[str, Any]) -> tuple[str, str | None]:
    """What run.json says, unless it says that somebody is at work who is not."""
    state, reason = info.get("status", "damaged"), info.get("reason")
    if state != "running" or is_locked(folder / ".lock"):
        return state, reason
    place, here = read_rank_status(folder, 0), socket.gethostname()
    if info.get("host") != here and place and time.time() - place["time"] < 2 * SILENT_SECONDS:
        return state, reason  # on a machine that our locks do not reach
    again = read_json(folder / "run.json")
    if again.get("status") != "running" or is_locked(folder / ".lock"):  # it has just ended, or begun
        return again.get("status", "damaged"), again.get("reason")
    at = f", at {place['what']}" if place else ""
    then = "the same command goes on" if info.get("kind") == "sweep" else "run.resume=auto goes on"
    return "dead", f"its process (pid {info.get('pid')} on {info.get('host')}) is gone{at}; {then}"


def _sweep(folder: Path, info: dict[str, Any]) -> RunStatus:
    import yaml

    state, reason = _state(folder, info)
    try:
        sweep = yaml.safe_load((folder / "recipe.yaml").read_text())["sweep"]
    except (OSError, yaml.YAMLError) as error:
        raise RunFolderError(f"{folder / 'recipe.yaml'}: cannot be read ({error})") from error
    trials = math.prod(len(values) for _, values in grid_axes(sweep["grid"]))
    place = read_rank_status(folder, 0)
    updated = max(info.get("updated", ""), _iso(place["time"]) if place else "") or None
    total, sharing = trials + len(sweep["seeds"]), place.get("world", 1) if sweep["split"] == "trials" else 1
    found = _pieces(folder, state, reason, total, updated, sharing)
    passes = [p for rank in range(sharing) if "trials" in (p := read_rank_status(folder, rank).get("progress", {}))]
    if state != "running" or not passes:
        return found
    later = max(0, total - (found.done or 0) - sum(p["trials"] for p in passes))  # as long each as those of now
    each = sum((p["seconds"] + p["seconds_left"]) / p["trials"] for p in passes) / len(passes)
    return replace(
        found,
        epoch=passes[0]["epoch"],
        epochs=passes[0]["epochs"],
        images_per_s=round(sum(p["images_per_s"] for p in passes), 2),
        seconds_left=round(max(p["seconds_left"] for p in passes) + later * each / sharing, 1),
    )


def _pieces(  # noqa: PLR0917 (how a sweep stands, and what to count)
    folder: Path, state: str, reason: str | None, total: int, updated: str | None, workers: int = 1
) -> RunStatus:
    """A sweep by the outcomes of its trials and seeds."""
    outcomes = [*folder.glob("trials/*.json"), *folder.glob("seeds/*.json")]
    runs = [path.parent.parent for path in folder.glob("*/*/ranks/rank-0.json") if is_locked(path)]
    speeds = [read_rank_status(run, 0).get("progress", {}).get("images_per_s") for run in runs]
    left = total - len(outcomes)
    seconds = [float(read_json(outcome)["seconds"]) for outcome in outcomes] if state == "running" and left else []
    return RunStatus(
        str(folder),
        "sweep",
        state,
        reason,
        min(len(outcomes), total),
        total,
        "trials and seeds",
        images_per_s=sum(speed for speed in speeds if speed) or None if state == "running" else None,
        seconds_left=round(sum(seconds) / len(seconds) * left / workers, 1) if seconds else None,
        updated=updated,
    )


def _suite(folder: Path) -> list[RunStatus]:
    """The suite, then its sweeps in the plan's order."""
    from dist_vpt.runs.results import FILE, read

    pairs = read_json(folder / "manifest.json")["pairs"]
    results = read(folder / FILE)[0] if (folder / FILE).is_file() else []
    ended = {result.run: result for result in results}
    claims = [path for path in (folder / "claims").glob("*__*") if is_locked(path)]
    found = []
    for name, pair in pairs.items():
        result, place = ended.get(pair["recipe"]), folder / name
        mine = [claim for claim in claims if claim.name.startswith(name.replace("/", "__").replace(" ", "-") + "__")]
        begun, reason = (place / "run.json").is_file(), None
        if result is not None and not result.failed:
            state = "done"
        elif mine:
            state = "running"
        elif result is not None:
            state, reason = "failed", result.failed
        elif claims or not begun:
            state = "waiting"
        else:
            state, reason = "interrupted", NOBODY
        total = pair["trials"] + len(pair["seeds"])
        updated = result.finished if result is not None else None
        try:
            found.append(_pieces(place, state, reason, total, updated, max(1, len(mine))))
        except DAMAGED as error:  # of one sweep, which must not hide the others
            found.append(_damaged(place, "sweep", error))
    states = [each.status for each in found]
    over = all(state in ("done", "failed") for state in states)
    failed = states.count("failed")
    begun = any(state != "waiting" for state in states)
    state = "running" if claims else ("failed" if failed else "done") if over else "interrupted" if begun else "waiting"
    reason = {"interrupted": NOBODY, "failed": f"{failed} of {len(states)} have no result"}.get(state)
    whole = RunStatus(str(folder), "suite", state, reason, states.count("done"), len(states), "sweeps")
    return [whole, *found]


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _all(folders: Sequence[str]) -> list[RunStatus]:
    return [standing for folder in folders for standing in run_statuses(Path(folder))]


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
    """A table, and below it why what does not go on does not."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not found:
        return Text(f"{', '.join(folders)}: nothing has begun here yet")
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
        cells: list[Any] = [
            Text(each.folder),
            Text(each.status, COLORS.get(each.status, "")),
            each.told(wide),
            left,
            speed,
        ]
        table.add_row(*cells[: len(table.columns)])
    told = [(each.folder, each.reason) for each in found if each.reason]
    reasons = [Text(reason if reason.startswith(folder) else f"{folder}: {reason}") for folder, reason in told]
    return Group(table, *([Text("")] if reasons else []), *reasons)
