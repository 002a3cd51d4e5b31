"""Methods: what is trained. A new one is a file beside this one and a row in this table."""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field

from dist_vpt.backbones.backbone import Backbone
from dist_vpt.methods.base import Method
from dist_vpt.methods.full import Full, FullRecipe
from dist_vpt.methods.linear import Linear, LinearRecipe
from dist_vpt.methods.vpt import VPT, VPTRecipe

METHODS: dict[str, Callable[[Any, Backbone, int, torch.dtype], Method]] = {
    "vpt": VPT,
    "linear": Linear,
    "full": Full,
}

MethodRecipe = Annotated[VPTRecipe | LinearRecipe | FullRecipe, Field(discriminator="name")]


def attach(recipe: MethodRecipe, backbone: Backbone, classes: int, compute: torch.dtype = torch.float32) -> Method:
    """Attach the method that the recipe names to a float32 backbone, to be computed in ``compute``.

    What is trained stays float32; frozen weights are held in ``compute`` from here on.
    """
    return METHODS[recipe.name](recipe, backbone, classes, compute)


__all__ = ["METHODS", "Method", "MethodRecipe", "attach"]
