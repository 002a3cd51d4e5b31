"""A run's method with its adapters, ready to score images."""

from pathlib import Path
from typing import Any

import torch

from dist_vpt.errors import UserError, WeightsError
from dist_vpt.files import read_json
from dist_vpt.inference.hub import adapters_file, open_run
from dist_vpt.inference.named_classes import thresholds_of
from dist_vpt.inference.tuned import Tuned
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.sharing import with_weights
from dist_vpt.runs.adapters import read_adapters, restore
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs


def load_run(run: str, adapters: str, weights: str | None = None, **runtime: Any) -> Tuned:
    """A run by its folder or as ``hub:user/name``.

    ``adapters``: last or best. ``weights``: the file of the backbone's weights, where they are not where the recipe has
    them. ``runtime``: keys of the recipe's runtime to change.
    """
    folder = open_run(run)
    path = adapters_file(folder, adapters)
    recipe = with_weights(folder.load(), weights, run).changed("runtime", **runtime)
    tensors, facts = read_adapters(path)
    classes = classes_of(facts, path)
    check_backbones(recipe, facts, path)
    inputs = resolve_inputs(recipe)
    method, _ = build_method(recipe, inputs, len(classes))
    restore(method, tensors, path)
    tuned = Tuned(recipe, method, classes, inputs, thresholds_of(recipe, facts, classes))
    return tuned.to(device_of(recipe))


def temperature_of(run: str, adapters: str) -> float:
    """The temperature that the run was given on val. Raises UserError where it has none."""
    if Path(run).is_file():
        raise UserError(f"--calibrated: {run} is one file, and the temperature is in the run's folder; name that")
    folder = open_run(run)
    if folder.load().data.labels == "multiple":
        raise UserError("--calibrated: no temperature is fitted with data.labels = multiple; leave it out")
    found: dict[str, Any] = (read_json(folder.result).get(adapters) if folder.result.is_file() else None) or {}
    fitted: dict[str, Any] = found.get("temperature") or {}
    if not fitted.get("value"):
        origin = folder.imported_from()
        reason = f"it was imported from {origin}" if origin else "it was not fitted at the end of the run"
        reason = fitted.get("reason", reason)
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
    recorded = facts.get("recipe")
    trained_with: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
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
    classes = facts.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise WeightsError(f"{path}: lists no classes, so no run wrote it; restore the file of the run")
    return classes


def device_of(recipe: Recipe) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None and recipe.runtime.device == "auto" else torch.device("cpu")
