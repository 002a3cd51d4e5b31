"""The status of runs, sweeps and suites, read from the files that they write; no process is contacted.

A run whose files say that it is running is dead where no process holds its lock any more.
"""

import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_vpt.distributed.rank_status import SILENT_SECONDS, read_rank_status
from dist_vpt.errors import RunFolderError
from dist_vpt.files import is_locked, read_json
from dist_vpt.recipe.sweep_section import RungSize, SweepConfig

STATES = ("running", "waiting", "done", "failed", "interrupted", "dead", "damaged")
DAMAGED = (RunFolderError, OSError, AttributeError, KeyError, TypeError)  # raised for a file that is not as written
NOT_RUNNING = "no process works on it; the same command continues it"


@dataclass(frozen=True)
class RunStatus:
    """The status of a run, a sweep or a suite."""

    folder: str
    kind: str  # run, sweep, suite
    status: str  # one of STATES
    reason: str | None = None  # of a failure, an interruption, a death
    done: int | None = None
    total: int | None = None
    unit: str = "steps"  # that are counted: steps, trials and seeds, sweeps
    epoch: int | None = None  # the current one
    epochs: int | None = None
    images_per_s: float | None = None
    seconds_left: float | None = None
    updated: str | None = None  # ISO date and time of the last report


def run_statuses(folder: Path) -> list[RunStatus]:
    """The status of a run, of a sweep, of a suite and its sweeps, or of all of these below a folder."""
    return [status for found in _find(folder) for status in _statuses(found)]


def _find(folder: Path) -> Iterator[Path]:
    """The topmost folders of runs, sweeps and suites."""
    if any((folder / name).is_file() for name in ("manifest.json", "run.json")):
        yield folder
        return
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return
    for path in inner:
        yield from _find(path)


def _statuses(folder: Path) -> list[RunStatus]:
    try:
        if (folder / "manifest.json").is_file():
            return _suite(folder)
        suite = folder.absolute().parent.parent
        if (suite / "manifest.json").is_file():
            name = f"{folder.absolute().parent.name}/{folder.absolute().name}"
            return [sweep for sweep in _suite(suite)[1:] if sweep.folder == str(suite / name)]
        info = read_json(folder / "run.json")
        return [_sweep(folder, info) if info.get("kind") == "sweep" else _run(folder, info)]
    except DAMAGED as error:
        return [_damaged(folder, "run", error)]


def _damaged(folder: Path, kind: str, error: Exception) -> RunStatus:
    return RunStatus(str(folder), kind, "damaged", str(error) or type(error).__name__)


def _run(folder: Path, info: dict[str, Any]) -> RunStatus:
    state, reason = _state(folder, info)
    if state == "done":
        read_json(folder / "result.json")  # raises where it is lost
    progress = read_rank_status(folder, 0).get("progress", {})
    running = state == "running"
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
        updated=_updated(folder, info),
    )


def _state(folder: Path, info: dict[str, Any]) -> tuple[str, str | None]:
    """The state in run.json with its reason, unless it is "running" and the process is gone."""
    state, reason = info.get("status", "damaged"), info.get("reason")
    if state != "running" or is_locked(folder / ".lock"):
        return state, reason
    report, here = read_rank_status(folder, 0), socket.gethostname()
    if info.get("host") != here and report and time.time() - report["time"] < 2 * SILENT_SECONDS:
        return state, reason  # on a machine whose locks are not seen here
    info = read_json(folder / "run.json")
    if info.get("status") != "running" or is_locked(folder / ".lock"):  # it has just ended, or begun
        return info.get("status", "damaged"), info.get("reason")
    at = f", at {report['what']}" if report else ""
    fix = "the same command continues it" if info.get("kind") == "sweep" else "run.resume=auto continues it"
    return "dead", f"its process (pid {info.get('pid')} on {info.get('host')}) is gone{at}; {fix}"


def _updated(folder: Path, info: dict[str, Any]) -> str | None:
    report = read_rank_status(folder, 0)
    reported = datetime.fromtimestamp(report["time"], UTC).isoformat(timespec="seconds") if report else ""
    return max(info.get("updated", ""), reported) or None


def _sweep(folder: Path, info: dict[str, Any]) -> RunStatus:
    state, reason = _state(folder, info)
    sweep, rungs = _plan(folder)
    workers = read_rank_status(folder, 0).get("world", 1) if sweep.parallelize == "trials" else 1
    total = sum(rung.trials for rung in rungs) + len(sweep.seeds)
    found = _count_outcomes(folder, state, reason, rungs, total, _updated(folder, info), workers)
    reported = [read_rank_status(folder, rank).get("progress", {}) for rank in range(workers)]
    groups = [progress for progress in reported if "trials" in progress]  # of trials that train together
    if state != "running" or not groups:
        return found
    lengths = {rung.epochs for rung in rungs}
    now = [g["trials"] * (g["epochs"] if g["epochs"] in lengths else rungs[-1].epochs) for g in groups]
    later = max(0, _epochs_left(folder, rungs, total) - sum(now))  # each as long as those of now
    each = sum((group["seconds"] + group["seconds_left"]) / n for group, n in zip(groups, now, strict=True)) / len(now)
    return replace(
        found,
        epoch=groups[0]["epoch"],
        epochs=groups[0]["epochs"],
        images_per_s=round(sum(group["images_per_s"] for group in groups), 2),
        seconds_left=round(max(group["seconds_left"] for group in groups) + later * each / workers, 1),
    )


def _plan(folder: Path) -> tuple[SweepConfig, list[RungSize]]:
    """What a sweep's recipe says of it, and its rungs."""
    import yaml

    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        known = {key: value for key, value in recipe["sweep"].items() if key in SweepConfig.model_fields}
        sweep = SweepConfig.model_validate(known)
        return sweep, sweep.rungs(recipe["train"]["epochs"])
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise RunFolderError(f"{folder / 'recipe.yaml'}: cannot be read ({error})") from error


def _outcomes(folder: Path) -> list[Path]:
    """The files of trials and seeds that are trained."""
    return [*folder.glob("trials/*.json"), *folder.glob("seeds/*.json")]


def _epochs_of(outcome: Path, rungs: Sequence[RungSize]) -> int:
    number = outcome.stem.partition("-rung-")[2]
    return rungs[min(int(number), len(rungs)) - 1 if number else -1].epochs


def _epochs_left(folder: Path, rungs: Sequence[RungSize], total: int) -> int:
    """Epochs of all trials and seeds that are still to be trained, of ``total`` in all."""
    seeds = total - sum(rung.trials for rung in rungs)
    planned = sum(rung.trials * rung.epochs for rung in rungs) + seeds * rungs[-1].epochs
    return planned - sum(_epochs_of(outcome, rungs) for outcome in _outcomes(folder))


def _count_outcomes(  # noqa: PLR0917 (the status of a sweep, and what to count)
    folder: Path,
    state: str,
    reason: str | None,
    rungs: Sequence[RungSize],
    total: int,
    updated: str | None,
    workers: int,
) -> RunStatus:
    """A sweep by the outcomes of its trials and seeds."""
    outcomes = _outcomes(folder)
    runs = [path.parent.parent for path in folder.glob("*/*/ranks/rank-0.json") if is_locked(path)]
    speeds = [read_rank_status(run, 0).get("progress", {}).get("images_per_s") for run in runs]
    left = total > len(outcomes) and state == "running"
    seconds = sum(float(read_json(outcome)["seconds"]) for outcome in outcomes) if left else 0.0
    epochs = sum(_epochs_of(outcome, rungs) for outcome in outcomes)
    if state == "done" and len(rungs) > 1:
        total = len(outcomes)  # fewer than planned where most of a rung's trials diverged
    return RunStatus(
        str(folder),
        "sweep",
        state,
        reason,
        min(len(outcomes), total),
        total,
        "trials and seeds",
        images_per_s=sum(speed for speed in speeds if speed) or None if state == "running" else None,
        seconds_left=round(seconds / epochs * _epochs_left(folder, rungs, total) / workers, 1)
        if left and outcomes
        else None,
        updated=updated,
    )


def _suite(folder: Path) -> list[RunStatus]:
    """The suite, then its sweeps in the plan's order."""
    from dist_vpt.runs.results import FILE, Result, read

    planned = read_json(folder / "manifest.json")["pairs"]
    results = read(folder / FILE)[0] if (folder / FILE).is_file() else []
    results_by_run: dict[str, Result] = {result.run: result for result in results}
    locked = [path.name for path in (folder / "claims").glob("*__*") if is_locked(path)]
    sweeps = []
    for name, sweep in planned.items():
        result, prefix = results_by_run.get(sweep["recipe"]), name.replace("/", "__").replace(" ", "-") + "__"
        workers = sum(claim.startswith(prefix) for claim in locked)
        begun = (folder / name / "run.json").is_file()
        state, reason = _sweep_state(result, workers=workers, busy=bool(locked), begun=begun)
        total, updated = sweep["trials"] + len(sweep["seeds"]), result.finished if result is not None else None
        try:
            planned_here = (folder / name / "recipe.yaml").is_file()
            rungs = _plan(folder / name)[1] if planned_here else [RungSize(sweep["trials"], 1)]
            sweeps.append(_count_outcomes(folder / name, state, reason, rungs, total, updated, max(1, workers)))
        except DAMAGED as error:  # of one sweep, which must not hide the others
            sweeps.append(_damaged(folder / name, "sweep", error))
    states = [sweep.status for sweep in sweeps]
    state, reason = _suite_state(states, busy=bool(locked))
    return [RunStatus(str(folder), "suite", state, reason, states.count("done"), len(states), "sweeps"), *sweeps]


def _sweep_state(result: Any, *, workers: int, busy: bool, begun: bool) -> tuple[str, str | None]:
    """State and reason of a suite's sweep; ``busy``: whether any process works on the suite."""
    if result is not None and not result.failed:
        return "done", None
    if workers:
        return "running", None
    if result is not None:
        return "failed", result.failed
    return ("waiting", None) if busy or not begun else ("interrupted", NOT_RUNNING)


def _suite_state(states: list[str], *, busy: bool) -> tuple[str, str | None]:
    """State and reason of a suite, from those of its sweeps."""
    failed = states.count("failed")
    if busy:
        return "running", None
    if all(state in ("done", "failed") for state in states):
        return ("failed", f"{failed} of {len(states)} have no result") if failed else ("done", None)
    return ("waiting", None) if all(state == "waiting" for state in states) else ("interrupted", NOT_RUNNING)
