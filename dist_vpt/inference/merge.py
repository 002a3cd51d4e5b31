"""Adapters folded into plain weights: of a timm model, and of a method that is a backbone with a linear head."""

from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.inference.load import refuse_several
from dist_vpt.inference.tuned import Tuned
from dist_vpt.inference.weightless import build_empty_backbone
from dist_vpt.methods import method_class
from dist_vpt.methods.base import Method
from dist_vpt.methods.config_readers import LinearConfig
from dist_vpt.recipe.schema import Recipe
from dist_vpt.training.components import attach_method


def refuse_unmergeable(recipe: Recipe) -> None:
    """Raises UserError where a recipe's method computes what no plain timm model does, before anything is built.

    What depends on the backbone's modules (a shift without a bias) ``timm_tensors`` finds.
    """
    refuse_several(recipe, "merge")
    method = method_class(recipe.method)
    if method.merged is Method.merged:
        raise UserError(f"{method.unmergeable()}; `dist-vpt export` without --merge writes any method")


def timm_tensors(method: Method) -> dict[str, Tensor]:
    """All tensors of the plain timm model with equal outputs. Raises UserError if there is none."""
    timm_name = method.backbone.timm_name
    tensors = {timm_name(name): tensor for name, tensor in method.backbone.state_dict().items()}
    tensors |= method.merged()
    tensors |= {timm_name(f"head.{name}"): tensor for name, tensor in method.plain_head().items()}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def plain_method(loaded: Tuned, tensors: dict[str, Tensor]) -> Method:
    """The backbone with merged weights (``timm_tensors``) and a linear head: nothing is left of the run's method."""
    recipe = loaded.recipe.model_copy(update={"method": LinearConfig(name="linear", head="published")})
    backbone = build_empty_backbone(recipe, loaded.inputs)
    method = attach_method(recipe, backbone, len(loaded.classes)).eval()
    backbone.load_state_dict(_under_our_names(backbone, tensors))
    method.head.load_state_dict({name: tensors[backbone.timm_name(f"head.{name}")] for name in ("weight", "bias")})
    return method


def _under_our_names(backbone: Backbone, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[backbone.timm_name(name)] for name in backbone.state_dict()}
