"""``dist_vpt.load``: whatever a trained model was saved as."""

from pathlib import Path
from typing import Any

import torch

from dist_vpt.errors import UserError
from dist_vpt.inference.exported_weights import load_export
from dist_vpt.inference.load import load_run
from dist_vpt.inference.tuned import Tuned
from dist_vpt.runs.folder import RunFolder


def load(source: Any, adapters: str = "last", device: Any = None, weights: str | None = None) -> Tuned:
    """What a run has tuned, ready to classify: ``dist_vpt.load("runs/first").predict("photo.jpg")``.

    Args:
        source: a run's folder, what ``dist_vpt.train`` returned, ``hub:user/name``, or a file: one of the two adapter
            files of a run, or one of ``dist-vpt export --format safetensors``.
        adapters: ``last``, those of the last epoch, or ``best``, those of the best one on val.
        device: where it computes; None: the accelerator, if there is one and the run did not ask for the CPU.
        weights: the file of the backbone's weights, where they are not where the run had them.

    Raises:
        UserError: what is no finished run, or does not fit its recipe.
    """
    if adapters not in ("last", "best"):
        raise UserError(f"adapters = {adapters!r}: must be 'last' or 'best'")
    text = str(getattr(source, "path", source))
    path = Path(text).expanduser()
    runtime = {} if device is None or torch.device(device).type != "cpu" else {"device": "cpu"}
    if not path.is_file():
        tuned = load_run(text if text.startswith("hub:") else str(path), adapters, weights, **runtime)
    elif (kind := _kind_of_adapters(path)) is not None:
        tuned = load_run(str(path.parent), kind, weights, **runtime)
    else:
        for option, given in ((f"adapters {adapters}", adapters != "last"), ("weights", weights is not None)):
            if given:
                raise UserError(f"--{option}: {path} holds the backbone and one set of adapters; leave it out")
        tuned = load_export(path)
    return tuned if device is None else tuned.to(device)


def _kind_of_adapters(file: Path) -> str | None:
    """``last`` or ``best`` for an adapter file in the folder of its run."""
    folder = RunFolder(file.parent)
    kinds = {folder.adapters.name: "last", folder.best.name: "best"}
    return kinds.get(file.name) if folder.recipe.is_file() else None
