"""The trials of a sweep: one for each point of the grid, then one for each seed of the chosen setting."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vpt.errors import RecipeError, RunFailed, RunFolderError, nearest
from dist_vpt.files import read_json
from dist_vpt.recipe.differences import differences
from dist_vpt.recipe.loading import load_recipe_from
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.sweep_section import SweepConfig, grid_axes
from dist_vpt.runs.scores import main_score

OF_SEARCH = "of the search"  # in messages about its trials


@dataclass(frozen=True)
class SweepJob:
    """One trial: its row in the table, what it sets, its whole recipe, and the file of its outcome."""

    number: int
    setting: dict[str, Any]
    recipe: Recipe
    outcome: Path

    @property
    def label(self) -> str:
        return setting_text(self.setting)


def setting_text(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def grid_jobs(recipe: Recipe, folder: Path) -> list[SweepJob]:
    """A trial for every point of the grid. Raises RecipeError where a key does not exist or does not take its value."""
    axes = list(grid_axes(recipe.sweep.grid))
    unknown = [mistake for key, _ in axes if (mistake := unknown_key(recipe.model_dump(mode="json"), key))]
    if unknown:
        raise RecipeError("\n".join(f"sweep.grid.{mistake}" for mistake in unknown))
    jobs, mistakes = [], []
    for number, values in enumerate(itertools.product(*(values for _, values in axes))):
        setting = {key: value for (key, _), value in zip(axes, values, strict=True)}
        fixed = {"data.train_on": "train", "train.test": False, "run.dir": str(folder / "trials" / f"{number:03d}")}
        try:
            trial = with_values(recipe, {**setting, **fixed})
        except RecipeError as error:
            mistakes.append(f"{setting_text(setting)}: {error}")
            continue
        jobs.append(SweepJob(number, setting, trial, folder / "trials" / f"{number:03d}.json"))
    if mistakes:
        raise RecipeError("sweep.grid: " + "\n".join(dict.fromkeys(mistakes)))
    other = [job for job in jobs if job.recipe.method.reader != recipe.method.reader]
    if other:
        raise RecipeError(
            f"sweep.grid.method.name: {other[0].recipe.method.name} and the recipe's {recipe.method.name} cannot share "
            "a sweep, since one reads the frozen stream and the other changes it; use one sweep for each"
        )
    return jobs


def seed_jobs(recipe: Recipe, folder: Path, chosen: SweepJob) -> list[SweepJob]:
    """The chosen setting, once for each seed; with data.tries, once for each draw, with a seed of its own.

    On trainval, but with data.shots on train: so many images of a class are all that is trained on.
    """
    jobs, data = [], recipe.data
    train_on = "train" if data.shots else "trainval"
    for number, seed in enumerate(recipe.sweep.seeds[: data.tries if data.tries > 1 else None]):
        run_dir = folder / "seeds" / str(seed)
        fixed = {"seed": seed, "data.train_on": train_on, "train.early_stop": None, "run.dir": str(run_dir)}
        fixed |= {"data.try_index": number} if data.tries > 1 else {}
        trial = with_values(recipe, {**chosen.setting, **fixed, "train.test": True})
        jobs.append(SweepJob(number, {"seed": seed}, trial, folder / "seeds" / f"{seed}.json"))
    return jobs


def rank(jobs: Sequence[SweepJob], outcomes: Sequence[dict[str, Any]], which: str = "of the grid") -> list[SweepJob]:
    """The trials by their main score on val after their last epoch, the best first; without diverged and pruned ones.

    Ties go to the smaller learning rate. Raises RunFailed where every trial diverged.
    """
    pairs = zip(jobs, outcomes, strict=True)
    finite = [(job, outcome) for job, outcome in pairs if not outcome["diverged"] and not outcome.get("pruned")]
    if not finite:
        raise RunFailed(
            f"every trial {which} diverged; choose another run.dir (of a suite: another --out), and smaller values "
            f"of {'sweep.space' if which == OF_SEARCH else 'sweep.grid'}.optim.lr or an optim.clip_norm"
        )

    def order(found: tuple[SweepJob, dict[str, Any]]) -> tuple[float, float, int]:
        job, outcome = found
        return -main_score(outcome["last"]["val"]), job.recipe.optim.lr, job.number

    return [job for job, _ in sorted(finite, key=order)]


def read_outcome(job: SweepJob) -> dict[str, Any]:
    """The outcome file of a trial. Raises RunFolderError where it is damaged."""
    outcome = read_json(job.outcome)
    missing = {"setting", "last", "best", "diverged", "seconds", "recipe"} - set(outcome)
    if missing:
        raise RunFolderError(
            f"{job.outcome}: damaged (it has no {sorted(missing)[0]!r}); remove it, and its trial is trained again"
        )
    return outcome


def group_jobs(jobs: Sequence[SweepJob], may_differ: Sequence[str]) -> list[list[SweepJob]]:
    """Jobs that can be trained together: those whose recipes differ only in the keys of ``may_differ``."""
    groups: list[list[SweepJob]] = []
    for job in jobs:
        for group in groups:
            changed = [line.split(":")[0] for line in differences(group[0].recipe, job.recipe)]
            if all(key in may_differ for key in changed):
                group.append(job)
                break
        else:
            groups.append([job])
    return groups


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with keys set, and without its sweep and tries; the order of the data is what all trials share.

    Another method gets the recipe's settings that are not the defaults of its own method: others may not exist there.
    """
    data = recipe.model_dump(mode="json")
    if values.get("method.name", recipe.method.name) != recipe.method.name:
        defaults = type(recipe.method)().model_dump(mode="json")
        data["method"] = {key: value for key, value in data["method"].items() if value != defaults[key]}
    data["sweep"] = SweepConfig().model_dump(mode="json")
    for key, value in {"train.data_seed": recipe.data_seed, "data.tries": 1, **values}.items():
        into = data
        *path, name = key.split(".")
        for part in path:
            into = into[part]
        into[name] = value
    return load_recipe_from(data)


def unknown_key(data: dict[str, Any], key: str) -> str:
    """The mistake in a recipe key, or nothing."""
    into: Any = data
    for part in key.split("."):
        if not isinstance(into, dict) or part not in into:
            hint = nearest(part, into) if isinstance(into, dict) else "leave it out"
            return f"{key}: there is no such key; {hint}"
        into = into[part]
    return ""
