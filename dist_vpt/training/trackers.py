"""The trackers of a run: curves, hyperparameters and scores go to all, by Accelerate's own classes for them."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from dist_vpt.errors import UserError
from dist_vpt.recipe.differences import flatten
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RunFolder
from dist_vpt.training.event_files import no_traceback_of_event_writer

PROJECT = "dist_vpt"  # of all trackers but TensorBoard, which has a folder of the run instead
KEPT_IDS = {"mlflow": "info.run_id", "aim": "hash"}  # where a tracker's run has the id that it was given
LISTS = ("wandb", "swanlab")  # whose log_images takes lists of pictures
PICTURES = (*LISTS, "aim", "clearml")  # that have a log_images


class Trackers:
    """What ``run.trackers`` names, on the main process; on the others nothing is logged."""

    def __init__(self, recipe: Recipe, folder: RunFolder, report: Callable[[str], None], *, main: bool = True):
        """``report``: writes a warning to the run's log; ``main``: whether this is the main process."""
        self.recipe, self.folder, self.report, self.main = recipe, folder, report, main
        self.active: list[Any] = []
        self.leaving = contextlib.ExitStack()
        self.kept_in = "metrics.jsonl"  # the file of the folder that has all values

    def start(self, done_steps: int = 0, settings: Mapping[str, Any] | None = None, *, required: bool = True) -> None:
        """Start all, or continue a resumed run's.

        ``settings``: hyperparameters other than the recipe's, by the recipe's keys. ``required``: raise UserError for
        one that cannot start; or it is left out, with a warning.
        """
        if not self.main:
            return
        self.leaving.enter_context(no_traceback_of_event_writer())
        for name in dict.fromkeys(self.recipe.run.trackers):
            known = self._known_ids().get(name)
            try:
                tracker = self._made(name, self._options(name, done_steps, known))
                tracker.start()
                # MLflow refuses a parameter that has another value than before, such as data.workers of a resumed run.
                if not (known and name == "mlflow"):
                    tracker.store_init_configuration(hyperparameters(self.recipe, settings))
                if not known:
                    self._keep_id(tracker)
                self.active.append(tracker)
            except Exception as error:  # trackers raise what they like
                reason = str(error).partition("\n")[0] or type(error).__name__
                text = f"run.trackers: {name} cannot start ({reason})"
                if required:
                    self.finish()
                    raise UserError(f"{text}; fix that, or leave it out of run.trackers") from error
                self.report(f"warning: {text}; {self.kept_in} has all values")

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Send values to all; those that are not defined (None) are left out."""
        defined = {name: value for name, value in values.items() if value is not None}
        for tracker in list(self.active):
            with self.dropping_if_it_fails(tracker):
                tracker.log(defined, step=step)

    def picture(self, name: str, figure: Any, step: int) -> None:
        """Send a figure of Matplotlib to those for which Accelerate has a call that takes pictures."""
        for tracker in list(self.active):
            with self.dropping_if_it_fails(tracker):
                if tracker.name == "tensorboard":
                    tracker.tracker.add_figure(name, figure, global_step=step)
                elif tracker.name == "mlflow":
                    tracker.log_figure(figure, f"{name}.png")
                elif tracker.name in PICTURES:
                    image_HW3 = _drawn(figure)
                    tracker.log_images({name: [image_HW3] if tracker.name in LISTS else image_HW3}, step=step)

    def finish(self) -> None:
        """The processes may continue with another run."""
        for tracker in list(self.active):
            with self.dropping_if_it_fails(tracker):
                tracker.finish()
        self.active = []
        self.leaving.close()

    @property
    def tensorboard(self) -> Any:
        """The tracker of TensorBoard, or None."""
        return next((tracker for tracker in self.active if tracker.name == "tensorboard"), None)

    @contextlib.contextmanager
    def dropping_if_it_fails(self, tracker: Any) -> Iterator[None]:
        """A full disk or a server that is gone stops a tracker, and not the run."""
        try:
            yield
        except Exception as error:  # trackers raise what they like
            self.active = [other for other in self.active if other is not tracker]
            if tracker.name == "tensorboard":  # whose writer does not recover
                self.report(f"warning: TensorBoard stopped writing to {self.folder.path / 'tb'} ({error})")
                return
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.report(f"warning: {tracker.name} gets no more values ({reason}); {self.kept_in} has them all")

    def _made(self, name: str, options: dict[str, Any]) -> GeneralTracker:
        """Accelerate's tracker, made here rather than by an Accelerator, which a sweep has not."""
        PartialState(cpu=self.recipe.runtime.device == "cpu")  # Accelerate's log asks for it
        kind = LOGGER_TYPE_TO_CLASS[name]
        own = ("tb", str(self.folder.path)) if name == "tensorboard" else (PROJECT,)  # a folder, or a project
        tracker = kind(*own, **options)
        tracker.main_process_only = False  # it is made on the main process alone
        return tracker

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

    def _keep_id(self, tracker: Any) -> None:
        """Write down the id that a tracker has given the run, for when it is resumed."""
        if tracker.name in KEPT_IDS:
            found: Any = tracker.tracker
            for attribute in KEPT_IDS[tracker.name].split("."):
                found = getattr(found, attribute)
            self.folder.mark("running", trackers=self._known_ids() | {tracker.name: str(found)})


def hyperparameters(recipe: Recipe, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The resolved recipe, with other values of some ``settings``, as flat names and plain values for trackers."""
    return {
        key: value if isinstance(value, (int, float, bool, str)) else json.dumps(value)
        for key, value in (dict(flatten(recipe)) | dict(settings or {})).items()
    }


def _drawn(figure: Any) -> np.ndarray:
    """The pixels of a figure of Matplotlib, [H, W, 3] in uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
