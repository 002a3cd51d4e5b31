"""From a recipe's data part to labelled splits and batches. Knows nothing of models or of Accelerate."""

from importlib import import_module

import numpy as np

from dist_vpt.data.recipe import DataRecipe
from dist_vpt.data.splits import Split, Splits
from dist_vpt.data.tasks import TASKS, Format, Task, resolve
from dist_vpt.errors import DataError

__all__ = ["FORMATS", "TASKS", "DataRecipe", "Split", "Splits", "Task", "open_splits", "resolve"]

# Storage format -> module:function that opens it; imported when asked for.
FORMATS: dict[Format, str] = {
    "digits": "dist_vpt.data.digits:open_splits",
    "vtab_folder": "dist_vpt.data.vtab_folder:open_splits",
    "fgvc_json": "dist_vpt.data.fgvc_json:open_splits",
    "image_folder": "dist_vpt.data.image_folder:open_splits",
    "hf": "dist_vpt.data.hf:open_splits",
}


def open_splits(recipe: DataRecipe) -> Splits:
    """The splits of the recipe's task, checked as far as possible without decoding an image."""
    task = resolve(recipe)
    module, function = FORMATS[task.format].split(":")
    splits: Splits = getattr(import_module(module), function)(recipe, task)
    if task.classes is not None and len(splits.classes) != task.classes:
        raise DataError(
            f"{recipe.root or task.name}: {len(splits.classes)} classes, but task {task.name!r} has "
            f"{task.classes}; complete the dataset, or give it a task name of its own"
        )
    absent = np.setdiff1d(np.arange(len(splits.classes)), splits[recipe.train_on].labels)
    if len(absent) and recipe.absent_classes == "fail":
        names = ", ".join(splits.classes[k] for k in absent[:10]) + (", ..." if len(absent) > 10 else "")
        raise DataError(
            f"{recipe.root or task.name}: {len(absent)} of {len(splits.classes)} classes have no image in split "
            f"{recipe.train_on!r} ({names}); complete it, or accept that with data.absent_classes=allow"
        )
    return splits
