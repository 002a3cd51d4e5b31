"""Settings of training that are for writers alone, or for some of them."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from dist_vpt.methods.config_base import MethodSettings
from dist_vpt.recipe.optim_section import TORCH_OPTIMIZERS, OptimConfig

STREAMED = (
    "reads the frozen stream, which is computed once for each image as it is, and may be cached; leave it out, or "
    "choose a writer such as lora"
)
TOGETHER = "is trained with many trials in one pass"
STREAM_KEYS = {  # those that change images, or what is asked of one
    "data.rand_augment": None,
    "data.random_erasing": 0.0,
    "data.test_crops": 1,
    "train.mixup_alpha": 0.0,
    "train.cutmix_alpha": 0.0,
}


def mistakes_of_writer_settings(
    method: MethodSettings, optim: OptimConfig, data: BaseModel, train: BaseModel
) -> Iterator[str]:
    """What does not go with the recipe's method. ``data`` and ``train``: those sections of the recipe."""
    named = f"method.name = {getattr(method, 'name')}"  # noqa: B009 (each method has its own type of it)
    if method.reader:
        for key, off in STREAM_KEYS.items():
            section, _, name = key.partition(".")
            if (value := getattr(data if section == "data" else train, name)) != off:
                yield f"{key} = {value}: {named} {STREAMED}"
        if (decay := getattr(train, "model_ema_decay")) is not None:  # noqa: B009 (TrainConfig is above this module)
            yield f"train.model_ema_decay = {decay:g}: {named} {TOGETHER}, of which no average is kept; leave it out"
        if optim.name not in TORCH_OPTIMIZERS:
            yield f"optim.name = {optim.name}: {named} {TOGETHER}, which know sgd, adam and adamw; use one of them"
    if getattr(data, "labels") == "multiple":  # noqa: B009 (as above)
        for name in ("mixup_alpha", "cutmix_alpha"):
            if value := getattr(train, name):
                yield f"train.{name} = {value:g}: images with several labels are not mixed; leave it out"
    if optim.layer_decay is not None and not method.by_layer:
        yield (
            f"optim.layer_decay = {optim.layer_decay:g}: {named} trains nothing that belongs to single layers of the "
            "backbone; leave it out, or choose full, partial, bias, lora, adapter, adaptformer or ssf"
        )


def training_extras(recipe: Any) -> list[str]:
    """The settings of training that are on and that no published protocol has, as ``key=value``."""
    off = {
        "data.rand_augment": None,
        "data.random_erasing": 0.0,
        "train.mixup_alpha": 0.0,
        "train.cutmix_alpha": 0.0,
        "train.model_ema_decay": None,
        "train.sampling": "shuffle",
        "optim.layer_decay": None,
    }
    found = []
    for key, default in off.items():
        section, _, name = key.partition(".")
        if (value := getattr(getattr(recipe, section), name)) != default:
            found.append(f"{key}={value}")
    return found + ([] if recipe.optim.name in TORCH_OPTIMIZERS else [f"optim.name={recipe.optim.name}"])
