"""One process's share of a sweep: the trials that it trains, and the outcomes that it waits for."""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console

from dist_vpt.distributed.collectives import RankAccelerator, on_main_process
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.rank_status import RankStatus
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Diverged, Interrupted, RunFolderError, adding_to_data_errors
from dist_vpt.experiments.run import run
from dist_vpt.experiments.sweep_grid import SweepJob, group_jobs, read_outcome
from dist_vpt.experiments.trial_run import write_run
from dist_vpt.files import raising_disk_full, to_json, write_atomically
from dist_vpt.planning.planner import advice_on_memory, check_memory
from dist_vpt.recipe.differences import RESUMABLE_KEYS, differences, identity_keys
from dist_vpt.recipe.loading import load_recipe_from
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RESUME_HINT, RunFolder
from dist_vpt.training.accelerator import make_accelerator
from dist_vpt.training.build_trials import PER_TRIAL_KEYS, build_trial_group
from dist_vpt.training.final_scores import score_trials_at_end
from dist_vpt.training.trials import fit_trials

POLL_SECONDS = 0.5


class Worker:
    """One process of a sweep or a suite."""

    def __init__(  # noqa: PLR0917 (a sweep as one process sees it)
        self,
        recipe: Recipe,
        folder: RunFolder,
        rank: int,
        world: int,
        stop: StopSignal,
        console: Console,
        launch: LaunchEnv,
        status: RankStatus,
        accelerator: RankAccelerator | None = None,
    ):
        self.recipe, self.folder, self.stop, self.console = recipe, folder, stop, console
        self.launch, self.status = launch, status
        # The workers of a suite share no batches, whatever their recipes say.
        self.shared = accelerator is not None and recipe.sweep.parallelize == "batch"
        self.first, (self.rank, self.world) = rank == 0, (0, 1) if self.shared else (rank, world)
        self.accelerator = accelerator  # where each process works alone, made when it is needed

    def work(self, jobs: Sequence[SweepJob]) -> None:
        """Train the jobs of this process's share that have no outcome yet; the share is fixed by rank and world."""
        mine = jobs[self.rank :: self.world]
        if self.recipe.method.reader:
            for group in group_jobs(mine, PER_TRIAL_KEYS):
                self._train_together(group)
            return
        for job in mine:
            if not self._as_main_sees(self.done(job)):
                self._train_alone(job)

    def wait_for(self, jobs: Sequence[SweepJob]) -> list[dict[str, Any]]:
        """The outcomes of all jobs, those of other processes included."""
        reported = False
        while missing := [job for job in jobs if not self.done(job)]:
            if self.stop.requested:
                raise Interrupted(f"{self.folder.path}: stopped; {RESUME_HINT}")
            if not reported:
                self.show(f"waiting for {len(missing)} trials of other processes")
                reported = True
            time.sleep(POLL_SECONDS)
        return [read_outcome(job) for job in jobs]

    def done(self, job: SweepJob) -> bool:
        """Whether a trial has its outcome. Raises RunFolderError where that is of another recipe."""
        if not job.outcome.is_file():
            return False
        stored = load_recipe_from(read_outcome(job)["recipe"])
        changed = [line for line in differences(stored, job.recipe) if not line.startswith(RESUMABLE_KEYS)]
        if changed:
            raise RunFolderError(f"{job.outcome}: is of another trial ({'; '.join(changed)}); choose another run.dir")
        return True

    def show(self, text: str) -> None:
        """Print a line, on the first process."""
        if self.first and text:
            self.console.print(text, markup=False, soft_wrap=True)

    def _as_main_sees(self, found: Any) -> Any:
        """The main process's ``found`` where batches are shared: another node may see a new file late."""
        return broadcast_object_list([found])[0] if self.shared else found

    def _train_together(self, jobs: Sequence[SweepJob]) -> None:
        missing = self._as_main_sees([job.number for job in jobs if not self.done(job)])
        if not missing:
            return
        state = self._state_of(jobs)
        # A state of all jobs exists if their training was ended after some of the outcomes were written.
        if not self._as_main_sees(state.is_file()):
            jobs = [job for job in jobs if job.number in missing]
            state = self._state_of(jobs)
        if self.accelerator is None:
            self.accelerator = make_accelerator(self.recipe, self.launch, self.status)
        recipes = [job.recipe for job in jobs]
        self.show(f"{len(jobs)} trials in one pass: {jobs[0].label} to {jobs[-1].label}")
        with advice_on_memory(recipes[0], self.accelerator, trials=len(jobs)):
            group = build_trial_group(recipes, self.accelerator, self.stop, state, self.show, check_memory=check_memory)
            try:
                fit_trials(group)
                scored = [t for t in group.trials if not t.diverged] if recipes[0].train.test else []
                with adding_to_data_errors("these trials are trained and kept: the same command scores test alone"):
                    finals = dict(zip(map(id, scored), score_trials_at_end(group, scored), strict=True))
            finally:
                group.close()
        skipped, seconds = sorted(group.skipped), group.seconds / len(jobs)
        if skipped:
            self.show(f"{len(skipped)} unreadable images skipped")
        for trial in scored:
            if not math.isfinite(loss := trial.progress.last["test"]["loss"]):
                trial.diverged = f"the loss on test was {loss}"

        def write() -> None:
            for job, trial in zip(jobs, group.trials, strict=True):
                if job.number not in missing:
                    continue
                if recipes[0].train.test and not trial.diverged:
                    assert self.accelerator is not None
                    found = finals[id(trial)].predictions
                    self.show(write_run(job.recipe, trial, group.parts, self.accelerator, seconds, skipped, found))
                progress = trial.progress
                notes = progress.warnings
                self.write_outcome(job, progress.last, progress.best, trial.diverged, seconds, skipped, notes)
            state.unlink(missing_ok=True)

        on_main_process(self.accelerator, write, "outcomes", self.folder.path, RESUME_HINT)

    def _state_of(self, jobs: Sequence[SweepJob]) -> Path:
        """Where the state of these jobs is kept while they are trained together."""
        name = hashlib.sha256(json.dumps([identity_keys(job.recipe) for job in jobs]).encode()).hexdigest()[:16]
        return self.folder.path / f".pass-{name}.pt"

    def _train_alone(self, job: SweepJob) -> None:
        try:
            result, diverged = run(job.recipe, self.status), ""
        except Diverged as error:  # alone: too little memory or disk is no outcome of the setting
            result, diverged = {"last": {}, "best": {}, "seconds": 0.0, "skipped_images": []}, str(error)

        def write() -> None:
            last, best, seconds = result["last"], result["best"] or {}, result["seconds"]
            notes = result.get("warnings", ())
            self.write_outcome(job, last, best, diverged, seconds, result["skipped_images"], notes)

        if self.shared:
            assert self.accelerator is not None
            on_main_process(self.accelerator, write, "outcomes", self.folder.path, RESUME_HINT)
        else:
            write()

    def write_outcome(  # noqa: PLR0917 (what an outcome holds)
        self,
        job: SweepJob,
        last: dict[str, Any],
        best: dict[str, Any],
        diverged: str,
        seconds: float,
        skipped: Sequence[str],
        warnings: Sequence[str],
    ) -> None:
        """Write what the grid's choice and the sweep's table need of a trial."""
        outcome = {
            "setting": job.setting,
            "last": last,
            "best": best or None,
            "diverged": diverged or None,
            "seconds": round(seconds, 3),
            "skipped_images": list(skipped),
            "warnings": list(warnings),
            "recipe": job.recipe.model_dump(mode="json"),
        }
        with raising_disk_full("outcomes", self.folder.path, RESUME_HINT):
            job.outcome.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(job.outcome, to_json(outcome, indent=1) + "\n")
