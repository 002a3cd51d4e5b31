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

from dist_vpt.errors import RunFolderError
from dist_vpt.files import write_atomically
from dist_vpt.methods.base import Reader
from dist_vpt.recipe.differences import identity_keys
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import collect, restore
from dist_vpt.runs.progress import Progress

INIT_SCALE = 65536.0  # of gradients in fp16, as torch.amp.GradScaler's


@dataclass
class Trial:
    """One setting of a sweep."""

    recipe: Recipe
    reader: Reader
    state: dict[str, Tensor] = field(default_factory=dict)  # of its optimizer and gradient scale; empty: to be started
    progress: Progress = field(default_factory=Progress)
    diverged: str = ""  # why it was ended
    best: dict[str, Tensor] = field(default_factory=dict)  # trained tensors of the best epoch on val, where kept

    @property
    def running(self) -> bool:
        return not self.diverged and not self.progress.ended

    @property
    def draws(self) -> bool:
        """Whether its reader draws random numbers in training."""
        return getattr(self.recipe.method, "dropout", 0.0) > 0

    def __post_init__(self) -> None:
        self.state = self.state or _started(self.recipe, self.reader)


def _started(recipe: Recipe, reader: Reader) -> dict[str, Tensor]:
    """What an optimizer and a gradient scale remember before the first step."""
    moments = {"sgd": ("momentum_buffer",) if recipe.optim.momentum else ()}.get(
        recipe.optim.name, ("exp_avg", "exp_avg_sq")
    )
    named = {} if recipe.method.fitted else dict(reader.trainable())
    if not named:
        return {}
    state = {f"{moment}.{name}": torch.zeros_like(p.detach()) for moment in moments for name, p in named.items()}
    device = next(iter(named.values())).device
    numbers = {"steps": 0.0}
    if recipe.runtime.precision == "fp16":
        numbers |= {"scale": INIT_SCALE, "clean_steps": 0.0}
    return state | {key: exact_numbers(number, device) for key, number in numbers.items()}


def exact_numbers(numbers: float | Sequence[float], device: torch.device) -> Tensor:
    """float64, as torch's optimizers compute with numbers: only results are rounded. MPS has float32 alone."""
    return torch.tensor(numbers, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def write_trials(file: Path, trials: Sequence[Trial], shared: dict[str, Any]) -> None:
    """Write the trials and ``shared``, what they have in common. Raises OSError where the disk is full."""
    content = {
        **shared,
        "recipes": [identity_keys(trial.recipe) for trial in trials],
        "trials": [
            {
                "trained": collect(trial.reader),
                "state": {key: tensor.cpu().clone() for key, tensor in trial.state.items()},
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
            if saved.get("state", {}).keys() != trial.state.keys():
                raise ValueError("it is of another optimizer, or of an earlier version")
            for key, tensor in saved["state"].items():
                trial.state[key].copy_(tensor)
            trial.progress, trial.diverged, trial.best = Progress(**saved["progress"]), saved["diverged"], saved["best"]
        return {key: content[key] for key in ("epoch", "step", "seconds", "skipped")}
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{file}: not visible here, but to process 0; start again in a minute, or choose a run.dir that all "
            "nodes share"
        ) from error
    except Exception as error:  # torch.load's errors come in many types; all mean that the file is no state
        raise RunFolderError(f"{file}: damaged state ({error}); remove it to train its trials anew") from error
