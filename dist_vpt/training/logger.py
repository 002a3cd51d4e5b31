"""The output of a run: a bar on a terminal, lines in train.log, metrics.jsonl, curves and figures in trackers.

K classes, S image side.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dist_vpt.data.splits import Split
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.rank_status import logger
from dist_vpt.files import to_json
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.class_table import ClassScores
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.progress import Progress as RunProgress
from dist_vpt.runs.scores import main_score
from dist_vpt.runtime.peak_memory import peak_memory_mib
from dist_vpt.training.figures import confusion_figure, mistakes_figure, precision_figure
from dist_vpt.training.metrics import Mistake
from dist_vpt.training.trackers import Trackers

if TYPE_CHECKING:
    from dist_vpt.training.step import Step

WARM_UP = 3  # steps that the speed does not count: first calls allocate, compile and start workers


class RunLogger:
    """Writes on the main process, and nothing on the others."""

    def __init__(self, recipe: Recipe, accelerator: "RankAccelerator", folder: RunFolder):
        self.noted: set[str] = set()  # splits with a score that is not defined
        self.recipe, self.accelerator, self.folder = recipe, accelerator, folder
        self.main = accelerator.is_main_process
        self.trackers = Trackers(recipe, folder, self.line, main=self.main)
        self.console = text_console()
        self.bar: Progress | None = None
        self.started: tuple[float, int] | None = None  # clock and images since when the speed is measured
        self.steps = 0
        self.on_val: Callable[[int, float], None] | None = None  # gets epoch and main score (%); may raise Pruned
        self.unwritten: dict[Path, str] = {}  # lines that a full disk has not taken so far

    def start(self, headline: list[str], progress: RunProgress, total_steps: int, done_steps: int) -> None:
        """Open log and trackers; ``headline``: what is about to be trained."""
        self.total_steps = total_steps
        if not self.main:
            return
        if self.folder.metrics.exists():  # a resumed run repeats the epochs after its state
            os.truncate(self.folder.metrics, min(progress.metrics_bytes, self.folder.metrics.stat().st_size))
        for line in headline:
            self.line(line)
        self.trackers.start(done_steps)
        if (tracker := self.trackers.tensorboard) is not None:
            tracker.tracker.add_text("recipe", f"```yaml\n{self.recipe.to_yaml()}```", global_step=done_steps)
        if (console := self._console_of_bar()) is not None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, console=console)
            self.bar.start()
            self.task = self.bar.add_task("training", total=total_steps, completed=done_steps, text="")

    def _console_of_bar(self) -> Console | None:
        """Where a bar is drawn: on a terminal, or in a notebook that has the widgets for it."""
        console = Console(highlight=False)
        if console.is_jupyter:
            return console if find_spec("ipywidgets") else None
        return self.console if self.console.is_terminal else None

    def step(self, number: int, step: "Step", progress: RunProgress, *, logged: bool) -> None:
        """Called after each optimizer step; ``logged`` ones go to the log and the trackers."""
        if not self.main:
            if logged:
                logger.info(f"step {number}/{self.total_steps}  epoch {progress.epoch + 1}")
            return
        self.steps += 1
        if self.steps == WARM_UP:
            self.started = (time.monotonic(), progress.images)
        self.accelerator.status.progress = {
            "step": number,
            "steps": self.total_steps,
            "epoch": progress.epoch + 1,
            "epochs": self.recipe.train.epochs,
            "images_per_s": round(self.images_per_s(progress), 2),
            "seconds_left": round(self._left(number, progress), 1),
        }
        text = self._text(number, step, progress)
        if self.bar is not None:
            self.bar.update(self.task, completed=number, text=text, description=f"epoch {progress.epoch + 1}")
        if logged:
            self.line(f"step {number}/{self.total_steps}  epoch {progress.epoch + 1}  {text}", show=self.bar is None)
            self.trackers.log(
                {
                    "train/loss": step.loss,
                    f"train/{self.recipe.data.step_score}": 100 * step.correct / max(step.images, 1),
                    "train/lr": step.lr,
                    "train/images_per_s": self.images_per_s(progress),
                    "train/memory_mib": peak_memory_mib(),
                    "norm/gradient": step.gradient_norm,
                    "norm/parameter": step.parameter_norm,
                    "norm/update": step.update_norm,
                },
                number,
            )

    def scores(self, epoch: int, step: int, split: str, scores: dict[str, Any]) -> None:
        """One line an epoch and split; a score that is not defined (None) is a dash."""
        if not self.main:
            return
        self._append(self.folder.metrics, to_json({"epoch": epoch, "step": step, "split": split, **scores}) + "\n")
        shown = "  ".join(_shown(name, value) for name, value in scores.items())
        self.line(f"epoch {epoch}/{self.recipe.train.epochs}  {split:5}  {shown}")
        undefined = [name for name, value in scores.items() if value is None and name != "ece_scaled"]
        if undefined and split not in self.noted:
            self.noted.add(split)
            self.line(f"note: {', '.join(undefined)} of {split} is not defined: its images are all of one class")
        self.trackers.log({f"{split}/epoch_{name}": value for name, value in scores.items()}, step)
        if split == "val" and self.on_val is not None:
            self.on_val(epoch, main_score(scores))

    def figures(  # noqa: PLR0917 (what is drawn)
        self,
        step: int,
        confusion_KK: np.ndarray,
        mistakes: list[Mistake],
        split: Split,
        view: ImageTransform,
        classes: tuple[str, ...],
    ) -> None:
        """A confusion matrix and a panel of wrongly classified test images, for TensorBoard."""
        drawn = {"confusion": lambda: confusion_figure(confusion_KK, classes)}
        if mistakes:
            drawn["mistakes"] = lambda: mistakes_figure(mistakes, split, view, classes)
        self._draw(step, drawn)

    def class_figure(self, step: int, scores: Sequence[ClassScores], classes: tuple[str, ...]) -> None:
        """The average precision of each class on test, for TensorBoard; of several labels an image."""
        self._draw(step, {"average_precision": lambda: precision_figure(scores, classes)})

    def _draw(self, step: int, drawn: Mapping[str, Callable[[], Any]]) -> None:
        tracker = self.trackers.tensorboard if self.main else None
        if tracker is None:
            return
        writer = tracker.tracker
        with self.trackers.dropping_if_it_fails(tracker), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of characters that the font lacks
            try:
                for name, make in drawn.items():
                    writer.add_figure(f"test/{name}", make(), global_step=step)
            except OSError:
                raise
            except Exception as error:  # of any library: a figure must not fail a finished run
                self.line(f"warning: the figures of test could not be drawn ({type(error).__name__}: {error})")
            writer.flush()

    def line(self, text: str, *, show: bool = True) -> None:
        """A plain line in train.log, shown on the terminal as well unless the bar shows it."""
        if not self.main:
            return
        self._append(self.folder.log, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        if show:
            self.console.print(text, markup=False, soft_wrap=True)

    def flush(self) -> int:
        """The length of metrics.jsonl, with all lines on the disk. Raises OSError where it is full."""
        if not self.main:
            return 0
        for path in list(self.unwritten):
            self._write(path)
        return self.folder.metrics.stat().st_size if self.folder.metrics.exists() else 0

    def close(self) -> None:
        """Stop the bar and the trackers."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self.trackers.finish()

    def _append(self, path: Path, text: str) -> None:
        """Append to a file, later where the disk is full: nothing is lost while the process runs."""
        self.unwritten[path] = self.unwritten.get(path, "") + text
        with contextlib.suppress(OSError):
            self._write(path)

    def _write(self, path: Path) -> None:
        length = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self.unwritten[path])
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, length)  # half a line
            raise
        del self.unwritten[path]

    def images_per_s(self, progress: RunProgress) -> float:
        """Over all processes, since the first steps of this process, evaluations included."""
        if self.started is None or progress.images == self.started[1]:
            return progress.images / progress.seconds if progress.seconds else 0.0
        return (progress.images - self.started[1]) / (time.monotonic() - self.started[0])

    def _text(self, number: int, step: "Step", progress: RunProgress) -> str:
        speed, left = self.images_per_s(progress), self._left(number, progress)
        right, score = 100 * step.correct / max(step.images, 1), self.recipe.data.step_score
        return (
            f"loss {step.loss:.4f}  {score} {right:.1f} %  lr {step.lr:.3g}  "
            f"{speed:.1f} images/s  {peak_memory_mib():.0f} MiB  {timedelta(seconds=round(left))} left"
        )

    def _left(self, number: int, progress: RunProgress) -> float:
        """Remaining seconds of training."""
        speed = self.images_per_s(progress)
        return (self.total_steps - number) * self.recipe.train.batch_size / speed if speed else 0.0


def text_console() -> Console:
    """For lines of text, in a notebook too: there rich would make a table of HTML of each, and ask for widgets."""
    console = Console(highlight=False)
    return Console(highlight=False, force_jupyter=False, force_terminal=False) if console.is_jupyter else console


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return f"{name} -"
    return f"{name} {value:.4f}" if name == "loss" else f"{name} {value:.2f} %"
