"""The rungs of a sweep: one for a grid, several for successive halving (arXiv 1502.07943).

The first rung trains all trials for a few epochs, each next one the best of them for longer. Every rung trains from the
beginning, with the whole schedule over its own epochs: what a trial scores in the last rung, which has train.epochs, is
what it scores in the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vpt.errors import RecipeError
from dist_vpt.experiments.sweep_grid import SweepJob, grid_jobs, rank, read_outcome, with_values
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.sweep_section import RungSize


@dataclass(frozen=True)
class Rung:
    """A rung that is trained: its jobs, which are numbered as in the grid, and their outcomes."""

    jobs: list[SweepJob]
    outcomes: list[dict[str, Any]]
    epochs: int
    which: str = "of the grid"  # in messages

    def best(self) -> list[SweepJob]:
        """Its jobs but those that diverged, the best first. Raises RunFailed where all diverged."""
        return rank(self.jobs, self.outcomes, self.which)


class Rungs:
    """The rungs of a sweep, as far as they are trained."""

    def __init__(self, recipe: Recipe, folder: Path):
        """Raises RecipeError where the grid has a mistake, or the first rung is as long as the last."""
        self.sizes, self.grid = recipe.sweep.rungs(recipe.train.epochs), grid_jobs(recipe, folder)
        self.done: list[Rung] = []
        sweep, factor = recipe.sweep, recipe.sweep.reduction_factor
        if sweep.search == "halving" and sweep.min_epochs and len(self.sizes) == 1 and factor <= sweep.trials:
            raise RecipeError(
                f"sweep.min_epochs = {sweep.min_epochs}: must be below {1 - 1 / factor:.3g} x train.epochs = "
                f"{recipe.train.epochs * (1 - 1 / factor):g}, or halving saves nothing; lower it, or set "
                "sweep.search=grid"
            )

    @property
    def halving(self) -> bool:
        return len(self.sizes) > 1

    @property
    def name(self) -> str:
        """Of the rung that comes next, for messages; "" for a grid."""
        return f"rung {len(self.done) + 1}" if self.halving else ""

    def next(self) -> list[SweepJob]:
        """The jobs of the rung that comes next, none after the last. Raises RunFailed where all before diverged."""
        number = len(self.done)
        if number == len(self.sizes):
            return []
        size = self.sizes[number]
        promoted = {job.number for job in (self.done[-1].best()[: size.trials] if self.done else self.grid)}
        jobs = [job for job in self.grid if job.number in promoted]
        return jobs if number == len(self.sizes) - 1 else [_shortened(job, number + 1, size) for job in jobs]

    def add(self, jobs: list[SweepJob], outcomes: list[dict[str, Any]]) -> None:
        """Add the rung that came next, with its outcomes."""
        epochs = self.sizes[len(self.done)].epochs
        which = f"of {self.name} ({count(epochs, 'epoch')})" if self.done else "of the grid"
        self.done.append(Rung(jobs, outcomes, epochs, which))

    def read(self) -> list[SweepJob]:
        """Add the rungs whose outcomes are all written; returns the jobs of the next one, none if all are."""
        while (jobs := self.next()) and all(job.outcome.is_file() for job in jobs):
            self.add(jobs, [read_outcome(job) for job in jobs])
        return jobs

    def chosen(self) -> SweepJob:
        """The best trial of the last rung. Raises RunFailed where all of them diverged."""
        return self.done[-1].best()[0]


def size_text(trials: int, epochs: int) -> str:
    return f"{count(trials, 'trial')} for {count(epochs, 'epoch')}"


def plan_text(sizes: Sequence[RungSize]) -> str:
    """The rungs of a sweep in words, and what they cost."""
    cost, whole = sum(trials * epochs for trials, epochs in sizes), sizes[0].trials * sizes[-1].epochs
    parts = ", ".join(size_text(*size) for size in sizes)
    return f"successive halving: {parts}; {cost:,} epochs, where the grid has {whole:,}"


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _shortened(job: SweepJob, number: int, size: RungSize) -> SweepJob:
    """The job in a rung before the last; ``number``: of the rung, counted from 1.

    Its warm-up is the same share of its epochs. Its learning rate changes by step: by epoch, a short warm-up would cost
    a whole epoch at 0. It is trained to its end and scored then, since that is what decides.
    """
    name, epochs = f"{job.outcome.stem}-rung-{number}", size.epochs
    warmup = round(job.recipe.optim.warmup_epochs * epochs / job.recipe.train.epochs, 6)
    values = {
        "train.epochs": epochs,
        "train.eval_every": epochs,
        "train.early_stop": None,
        "optim.warmup_epochs": warmup,
        "optim.schedule_by": "step",
        "run.dir": str(job.outcome.parent / name),
    }
    return SweepJob(job.number, job.setting, with_values(job.recipe, values), job.outcome.parent / f"{name}.json")
