"""The tasks, one row each, and what a recipe makes of its row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dist_vpt.data.recipe import DataRecipe

Format = Literal["digits", "vtab_folder", "fgvc_json", "image_folder", "hf"]
Resize = Literal["squash", "crop"]
Augment = Literal["none", "fgvc"]
Cache = Literal["none", "memory"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One dataset and the protocol under which its numbers are published."""

    name: str  # the row's name, or the recipe's free one
    format: Format  # how the dataset is stored
    classes: int | None = None  # number of classes the storage must have; None: whatever it has
    resize: Resize = "crop"  # squash to a square, or shorter side and centre crop
    augment: Augment = "none"  # fgvc: random crop and flip in training
    cache: Cache = "none"  # memory: decode and resize each image once per process
    upright: bool = False  # turned by its EXIF orientation; the published loaders of VTAB and FGVC do not


TASKS: dict[str, Task] = {
    "digits": Task(name="digits", format="digits", classes=10, resize="squash", cache="memory"),
}

# What a task that is no row gets from its storage format.
FORMAT_TASKS: dict[Format, Task] = {
    "digits": Task(name="", format="digits", classes=10, resize="squash", cache="memory"),
    "vtab_folder": Task(name="", format="vtab_folder", resize="squash"),
    "fgvc_json": Task(name="", format="fgvc_json", augment="fgvc"),
    "image_folder": Task(name="", format="image_folder", upright=True),
    "hf": Task(name="", format="hf", upright=True),
}


def resolve(recipe: DataRecipe) -> Task:
    """The task's row, or for a free name the format's, with the recipe's own settings on top."""
    if recipe.task in TASKS:
        task = TASKS[recipe.task]
    else:
        assert recipe.format is not None  # DataRecipe asks for a format where the task is no row
        task = replace(FORMAT_TASKS[recipe.format], name=recipe.task)
    return replace(
        task,
        format=recipe.format or task.format,
        resize=recipe.resize or task.resize,
        augment=recipe.augment or task.augment,
        cache=recipe.cache or task.cache,
    )
