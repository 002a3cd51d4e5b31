"""A trial, and the file that holds the state of trials which train together.

Written by process 0 alone, whole or not at all.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from dist_vpt.errors import RunFolderError
from dist_vpt.files import write_atomically
from dist_vpt.methods.base import Reader
from dist_vpt.recipe.differences import identity_keys
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import collect, restore
from dist_vpt.runs.progress import Progress


@dataclass
class Trial:
    """One setting of a sweep."""

    recipe: Recipe
    reader: Reader
    optimizer: torch.optim.Optimizer
    scaler: GradScaler  # does nothing unless the stream is of fp16
    progress: Progress = field(default_factory=Progress)
    diverged: str = ""  # why it was ended
    best: dict[str, Tensor] = field(default_factory=dict)  # trained tensors of the best epoch on val, where kept

    @property
    def running(self) -> bool:
        return not self.diverged and not self.progress.ended

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self.reader.trainable()]


def write_trials(file: Path, trials: Sequence[Trial], shared: dict[str, Any]) -> None:
    """Write the trials and ``shared``, what they have in common. Raises OSError where the disk is full."""
    content = {
        **shared,
        "recipes": [identity_keys(trial.recipe) for trial in trials],
        "trials": [
            {
                "trained": collect(trial.reader),
                "optimizer": trial.optimizer.state_dict(),
                "scaler": trial.scaler.state_dict(),
                "progress": asdict(trial.progress),
                "diverged": trial.diverged,
                "best": trial.best,
            }
            for trial in trials
        ],
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(file, buffer.getbuffer())


def read_trials(file: Path, trials: Sequence[Trial]) -> dict[str, Any]:
    """Set the trials to what the file holds of them; returns what they have in common.

    Raises RunFolderError where the file is damaged, of other trials or not visible here.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if content["recipes"] != [identity_keys(trial.recipe) for trial in trials]:
            raise ValueError("it is of other trials")
        for trial, saved in zip(trials, content["trials"], strict=True):
            restore(trial.reader, saved["trained"], file)
            trial.optimizer.load_state_dict(saved["optimizer"])
            trial.scaler.load_state_dict(saved["scaler"])
            trial.progress, trial.diverged, trial.best = Progress(**saved["progress"]), saved["diverged"], saved["best"]
        return {key: content[key] for key in ("epoch", "step", "seconds", "skipped")}
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{file}: not visible here, but to process 0; start again in a minute, or choose a run.dir that all "
            "nodes share"
        ) from error
    except Exception as error:  # torch.load's errors come in many types; all mean that the file is no state
        raise RunFolderError(f"{file}: damaged state ({error}); remove it to train its trials anew") from error
