"""A run's method with its adapters, ready to score images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vpt.data.images import SKIP_HINT, Decoding, decode
from dist_vpt.errors import DataError, WeightsError
from dist_vpt.files import printable
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import read_adapters, restore
from dist_vpt.runs.folder import RunFolder
from dist_vpt.training.components import Inputs, build_method, resolve_inputs


@dataclass(frozen=True)
class LoadedRun:
    """A run's method with its adapters, on its device and ready to score."""

    recipe: Recipe
    method: Method
    classes: list[str]
    device: torch.device
    inputs: Inputs

    def load_image(self, file: Path) -> Tensor:
        """An image file as the method's input, [3, S, S]."""
        try:
            picture = decode(file, printable(file), self.recipe.data.max_megapixels, Decoding.of(self.inputs.task))
        except DataError as error:
            raise DataError(str(error).removesuffix(SKIP_HINT)) from error
        try:
            return self.inputs.transform.eval(picture)
        except DataError as error:
            raise DataError(f"{printable(file)}: {error}") from error


def load_run(run: str, adapters: str, **runtime: Any) -> LoadedRun:
    """``adapters``: last or best; ``runtime``: keys of the recipe's runtime to change."""
    folder = RunFolder(run)
    folder.refuse_sweep()
    path = folder.best if adapters == "best" else folder.adapters
    recipe = folder.load().changed("runtime", **runtime)
    tensors, facts = read_adapters(path)
    classes = classes_of(facts, path)
    inputs = resolve_inputs(recipe.data, recipe.backbone)
    method, _ = build_method(recipe, inputs, len(classes))
    restore(method, tensors, path)
    device = device_of(recipe)
    return LoadedRun(recipe, method.to(device).eval(), classes, device, inputs)


def classes_of(facts: dict[str, Any], path: Path) -> list[str]:
    if "classes" not in facts:
        raise WeightsError(f"{path}: lists no classes, so no run wrote it; restore the file of the run")
    return facts["classes"]


def device_of(recipe: Recipe) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None and recipe.runtime.device == "auto" else torch.device("cpu")
