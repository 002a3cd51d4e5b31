"""What images come in as: the task, the preprocessing and the transform of each backbone."""

from dataclasses import dataclass, replace
from typing import cast

from dist_vpt.backbones.build import Preprocessing, preprocessing_of
from dist_vpt.backbones.config import naming_member
from dist_vpt.backbones.vit import Backbone
from dist_vpt.backbones.weights.zoo import IMAGENET
from dist_vpt.data.augmentation import BatchAugmentation
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

    def one_view(self) -> "Inputs":
        """The same, with one view of each image in evaluation, whatever data.test_crops is."""
        others = tuple(each.one_view() for each in self.others)
        return replace(self, transform=replace(self.transform, test_crops=1), others=others)

    def without_augmentation(self) -> "Inputs":
        """The same, with each image as evaluation shows it."""
        others = tuple(each.without_augmentation() for each in self.others)
        return replace(self, transform=replace(self.transform, augment="none", rand_augment=None), others=others)


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
    mean, std = channels(data, task, preprocessing)
    transform = ImageTransform(
        image_size=data.image_size or preprocessing.image_size,
        interpolation=task.interpolation or cast(Interpolation, preprocessing.interpolation),
        crop_mode=task.crop_mode,
        augment=task.augment,
        rand_augment=data.rand_augment,
        mean=mean,
        test_crops=data.test_crops,
    )
    return Inputs(task, preprocessing, transform, mean, std)


def augmentation_of(recipe: Recipe, backbone: Backbone) -> BatchAugmentation | None:
    """What is done to training batches on the device, if the recipe wants anything of it."""
    data, train = recipe.data, recipe.train
    if not train.mixes and not data.random_erasing:
        return None
    return BatchAugmentation(
        mixup_alpha=train.mixup_alpha,
        cutmix_alpha=train.cutmix_alpha,
        prob=train.mixup_prob,
        switch_prob=train.mixup_switch_prob,
        erasing=data.random_erasing,
        erasing_mode=data.random_erasing_mode,
        seed=recipe.data_seed,
        mean=backbone.mean,
        std=backbone.std,
    )


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
