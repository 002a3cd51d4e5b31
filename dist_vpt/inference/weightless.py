"""A recipe's backbone without its weights, which come from another file than the recipe names."""

from typing import Any

from dist_vpt.backbones.vit import Backbone
from dist_vpt.recipe.schema import Recipe
from dist_vpt.training.components import build_backbone
from dist_vpt.training.inputs import Inputs


def build_empty_backbone(recipe: Recipe, inputs: Inputs) -> Backbone:
    """The backbone, or the group of backbones, with random weights, for tensors that are loaded into it next."""
    random: dict[str, Any] = {"weights": "random", "entry": None}
    if recipe.backbones is None:
        recipe = recipe.changed("backbone", **random)
    else:
        members = tuple(member.model_copy(update=random) for member in recipe.backbones)
        recipe = recipe.model_copy(update={"backbones": members})
    return build_backbone(recipe, inputs)[0]
