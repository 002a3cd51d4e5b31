"""One worker of a suite: it does work items that no other worker holds, until every experiment has a result.

A work item is what a worker does in one go: a trial or a seed of a writer, all trials or all seeds of a reader, or the
end, which writes the result. The files that it leaves show that it is done; a lock, which the system releases when the
worker's process ends, however it ends, shows that a worker is at it.
"""

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from rich.console import Console

from dist_vpt.data.formats import open_splits
from dist_vpt.data.tasks import TASKS
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.rank_status import RankStatus
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Interrupted, UserError
from dist_vpt.experiments.rungs import Rungs
from dist_vpt.experiments.suite_plan import LOCK_FIX, Experiment
from dist_vpt.experiments.sweep import check_splits
from dist_vpt.experiments.sweep_grid import SweepJob, read_outcome, seed_jobs
from dist_vpt.experiments.sweep_report import conclude
from dist_vpt.experiments.sweep_worker import Worker
from dist_vpt.files import locked, read_json
from dist_vpt.runs.folder import RESUME_HINT, RunFolder
from dist_vpt.runs.results import FILE, Parameters, Protocol, Result, Spread, append, finished_runs
from dist_vpt.runs.scores import main_score, metric_of
from dist_vpt.runtime.precision import resolve_precision

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class WorkItem:
    """A unit of work for one worker; messages and the lock file use its name."""

    name: str
    jobs: list[SweepJob]  # none for the end


class SuiteWorker:
    """One process that does work items until none is left."""

    def __init__(self, folder: Path, experiments: Sequence[Experiment]):
        self.folder, self.experiments = folder, experiments
        self.failed: dict[str, str] = {}  # reasons by the experiments' keys, in case the disk is too full for them
        clock = folder / "claims" / "clock"
        with locked(clock, LOCK_FIX, timeout=-1):  # the file server's time, with which failures are compared
            clock.touch()
            self.started = clock.stat().st_mtime
        self.console = Console(highlight=False)

    def work(self) -> None:
        """Do work items that no other worker holds, and wait for the others."""
        with StopSignal() as stop:
            reported = False
            while left := [experiment for experiment in self.experiments if not self._is_over(experiment)]:
                if stop.requested:
                    raise Interrupted(f"{self.folder}: stopped; {RESUME_HINT}")
                if any(self._do_one_item(experiment, stop) for experiment in left):
                    reported = False
                    continue
                if not reported:
                    self._show(f"waiting for other workers, which are at {len(left)} of {len(self.experiments)}")
                reported = True
                time.sleep(POLL_SECONDS)

    def _do_one_item(self, experiment: Experiment, stop: StopSignal) -> bool:
        """Do an item of the experiment, if there is one that no worker holds; whether there was."""
        try:
            experiment = _for_this_machine(experiment)
            for item in work_items(experiment):
                with locked(lock_file(self.folder, experiment, item.name), LOCK_FIX) as acquired:
                    if acquired and not self._is_over(experiment) and self._do(experiment, item, stop):
                        return True
        except Interrupted as stopped:
            raise Interrupted(f"{self.folder}: stopped; {RESUME_HINT} ({stopped})") from stopped
        except UserError as error:
            self._fail(experiment, str(error))
            return True
        except Exception as error:  # out of memory, a full disk, a bug: the other experiments continue
            reason = f"{type(error).__name__}: {error}".strip()[:500]
            file = lock_file(self.folder, experiment, "traceback")
            try:
                file.write_text(traceback.format_exc())
            except OSError:
                traceback.print_exc()
            else:
                reason += f" (traceback in {file})"
            self._fail(experiment, reason)
            return True
        return False

    def _do(self, experiment: Experiment, item: WorkItem, stop: StopSignal) -> bool:
        """Do an item whose lock is held; whether something was left to do."""
        # Accelerate's state is global in a process: an experiment of another precision needs its own.
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
        folder = self._open_sweep(experiment)
        worker = Worker(experiment.recipe, folder, 0, 1, stop, self.console, LaunchEnv.current(), RankStatus())
        if not item.jobs:
            self._end(experiment, worker.folder)
        elif any(not worker.done(job) for job in item.jobs):
            self._show(f"{experiment.name}: {item.name}")
            check_splits(open_splits(experiment.recipe.data))
            worker.work(item.jobs)
        else:
            return False
        return True

    def _open_sweep(self, experiment: Experiment) -> RunFolder:
        """The sweep's folder, with its recipe in it."""
        folder = RunFolder(experiment.folder)
        with locked(lock_file(self.folder, experiment, "begin"), LOCK_FIX, timeout=-1):
            if not folder.holds(experiment.recipe, "sweep"):
                with folder.acquire(experiment.recipe, kind="sweep"):
                    pass
        return folder

    def _end(self, experiment: Experiment, folder: RunFolder) -> None:
        rungs = Rungs(experiment.recipe, experiment.folder)
        left = rungs.read()
        assert not left, "work_items gives the end last"
        chosen = rungs.chosen()
        seeds = seed_jobs(experiment.recipe, experiment.folder, chosen)
        finals = [read_outcome(job) for job in seeds]
        content = conclude(folder, experiment.recipe, rungs, finals, 0.0, None)
        append(self.folder / FILE, _result(experiment, content, read_outcome(chosen), seeds))
        name, score = metric_of(content["test"]), main_score(content["test"])
        self._show(f"{experiment.name}: test {name} {score['mean']:.2f} ± {score['std']:.2f} %")

    def _is_over(self, experiment: Experiment) -> bool:
        """Whether the experiment has a result, or has failed since this worker started."""
        failed = lock_file(self.folder, experiment, "failed")
        if experiment.key in self.failed or (failed.is_file() and failed.stat().st_mtime >= self.started):
            return True
        return experiment.key in finished_runs(self.folder / FILE)

    def _fail(self, experiment: Experiment, reason: str) -> None:
        self.failed[experiment.key] = reason
        self._show(f"{experiment.name}: failed: {reason}")
        try:
            lock_file(self.folder, experiment, "failed").write_text(reason + "\n")
            append(self.folder / FILE, Result.model_validate({**_common(experiment), "failed": reason}))
        except (OSError, UserError) as error:
            self._show(f"warning: this could not be written down ({error})")

    def _show(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def _for_this_machine(experiment: Experiment) -> Experiment:
    """With the precision that the experiment's first worker has chosen, or else this machine's."""
    recipe, _ = resolve_precision(experiment.recipe, RunFolder(experiment.folder).precision)
    return replace(experiment, recipe=recipe, planned=experiment.recipe)


def work_items(experiment: Experiment) -> Iterator[WorkItem]:
    """Items that can be done now and have left no outcome yet."""
    rungs = Rungs(experiment.recipe, experiment.folder)
    kind, jobs = "trial", rungs.read()
    of_rung = f" of {rungs.name}" if rungs.halving and jobs else ""
    if not jobs:
        kind, jobs = "seed", seed_jobs(experiment.recipe, experiment.folder, rungs.chosen())
    left = [job for job in jobs if not job.outcome.is_file()]
    if left and experiment.recipe.method.reader:
        yield WorkItem(f"{kind}s{of_rung}", jobs)
    elif left:
        yield from (WorkItem(f"{kind} {job.number}{of_rung}", [job]) for job in left)
    if not left:
        yield WorkItem("end", [])


def lock_file(folder: Path, experiment: Experiment, name: str) -> Path:
    """The lock of a work item, or another file that the workers of an experiment share."""
    return folder / "claims" / f"{experiment.name}/{name}".replace("/", "__").replace(" ", "-")


def _common(experiment: Experiment) -> dict[str, Any]:
    """The fields of results.jsonl that finished and failed experiments share."""
    recipe = experiment.recipe
    return {
        "run": experiment.key,
        "task": experiment.task,
        "group": TASKS[experiment.task].group if experiment.task in TASKS else None,
        "method": experiment.method,
        "backbone": recipe.backbone_name,
        "precision": recipe.runtime.precision,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": experiment.name,
    }


def _result(
    experiment: Experiment, content: dict[str, Any], chosen: dict[str, Any], seeds: Sequence[SweepJob]
) -> Result:
    """The line of results.jsonl of a sweep: its sweep.json, the chosen trial's outcome, and the seeds' runs."""
    runs = [read_json(file) for job in seeds if (file := RunFolder(str(job.recipe.run.dir)).result).is_file()]
    settings = {"trials": experiment.trials, "epochs": experiment.recipe.train.epochs, "search": experiment.search}
    settings["tries"] = experiment.recipe.data.tries
    protocol = runs[0]["protocol"] | settings
    return Result(
        **_common(experiment),
        protocol=Protocol.model_validate(protocol),
        seeds=tuple(int(seed) for seed, test in content["seeds"].items() if test),
        chosen=content["chosen"],
        val={"last": main_score(chosen["last"]["val"]), "best": main_score(chosen["best"]["val"])},
        epochs={"last": chosen["last"]["epoch"], "best": chosen["best"]["epoch"]},
        test={name: Spread.model_validate(score) for name, score in content["test"].items()},
        extra_tests={
            extra: {name: Spread.model_validate(score) for name, score in scores.items()}
            for extra, scores in content.get("extra_tests", {}).items()
        },
        seconds=content["seconds"]["training"],
        peak_memory_mib=max(run["peak_memory_mib"] for run in runs),
        parameters=Parameters.model_validate(runs[0]["parameters"]),
        device=runs[0]["device"],
        versions=runs[0]["versions"],
    )
