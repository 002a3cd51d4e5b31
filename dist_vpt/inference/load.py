"""A run's method with its adapters, ready to score images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vpt.data.images import SKIP_HINT, Decoding, decode
from dist_vpt.data.joined import Joined
from dist_vpt.errors import DataError, UserError, WeightsError
from dist_vpt.files import printable, read_json
from dist_vpt.inference.named_classes import probabilities_of, thresholds_of
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import read_adapters, restore
from dist_vpt.runs.folder import RunFolder
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import Inputs, resolve_inputs


@dataclass(frozen=True)
class LoadedRun:
    """A run's method with its adapters, on its device and ready to score."""

    recipe: Recipe
    method: Method
    classes: list[str]
    device: torch.device
    inputs: Inputs
    thresholds: list[float] | None = None  # of each class, where images have several labels

    @torch.no_grad()
    def probabilities(self, images: Any, temperature: float = 1.0) -> Tensor:
        """Of each class, [B, K], of transformed images."""
        return probabilities_of(self.method(images).float() / temperature, self.thresholds)

    def load_images(self, files: Sequence[Path]) -> Any:
        """Image files as the method's input, [B, 3, S, S] on its device; for several backbones ``Joined`` ones."""
        pictures = [self._load_image(file) for file in files]
        of_each = [torch.stack(images).to(self.device) for images in zip(*pictures, strict=True)]
        return of_each[0] if len(of_each) == 1 else Joined(tuple(of_each))

    def _load_image(self, file: Path) -> list[Tensor]:
        """An image file as each backbone's input, [3, S, S]."""
        try:
            picture = decode(file, printable(file), self.recipe.data.max_megapixels, Decoding.of(self.inputs.task))
        except DataError as error:
            raise DataError(str(error).removesuffix(SKIP_HINT)) from error
        try:
            return [transform.eval(picture) for transform in self.inputs.transforms]
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
    check_backbones(recipe, facts, path)
    inputs = resolve_inputs(recipe)
    method, _ = build_method(recipe, inputs, len(classes))
    restore(method, tensors, path)
    device = device_of(recipe)
    return LoadedRun(recipe, method.to(device).eval(), classes, device, inputs, thresholds_of(recipe, facts, classes))


def temperature_of(run: str, adapters: str) -> float:
    """The temperature that the run was given on val. Raises UserError where it has none."""
    folder = RunFolder(run)
    if folder.load().data.labels == "multiple":
        raise UserError("--calibrated: no temperature is fitted with data.labels = multiple; leave it out")
    found = read_json(folder.result).get(adapters) if folder.result.is_file() else None
    fitted = (found or {}).get("temperature") or {}
    if not fitted.get("value"):
        reason = fitted.get("reason", "it was not fitted at the end of the run")
        raise UserError(f"--calibrated: {run} has no temperature for its {adapters} adapters: {reason}; leave it out")
    return float(fitted["value"])


def refuse_several(recipe: Recipe, command: str) -> None:
    """Raises UserError for a recipe with several backbones, of which ``command`` can use one."""
    if recipe.backbones:
        raise UserError(
            f"{command}: works with one backbone, and this recipe has several ({recipe.backbone_name}); name a run or "
            "a recipe with one of them"
        )


def check_backbones(recipe: Recipe, facts: dict[str, Any], path: Path) -> None:
    """Raises WeightsError where adapters were trained on other backbones than a recipe with several has."""
    trained_with = facts.get("recipe") or {}
    several = trained_with.get("backbones")
    if not several and not recipe.backbones:  # a name may be another of the same model
        return
    trained = several or [trained_with.get("backbone", {"name": "one backbone"})]
    # Sizes tell one model at two sizes apart, which has equal shapes in either order.
    before = " + ".join(_shown(member["name"], member.get("image_size")) for member in trained)
    now = " + ".join(_shown(member.name, getattr(member, "image_size", None)) for member in recipe.members)
    if before != now:
        raise WeightsError(
            f"{path}: adapters of {before}, and the recipe has {now}; name the same backbones in the same order"
        )


def _shown(name: str, size: int | None) -> str:
    return f"{name} at {size} px" if size else name


def classes_of(facts: dict[str, Any], path: Path) -> list[str]:
    if "classes" not in facts:
        raise WeightsError(f"{path}: lists no classes, so no run wrote it; restore the file of the run")
    return facts["classes"]


def device_of(recipe: Recipe) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None and recipe.runtime.device == "auto" else torch.device("cpu")
