"""``dist_vpt.train`` and ``dist_vpt.sweep``: runs and sweeps of a Python program or a notebook.

Nothing heavy is imported before the recipe, the folders and the files that it names have been looked at.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.errors import UserError
from dist_vpt.experiments.early_checks import check_early
from dist_vpt.files import read_json
from dist_vpt.inference.hub import fetch, is_hub_id
from dist_vpt.recipe.loading import recipe_of
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RunFolder

if TYPE_CHECKING:
    from dist_vpt.inference.tuned import Tuned

AnyRecipe = Recipe | str | Path | Mapping[str, Any] | Sequence[Any]


class Run:
    """A run's folder, finished or not; of ``hub:user/name`` a copy in the hub's cache, for reading."""

    def __init__(self, path: str | Path):
        """Raises RunFolderError where the folder holds no run, and UserError where the hub does not give one."""
        folder = RunFolder(fetch(path) if isinstance(path, str) and is_hub_id(path) else path)
        self.path = folder.path
        self.recipe: Recipe = folder.load()
        folder.refuse_sweep()
        self._folder = folder

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, status={self.status!r})"

    @property
    def status(self) -> str:
        """``running``, ``done``, ``failed`` or ``interrupted``."""
        return str(self._folder.status().get("status", "done"))  # a run that was shared has no run.json

    @property
    def result(self) -> dict[str, Any]:
        """What result.json holds: scores of the last and the best epoch, parameters, seconds; {} before the end."""
        return read_json(self._folder.result) if self._folder.result.is_file() else {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The scores of each epoch and split so far, as ``pandas.DataFrame(run.metrics)`` takes them."""
        if not self._folder.metrics.is_file():
            return []
        lines = self._folder.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # another process may be writing the last

    def load(self, adapters: str = "last", device: Any = None, weights: str | None = None) -> "Tuned":
        """What it has tuned; see ``dist_vpt.load``."""
        from dist_vpt.inference.saved import load

        return load(self, adapters, device, weights)


class Sweep:
    """A finished sweep's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Sweep({str(self.path)!r})"

    @property
    def result(self) -> dict[str, Any]:
        """What sweep.json holds: the table, the chosen setting, mean and standard deviation on test."""
        return read_json(self.path / "sweep.json")

    @property
    def runs(self) -> list[Run]:
        """The runs of the chosen setting, one for each seed."""
        folders = [path for path in (self.path / "seeds").iterdir() if path.is_dir()]
        return [Run(folder) for folder in sorted(folders, key=lambda path: (len(path.name), path.name))]


def load_recipe(*recipes: Recipe | str | Path | Mapping[str, Any], **overrides: Any) -> Recipe:
    """A recipe with every key, checked: see ``train``. Raises RecipeError with all mistakes."""
    return recipe_of(recipes, overrides)


def train(recipe: AnyRecipe, **overrides: Any) -> Run:
    """Do one run, as ``dist-vpt train`` does: ``train(["vpt_deep", "image_folder"], data={"root": "pictures"})``.

    Under ``accelerate launch script.py`` all processes call it and share the run.

    Args:
        recipe: the name of a shipped recipe, a YAML file, a dictionary with the keys of one, a ``Recipe``, or a list
            of these, which are merged.
        overrides: sections, such as ``train={"epochs": 3}``, or dotted keys: ``**{"train.epochs": 3}``.

    Raises:
        UserError: what the command line reports and exits with; its message is the same.
        Interrupted: after a signal that asks for a stop, with the state saved; ``run={"resume": "auto"}`` resumes it.
    """
    return Run(_done(recipe, overrides, "run"))


def sweep(recipe: AnyRecipe, **overrides: Any) -> Sweep:
    """Try a grid on val and test the best setting, as ``dist-vpt sweep`` does, or resume that; see ``train``.

    It works on one process: for several, start ``accelerate launch -m dist_vpt sweep``.
    """
    if LaunchEnv.current().world_size > 1:
        raise UserError(
            "dist_vpt.sweep: a Python program sweeps on one process; for several start "
            "`accelerate launch -m dist_vpt sweep ...`"
        )
    return Sweep(_done(recipe, overrides, "sweep"))


def _done(recipe: AnyRecipe, overrides: Mapping[str, Any], kind: str) -> Path:
    """Do a run or a sweep; returns its folder."""
    resolved = recipe_of(recipe, overrides, protocol="default" if kind == "run" else "published")
    if LaunchEnv.current().world_size > 1:
        from dist_vpt.training.accelerator import keep_process_group

        keep_process_group()
    check_early(resolved if kind == "run" else resolved.changed("run", resume="auto"), kind)
    if kind == "run":
        from dist_vpt.experiments.run import run

        run(resolved)
    else:
        from dist_vpt.experiments.sweep import sweep

        sweep(resolved)
    return Path(str(resolved.run.dir))
