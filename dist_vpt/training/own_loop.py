"""A method on a timm model, for a training loop that is not this package's: a plain module.

B images, S image side, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_vpt.backbones.build import wrap
from dist_vpt.errors import RecipeError, UserError
from dist_vpt.methods import METHODS
from dist_vpt.methods import attach as attach_to_backbone
from dist_vpt.methods.base import Method
from dist_vpt.methods.config import MethodConfig
from dist_vpt.recipe.loading import recipe_of
from dist_vpt.runtime.cpu_speed import use_faster_products

AS_GIVEN = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # images are normalized by whoever gives them


def attach(
    method: str | Mapping[str, Any] | MethodConfig,
    model: nn.Module,
    classes: int | Sequence[str],
    *,
    images: Tensor | Sequence[Tensor] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **settings: Any,
) -> Method:
    """A method on a timm model: a module that maps images, normalized as for the model, to float32 logits [B, K].

    The model is taken apart and frozen: use what is returned in its place. What the optimizer gets is
    ``trainable()``, pairs of name and parameter; what is worth saving is ``adapter_tensors()``.

    Args:
        method: its name (``"vpt"``) or that of its recipe (``"vpt_deep"``), or the section ``method`` of a recipe.
        model: a timm VisionTransformer, Eva or SwinTransformer; its classifier is dropped.
        classes: their number K, or their names.
        images: training images [B, 3, S, S], or some batches of them, from which prompts, queries and the head's
            normalization are initialized. Without them both start as if features had mean 0 and deviation 1.
        dtype: that the frozen weights are held and computed in; what is trained stays float32.
        seed: of what is drawn from ``images``; all else is drawn from torch's generator.
        settings: keys of the section ``method``, such as ``prompts=20``.

    Raises:
        UserError: a setting, or a model, that the method does not support.
    """
    section = _section(method, settings)
    if section.fitted:
        raise UserError(
            f"method.name = {section.name}: is computed from all features at once, and no loop trains it; use "
            "dist_vpt.train, or attach linear"
        )
    if section.frame:
        raise UserError(
            "method.location = pad: needs a backbone for the framed image; use dist_vpt.train, or another location"
        )
    count = classes if isinstance(classes, int) else len(classes)
    if count < 2:
        raise UserError(f"classes = {classes!r}: a classifier needs two or more; give their number or their names")
    use_faster_products()
    stochastic = any(getattr(module, "drop_prob", 0) for module in model.modules())
    attached = attach_to_backbone(section, wrap(model, **AS_GIVEN, stochastic=stochastic), count, dtype)
    batches = [images] if isinstance(images, Tensor) else list(images)
    if batches and attached.inits_from_images:
        attached.init_from_images(batches, seed)
    return attached


def _section(method: str | Mapping[str, Any] | MethodConfig, settings: Mapping[str, Any]) -> MethodConfig:
    """The section ``method`` with its settings. Raises RecipeError."""
    if isinstance(method, str):
        given = recipe_of(method, {}).method.model_dump() if method not in METHODS else {"name": method}
    elif isinstance(method, Mapping):
        given = dict(method)
    elif hasattr(method, "model_dump"):
        given = method.model_dump()
    else:
        raise RecipeError(f"method = {method!r}: give a name such as 'vpt', or a dictionary with the key name")
    return recipe_of({"method": given | dict(settings)}, {}).method
