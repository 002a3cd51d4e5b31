"""Methods: what is trained. A new one is a file in this folder, its settings, and a row in this table."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_vpt.methods.config import MethodConfig

if TYPE_CHECKING:
    import torch

    from dist_vpt.backbones.vit import Backbone
    from dist_vpt.methods.base import Method

# Name -> module:class, imported lazily, so that a recipe is read without torch.
METHODS = {
    "vpt": "dist_vpt.methods.vpt:VPT",
    "vqt": "dist_vpt.methods.vqt:VQT",
    "linear": "dist_vpt.methods.linear:Linear",
    "knn": "dist_vpt.methods.knn:KNN",
    "logistic": "dist_vpt.methods.logistic:Logistic",
    "mlp": "dist_vpt.methods.mlp:MLP",
    "side": "dist_vpt.methods.side:Side",
    "combo": "dist_vpt.methods.combo:Combo",
    "ladder": "dist_vpt.methods.ladder:Ladder",
    "full": "dist_vpt.methods.full:Full",
    "partial": "dist_vpt.methods.partial:Partial",
    "bias": "dist_vpt.methods.bias:Bias",
    "cls": "dist_vpt.methods.cls:Cls",
    "lora": "dist_vpt.methods.lora:LoRA",
    "adapter": "dist_vpt.methods.adapter:Adapter",
    "adaptformer": "dist_vpt.methods.adaptformer:AdaptFormer",
    "ssf": "dist_vpt.methods.ssf:SSF",
}
VPT_PIXELS = {  # location of the prompts -> the kind of VPT
    "prepend-pixel": "dist_vpt.methods.vpt_pixels:PatchVPT",
    "pad": "dist_vpt.methods.vpt_pixels:FrameVPT",
    "below": "dist_vpt.methods.vpt_pixels:ChannelVPT",
}


def attach(recipe: MethodConfig, backbone: "Backbone", classes: int, compute: "torch.dtype | None" = None) -> "Method":
    """Attach the method that the recipe names to a float32 backbone, to be computed in ``compute`` (None: float32).

    Trained tensors stay float32; frozen weights are held in ``compute`` from here on. Raises UserError for a method
    that does not support this backbone.
    """
    import torch

    method = method_class(recipe)
    method.check_backbone(backbone)
    return method(recipe, backbone, classes, compute or torch.float32)


def method_class(recipe: MethodConfig) -> Any:
    """The class of the method that the recipe names."""
    module, name = VPT_PIXELS.get(getattr(recipe, "location", ""), METHODS[recipe.name]).split(":")
    return getattr(import_module(module), name)
