"""The trackers of a run: curves, hyperparameters and scores go to all, by Accelerate's own classes for them."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accelerate.utils import LoggerType

from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.errors import UserError
from dist_vpt.recipe.differences import flatten
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RunFolder

PROJECT = "dist_vpt"  # of all trackers but TensorBoard, for which Accelerate makes it a folder of the run
KEPT_IDS = {"mlflow": "info.run_id", "aim": "hash"}  # where a tracker's run has the id that it was given


class Trackers:
    """What ``run.trackers`` names, on the main process; on the others nothing is logged."""

    def __init__(self, recipe: Recipe, accelerator: RankAccelerator, folder: RunFolder, report: Callable[[str], None]):
        """``report``: writes a warning to the run's log."""
        self.recipe, self.accelerator, self.folder, self.report = recipe, accelerator, folder, report

    def start(self, done_steps: int = 0) -> None:
        """Start all, or continue a resumed run's. Raises UserError for one that cannot start."""
        trackers: list[Any] = []
        self.accelerator.trackers = []
        main = self.accelerator.is_main_process
        for name in dict.fromkeys(self.recipe.run.trackers):
            known = self._known_ids().get(name) if main else None
            options = self._options(name, done_steps, known) if main else {}
            self.accelerator.log_with = [LoggerType(name)]
            # MLflow refuses a parameter that has another value than before, such as data.workers of a resumed run.
            config = None if known and name == "mlflow" else hyperparameters(self.recipe)
            try:  # one by one: what Accelerate takes as one name is TensorBoard's folder and the others' project
                project = "tb" if name == "tensorboard" else PROJECT
                self.accelerator.init_trackers(project, config=config, init_kwargs={name: options})
                if main and not known:
                    self._keep_id(name)
            except Exception as error:  # trackers raise what they like
                self.accelerator.trackers = trackers
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise UserError(
                    f"run.trackers: {name} cannot start ({reason}); fix that, or leave it out of run.trackers"
                ) from error
            trackers += self.accelerator.trackers
            self.accelerator.trackers = []
        self.accelerator.trackers = trackers

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Send values to all; those that are not defined (None) are left out."""
        defined = {name: value for name, value in values.items() if value is not None}
        for tracker in list(self.accelerator.trackers):
            with self.dropping_if_it_fails(tracker):
                tracker.log(defined, step=step)

    def finish(self) -> None:
        """The processes may continue with another run."""
        for tracker in list(self.accelerator.trackers):
            with self.dropping_if_it_fails(tracker):
                tracker.finish()

    @property
    def tensorboard(self) -> Any:
        """The tracker of TensorBoard, or None."""
        return next((tracker for tracker in self.accelerator.trackers if tracker.name == "tensorboard"), None)

    @contextlib.contextmanager
    def dropping_if_it_fails(self, tracker: Any) -> Iterator[None]:
        """A full disk or a server that is gone stops a tracker, and not the run."""
        try:
            yield
        except Exception as error:  # trackers raise what they like
            self.accelerator.trackers = [other for other in self.accelerator.trackers if other is not tracker]
            if tracker.name == "tensorboard":  # whose writer does not recover
                self.report(f"warning: TensorBoard stopped writing to {self.folder.path / 'tb'} ({error})")
                return
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.report(f"warning: {tracker.name} gets no more values ({reason}); metrics.jsonl has them all")

    def _options(self, name: str, done_steps: int, known: str | None) -> dict[str, Any]:
        """Of a tracker's own constructor: names that tell runs apart, and the run that a resumed one continues."""
        run = self.folder.path
        started = f"{run.resolve()} {self.folder.status().get('started')}"
        own_id = hashlib.sha256(started.encode()).hexdigest()  # a resumed run has the same
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": done_steps + 1},
            "wandb": {"name": run.name, "dir": str(run), "id": own_id[:16], "resume": "allow"},
            "mlflow": {"run_id": known} if known else {"run_name": run.name},
            "comet_ml": {"experiment_key": own_id[:32], "mode": "get_or_create"},
            "aim": {"run_hash": known} if known else {},
            "clearml": {"project_name": PROJECT, "task_name": run.name, "reuse_last_task_id": False},
            "dvclive": {"dir": str(run / "dvclive"), "resume": (run / "dvclive").exists()},
            "swanlab": {"experiment_name": run.name, "logdir": str(run / "swanlog")},
            "trackio": {"name": f"{run.name}-{own_id[:8]}", "resume": "allow"},
        }
        return options[name]

    def _known_ids(self) -> dict[str, str]:
        return self.folder.status().get("trackers", {})

    def _keep_id(self, name: str) -> None:
        """Write down the id that a tracker has given the run, for when it is resumed."""
        if name in KEPT_IDS:
            found: Any = self.accelerator.trackers[-1].tracker
            for attribute in KEPT_IDS[name].split("."):
                found = getattr(found, attribute)
            self.folder.mark("running", trackers=self._known_ids() | {name: str(found)})


def hyperparameters(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as flat names and plain values, as trackers want them."""
    return {
        key: value if isinstance(value, (int, float, bool, str)) else json.dumps(value)
        for key, value in flatten(recipe)
    }
