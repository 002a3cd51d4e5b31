"""Methods: what is trained. A new one is a file beside this one and a row in this table."""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field

from dist_vpt.backbones.backbone import Backbone
from dist_vpt.methods.base import Method, Reader
from dist_vpt.methods.full import Full, FullRecipe
from dist_vpt.methods.linear import Linear, LinearRecipe
from dist_vpt.methods.mlp import MLP, MLPRecipe
from dist_vpt.methods.vpt import VPT, VPTRecipe
from dist_vpt.methods.vqt import VQT, VQTRecipe

METHODS: dict[str, type[Method]] = {
    "vpt": VPT,
    "vqt": VQT,
    "linear": Linear,
    "mlp": MLP,
    "full": Full,
}

MethodRecipe = Annotated[VPTRecipe | VQTRecipe | LinearRecipe | MLPRecipe | FullRecipe, Field(discriminator="name")]


def attach(recipe: MethodRecipe, backbone: Backbone, classes: int, compute: torch.dtype = torch.float32) -> Method:
    """Attach the method that the recipe names to a float32 backbone, to be computed in ``compute``.

    What is trained stays float32; frozen weights are held in ``compute`` from here on.
    """
    make: Callable[[Any, Backbone, int, torch.dtype], Method] = METHODS[recipe.name]  # type: ignore[assignment]
    return make(recipe, backbone, classes, compute)


def is_reader(recipe: MethodRecipe) -> bool:
    """Whether the method only reads the frozen stream."""
    return issubclass(METHODS[recipe.name], Reader)


__all__ = ["METHODS", "Method", "MethodRecipe", "Reader", "attach", "is_reader"]
