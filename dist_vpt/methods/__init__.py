"""Methods: what is trained. A new one is a file beside this one, its recipe, and a row in this table."""

from importlib import import_module
from typing import TYPE_CHECKING

from dist_vpt.methods.config import MethodConfig

if TYPE_CHECKING:
    import torch

    from dist_vpt.backbones.vit import Backbone
    from dist_vpt.methods.base import Method

# Name -> module:class; imported when asked for, so that a recipe is read without torch.
METHODS = {
    "vpt": "dist_vpt.methods.vpt:VPT",
    "vqt": "dist_vpt.methods.vqt:VQT",
    "linear": "dist_vpt.methods.linear:Linear",
    "mlp": "dist_vpt.methods.mlp:MLP",
    "side": "dist_vpt.methods.side:Side",
    "full": "dist_vpt.methods.full:Full",
    "partial": "dist_vpt.methods.partial:Partial",
    "bias": "dist_vpt.methods.bias:Bias",
    "cls": "dist_vpt.methods.cls:Cls",
    "lora": "dist_vpt.methods.lora:LoRA",
    "adapter": "dist_vpt.methods.adapter:Adapter",
    "adaptformer": "dist_vpt.methods.adaptformer:AdaptFormer",
    "ssf": "dist_vpt.methods.ssf:SSF",
}


def attach(recipe: MethodConfig, backbone: "Backbone", classes: int, compute: "torch.dtype | None" = None) -> "Method":
    """Attach the method that the recipe names to a float32 backbone, to be computed in ``compute`` (None: float32).

    What is trained stays float32; frozen weights are held in ``compute`` from here on. Raises UserError for a method
    that cannot work on this backbone.
    """
    import torch

    module, name = METHODS[recipe.name].split(":")
    method = getattr(import_module(module), name)
    method.check_backbone(backbone)
    return method(recipe, backbone, classes, compute or torch.float32)
