"""A sweep that draws its settings one after the other, in view of those before: Optuna's TPE, with pruning by ASHA.

The study is a journal in the sweep's folder, which any number of processes share: each draws a trial, trains it as a
run of its own, and reports its scores on val. A process that is started again continues the trial that it had drawn.
Each trial is drawn by a sampler of its own, seeded with the recipe's seed and the trial's number: one process draws the
same ones whether or not it was killed in between.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vpt.distributed.rank_log import held_messages
from dist_vpt.errors import Pruned
from dist_vpt.experiments.rungs import Rung
from dist_vpt.experiments.search_checks import check_search
from dist_vpt.experiments.sweep_grid import OF_SEARCH, SweepJob, read_outcome, with_values
from dist_vpt.files import locked
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.search_space import Range, drawn_from
from dist_vpt.recipe.sweep_section import MIN_RUNG_EPOCHS
from dist_vpt.runs.scores import main_score

if TYPE_CHECKING:
    from dist_vpt.experiments.sweep_worker import Worker

JOURNAL = "optuna.log"
DIVERGED = 0.0  # percent: what a trial that diverged counts as


class Search:
    """The trials of a search, as far as they are drawn; as Rungs, but that they are not known before."""

    halving = False

    def __init__(self, recipe: Recipe, folder: Path):
        """Raises UserError as ``check_search``. Nothing is written."""
        check_search(recipe)
        self.recipe, self.folder = recipe, folder
        self.space = drawn_from(recipe.sweep.space, recipe.sweep.grid)
        self.done: list[Rung] = []

    @property
    def grid(self) -> list[SweepJob]:
        """Its trials; before the first is drawn, the recipe itself stands for them."""
        if self.done:
            return self.done[-1].jobs
        return [self._job(0, {})]

    def chosen(self) -> SweepJob:
        """The best trial. Raises RunFailed where all diverged."""
        return self.done[-1].best()[0]

    def train(self, worker: "Worker") -> None:
        """Draw and train trials until there are as many as the recipe wants; waits for those of other processes."""
        study = self._study()
        jobs: dict[int, SweepJob] = {}
        worker.show(f"search: {self.recipe.sweep.n_trials} trials of {', '.join(self.space)}")
        while (trial := self._next(study, worker.rank, worker.world)) is not None:
            job = self._job(trial.number, self._setting(trial.params))
            if not worker.done(job):
                worker.show(f"trial {trial.number + 1}/{self.recipe.sweep.n_trials}: {job.label}")
                worker.train_alone(job, partial(self._report, trial))
            self._tell(study, trial, read_outcome(job))
        for trial in self._drawn(study):
            jobs[trial.number] = self._job(trial.number, self._setting(trial.params))
        ordered = [jobs[number] for number in sorted(jobs)]
        outcomes = worker.wait_for(ordered)
        self.done = [Rung(ordered, outcomes, self.recipe.train.epochs, OF_SEARCH)]

    def _study(self) -> Any:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        _keep_off_the_terminal()
        sweep = self.recipe.sweep
        pruner: Any = optuna.pruners.NopPruner()
        if sweep.pruner == "asha":
            first = sweep.min_epochs or MIN_RUNG_EPOCHS
            pruner = optuna.pruners.SuccessiveHalvingPruner(first, sweep.reduction_factor, 0)
        with self._lock(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = JournalStorage(JournalFileBackend(str(self.folder / JOURNAL)))
            return optuna.create_study(
                study_name="sweep", storage=storage, pruner=pruner, direction="maximize", load_if_exists=True
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Held while a trial is drawn: the trials that a process has drawn are known to be its own."""
        with locked(self.folder / ".optuna.lock", "choose another run.dir", timeout=-1):
            yield

    def _next(self, study: Any, process: int, processes: int) -> Any:
        """The trial that this process had drawn when it ended, or a new one; None where all are drawn."""
        import optuna

        from dist_vpt.training.step import fold_in

        with self._lock():
            for known in study.get_trials(deepcopy=False):
                owner = known.user_attrs.get("process", 0) % processes
                if known.state == optuna.trial.TrialState.RUNNING and owner == process:
                    return optuna.trial.Trial(study, known._trial_id)
            number = len(study.get_trials(deepcopy=False))
            if number >= self.recipe.sweep.n_trials:
                return None
            study.sampler = optuna.samplers.TPESampler(seed=fold_in(self.recipe.seed, number) % 2**32)
            trial = study.ask(self._distributions())
            trial.set_user_attr("process", process)
            return trial

    def _drawn(self, study: Any) -> list[Any]:
        return study.get_trials(deepcopy=False)[: self.recipe.sweep.n_trials]

    def _distributions(self) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, Any] = {}
        for key, drawn in self.space.items():
            if not isinstance(drawn, Range):
                found[key] = CategoricalDistribution(drawn)
            elif isinstance(drawn.low, int) and isinstance(drawn.high, int):
                found[key] = IntDistribution(drawn.low, drawn.high, log=drawn.log)
            else:
                found[key] = FloatDistribution(float(drawn.low), float(drawn.high), log=drawn.log)
        return found

    def _setting(self, drawn: dict[str, Any]) -> dict[str, Any]:
        return {key: drawn[key] for key in self.space}  # in the recipe's order

    def _job(self, number: int, setting: dict[str, Any]) -> SweepJob:
        name = self.folder / "trials" / f"{number:03d}"
        fixed = {"data.train_on": "train", "train.test": False, "run.dir": str(name)}
        trial = with_values(self.recipe, {**setting, **fixed})
        return SweepJob(number, setting, trial, name.with_suffix(".json"))

    def _report(self, trial: Any, epoch: int, score: float) -> None:
        """Report what a trial scores on val. Raises Pruned where others were better after as many epochs."""
        if epoch == self.recipe.train.epochs:  # nothing is left to save
            return
        if epoch not in trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            trial.report(score, epoch)
        if trial.should_prune():
            raise Pruned(f"pruned after epoch {epoch}, with {score:.2f} % on val")

    def _tell(self, study: Any, trial: Any, outcome: dict[str, Any]) -> None:
        import optuna

        state = optuna.trial.TrialState
        if outcome.get("pruned"):
            study.tell(trial, state=state.PRUNED)
        else:
            study.tell(trial, DIVERGED if outcome["diverged"] else main_score(outcome["last"]["val"]))


def _keep_off_the_terminal() -> None:
    """Send what Optuna logs to the log of this process."""
    import optuna

    optuna.logging.disable_default_handler()
    optuna_logger = logging.getLogger("optuna")
    if not any(held_messages in handler.filters for handler in optuna_logger.handlers):
        handler = logging.StreamHandler()  # of errors
        handler.addFilter(held_messages)
        optuna_logger.addHandler(handler)
