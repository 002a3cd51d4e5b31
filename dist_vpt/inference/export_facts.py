"""What an exported file says about itself: the same in each format, as JSON under these names."""

import re
from typing import Any

from dist_vpt import __version__
from dist_vpt.inference.tuned import Tuned
from dist_vpt.training.inputs import Inputs


def describe(loaded: Tuned, inside: str, quantize: str, adapters: str) -> dict[str, Any]:
    """Classes, where the numbers come from, and how a picture becomes the file's input.

    ``inside``: what of the preprocessing is inside the file. Of several backbones, each has an entry of ``inputs``.
    """
    recipe, task = loaded.recipe, loaded.inputs.task
    facts: dict[str, Any] = {
        "dist_vpt": __version__,
        "task": recipe.data.task,
        "method": recipe.method.name,
        "backbone": recipe.backbone_name,
        "classes": loaded.classes,
        "adapters": adapters,
        "quantize": quantize,
        "preprocessing": inside,
        "exif": task.exif,
        "background": task.background,
    }
    if recipe.data.test_crops > 1:  # the file takes one view of an image, and the run's scores are of several
        facts["test_crops"] = recipe.data.test_crops
    if loaded.thresholds is not None:  # each class is a yes or no of its own: its sigmoid reaches this, or not
        facts["thresholds"] = list(loaded.thresholds)
    each = [_input(inputs, inside) for inputs in loaded.inputs.of_each]
    if len(each) == 1:
        return facts | each[0]
    names = backbone_names(loaded) if inside != "resize" else ["images"] * len(each)
    named = zip(names, recipe.members, each, strict=True)
    return facts | {"inputs": [{"name": name, "backbone": member.name} | of for name, member, of in named]}


def _input(inputs: Inputs, inside: str) -> dict[str, Any]:
    """Of one backbone; mean and std are of pixels in [0, 1]."""
    transform = inputs.transform
    dtype = {"none": "float32", "normalize": transform.dtype.__name__, "resize": "uint8"}[inside]
    return {
        "dtype": dtype,
        "image_size": transform.image_size,
        "interpolation": transform.interpolation,
        "crop_mode": transform.crop_mode,
        "shorter_side": transform.shorter_side if transform.crop_mode == "crop" else None,
        "mean": list(inputs.mean),
        "std": list(inputs.std),
    }


def input_names(loaded: Tuned, inside: str) -> list[str]:
    """Names of the file's inputs: ``images``, or one for each of several backbones."""
    several = len(loaded.recipe.members) > 1 and inside != "resize"
    return backbone_names(loaded) if several else ["images"]


def backbone_names(loaded: Tuned) -> list[str]:
    """A name for each backbone, in letters, digits and _; with the image size where two are the same model."""
    names = [re.sub(r"\W+", "_", member.name) for member in loaded.recipe.members]
    if len(set(names)) == len(names):
        return names
    return [f"{name}_{size.image_size}" for name, size in zip(names, loaded.inputs.transforms, strict=True)]
