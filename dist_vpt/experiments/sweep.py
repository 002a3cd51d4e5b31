"""``dist-vpt sweep``: a grid trained on train and chosen on val, then some seeds of the chosen setting on trainval.

With ``sweep.search=halving`` the grid is trained in rungs (``rungs.py``), and chosen among the trials of the last one;
with ``sweep.search=optuna`` the settings are drawn (``search.py``).
A reader's trials are trained together, in one pass over the frozen stream; a writer's one after the other, each as a
run of its own. Several processes share the trials (``sweep.parallelize=trials``: each works alone and writes its
results into the sweep's folder) or the batches (``sweep.parallelize=batch``).

    RUN/recipe.yaml, run.json     the sweep's recipe and status
    RUN/trials/NNN.json           one trial of the grid: its setting, its recipe, last and best epoch on val
    RUN/trials/NNN-rung-K.json    the same of a rung before the last
    RUN/seeds/SEED/               one run on trainval: adapters and result.json, for eval, predict and compress
    RUN/sweep.json, heatmap.png   the table, the choice, mean and standard deviation on test
"""

import math
import time
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from dist_vpt.data.formats import open_splits
from dist_vpt.data.splits import Splits
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.devices import select_device
from dist_vpt.distributed.launch_env import LaunchEnv, detach_from_launcher
from dist_vpt.distributed.rank_status import RankStatus, read_rank_status
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.distributed.watchdog import RankWatchdog
from dist_vpt.errors import Interrupted, RunFolderError, UserError
from dist_vpt.experiments.acquire import acquire
from dist_vpt.experiments.rungs import Rungs, plan_text, size_text
from dist_vpt.experiments.search import Search
from dist_vpt.experiments.sweep_grid import seed_jobs
from dist_vpt.experiments.sweep_report import conclude, print_sweep
from dist_vpt.experiments.sweep_worker import POLL_SECONDS, Worker
from dist_vpt.files import raising_disk_full, read_json
from dist_vpt.methods.config import MethodConfig
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RESUME_HINT, RunFolder
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.accelerator import (
    capture_user_error,
    init_accelerator,
    launcher_notes,
    leave_accelerate_as_it_is,
)
from dist_vpt.training.components import build_components


def sweep(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Run or resume a sweep; returns the content of sweep.json on the first process, {} on the others."""
    console = console or Console(highlight=False)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"resume": "auto"})})
    launch = LaunchEnv.current()
    rank, world, status = launch.rank, launch.world_size, RankStatus()
    folder, launched = RunFolder(str(recipe.run.dir)), launch
    if recipe.sweep.parallelize == "trials":
        launch = detach_from_launcher(launch)
    select_device(recipe.runtime.device, launch)
    recipe, why = resolve_precision(recipe, folder.precision)
    notes = [*(f"note: {warning}" for warning in recipe.warnings), *launcher_notes(launched, recipe)]
    notes += [f"precision {why}"] if why else []
    rungs, remarks, refused = _planned(recipe, folder), None, None
    first, shared = rungs.grid[0].recipe, recipe.sweep.parallelize == "batch"  # or each process works alone
    if rank == 0 or shared:  # mistakes in data and weights show before anything is written or waited for

        def check() -> list[str]:
            parts = build_components(first, launch)
            check_splits(parts.splits)
            if recipe.data.tries > 1:
                open_splits(recipe.data)  # raises for what the first try alone does not show
            parts.method.train()
            return parts.remarks()

        remarks, refused = capture_user_error(launch, check)
    with StopSignal() as stop, ExitStack() as stack:
        leave_accelerate_as_it_is(stack)
        accelerator, done = None, False
        if shared:
            accelerator = init_accelerator(first, launch, status, refused, stack)
            _refuse_deepspeed(recipe.method, accelerator)
            done = acquire(folder, recipe, accelerator, stack, "sweep")
        elif rank == 0:
            done = stack.enter_context(folder.acquire(recipe, "sweep"))
        else:
            _wait_for_first_process(folder, recipe, stop)  # which removes the rank files of an earlier attempt
        if done:
            if rank:
                return {}
            print_sweep(read_json(folder.path / "sweep.json"), folder.path, console)
            return read_json(folder.path / "sweep.json")
        # Where each process works alone, none keeps the others waiting.
        minutes = recipe.run.timeout_minutes if shared else math.inf
        stack.enter_context(RankWatchdog(folder, rank, world, minutes, status))
        worker = Worker(recipe, folder, rank, world, stop, console, launch, status, accelerator)
        for line in (*notes, *(remarks or [])):
            worker.show(line)
        started = time.monotonic()
        _train(rungs, worker)
        finals = seed_jobs(recipe, folder.path, rungs.chosen())
        worker.work(finals)
        results = worker.wait_for(finals)
        for job, outcome in zip(finals, results, strict=True):  # of the chosen setting alone: a grid has bad ones
            for warning in outcome.get("warnings", ()):
                worker.show(f"warning: {job.label}: {warning}")
        if rank:
            return {}
        with raising_disk_full("the table", folder.path, RESUME_HINT):
            return conclude(folder, recipe, rungs, results, time.monotonic() - started, console)


def _planned(recipe: Recipe, folder: RunFolder) -> Rungs | Search:
    return (Search if recipe.sweep.search == "optuna" else Rungs)(recipe, folder.path)


def _train(rungs: Rungs | Search, worker: Worker) -> None:
    """Train the trials; in a grid, which is one rung, all of them to the end."""
    if isinstance(rungs, Search):
        rungs.train(worker)
        return
    sweep = worker.recipe.sweep
    if rungs.halving:
        worker.show(plan_text(rungs.sizes))
    elif sweep.search == "halving":
        worker.show(
            f"note: {size_text(*rungs.sizes[0])} are too few to halve by {sweep.reduction_factor}: all are trained to "
            "the end"
        )
    while jobs := rungs.next():
        if rungs.halving:
            worker.show(f"{rungs.name}: {size_text(len(jobs), jobs[0].recipe.train.epochs)}")
        worker.work(jobs)
        rungs.add(jobs, worker.wait_for(jobs))


def check_splits(splits: Splits) -> None:
    """Raises DataError where a split that a sweep needs is missing: before the training, not after hours of it."""
    for name in ("val", "trainval", "test"):
        splits[name]


def _refuse_deepspeed(method: MethodConfig, accelerator: RankAccelerator) -> None:
    if method.reader and accelerator.state.deepspeed_plugin is not None:
        refused = UserError("a reader's sweep shares one small model: start it with the ddp strategy")
        refused.shared = True  # the recipe and the launcher's file are the same everywhere
        raise refused


def _wait_for_first_process(folder: RunFolder, recipe: Recipe, stop: StopSignal) -> None:
    """Wait until the first process has acquired the folder; before that, it may hold something else.

    The status of a sweep that was killed is still "running": what counts is that a process holds the folder's lock and
    has begun this sweep since.
    """
    deadline, beat = time.monotonic() + 60 * recipe.run.timeout_minutes, None
    while True:
        # Where locks do not reach other machines, a new heartbeat of the first process means the same.
        last, beat = beat, read_rank_status(folder.path, 0).get("beat")
        alive = folder.under_way() or (last is not None and beat is not None and beat != last)
        if folder.holds(recipe, "sweep") and (alive or folder.status().get("status") == "done"):
            return
        if stop.requested:
            raise Interrupted(f"{folder.path}: stopped; {RESUME_HINT}")
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"{folder.path}: the first process has not begun this sweep in {recipe.run.timeout_minutes} minutes; "
                "see its output, and check that all nodes share the folder"
            )
        time.sleep(POLL_SECONDS)
