"""What images come in as: the task, the preprocessing and the transform of each backbone."""

from dataclasses import dataclass, replace
from typing import cast

from dist_vpt.backbones.build import Preprocessing, preprocessing_of
from dist_vpt.backbones.config import naming_member
from dist_vpt.backbones.weights.zoo import IMAGENET
from dist_vpt.data.config import DataConfig, resolve
from dist_vpt.data.tasks import Interpolation, Task
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.recipe.schema import Recipe


@dataclass(frozen=True)
class Inputs:
    """A run's task, preprocessing and transform, resolved once from the recipe's data and backbone sections."""

    task: Task
    preprocessing: Preprocessing  # that the weights were trained with
    transform: ImageTransform
    mean: tuple[float, ...]  # of the channels in [0, 1], with which images are normalized
    std: tuple[float, ...]
    others: tuple["Inputs", ...] = ()  # of the other backbones, where there are several

    @property
    def of_each(self) -> "tuple[Inputs, ...]":
        """Those of each backbone."""
        return (self, *self.others)

    @property
    def transforms(self) -> tuple[ImageTransform, ...]:
        """Those of each backbone."""
        return tuple(each.transform for each in self.of_each)

    @property
    def sizes(self) -> str:
        """The sides of the backbones' images, for messages."""
        return " and ".join(dict.fromkeys(f"{transform.image_size} px" for transform in self.transforms))

    def without_augmentation(self) -> "Inputs":
        """The same, with each image as evaluation shows it."""
        others = tuple(each.without_augmentation() for each in self.others)
        return replace(self, transform=replace(self.transform, augment="none"), others=others)


def resolve_inputs(recipe: Recipe) -> Inputs:
    """The recipe's own settings, else those of the task, else those of the weights.

    Nothing is drawn for methods that are fitted to each image once, and for several backbones, which see the same
    images.
    """
    found = []
    for number, each in enumerate(recipe.of_each_backbone):
        with naming_member(recipe.members, number):
            found.append(_resolved(each))
    inputs = replace(found[0], others=tuple(found[1:]))
    return inputs.without_augmentation() if recipe.method.fitted or recipe.backbones else inputs


def _resolved(recipe: Recipe) -> Inputs:
    data, backbone = recipe.data, recipe.backbone
    task, preprocessing = resolve(data), preprocessing_of(backbone)
    transform = ImageTransform(
        image_size=data.image_size or preprocessing.image_size,
        interpolation=task.interpolation or cast(Interpolation, preprocessing.interpolation),
        crop_mode=task.crop_mode,
        augment=task.augment,
    )
    return Inputs(task, preprocessing, transform, *channels(data, task, preprocessing))


def channels(data: DataConfig, task: Task, preprocessing: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels, in [0, 1], with which images are normalized."""
    if data.mean is not None and data.std is not None:
        return data.mean, data.std
    kinds = {
        "vpt": (IMAGENET.mean, IMAGENET.std),
        "weights": (preprocessing.mean, preprocessing.std),
        "none": ((0.0,) * 3, (1.0,) * 3),
    }
    return kinds[task.normalize]
