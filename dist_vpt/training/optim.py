"""Optimizers, and the learning-rate schedule as a pure function of the step."""

import math
from typing import TYPE_CHECKING, Any

from dist_vpt.errors import UserError
from dist_vpt.methods.layers import layer_scales
from dist_vpt.recipe.optim_section import TORCH_OPTIMIZERS
from dist_vpt.recipe.schema import OptimConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dist_vpt.methods.base import Method


def multiplier(recipe: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The share of the peak learning rate at a step (counted from 0 over the whole run)."""
    epoch = step / steps_per_epoch if recipe.schedule_by == "step" else step // steps_per_epoch
    if epoch < recipe.warmup_epochs:
        return epoch / recipe.warmup_epochs
    if recipe.schedule == "constant":
        return 1.0
    progress = (epoch - recipe.warmup_epochs) / (epochs - recipe.warmup_epochs)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(recipe: OptimConfig, method: "Method", *, fused: bool = False) -> "Optimizer":
    """An optimizer over the method's trainable parameters alone; biases and norm scales are not decayed.

    ``fused``: torch's fused kernels, which need no temporaries and skip a step where ``found_inf`` of the optimizer is
    1, without anybody reading it (torch/optim: ``_step_supports_amp_scaling``). timm's optimizers have none.

    Raises UserError for arguments that timm's optimizer does not take.
    """
    import torch

    groups = parameter_groups(recipe, method)
    if recipe.name not in TORCH_OPTIMIZERS:
        return _from_timm(recipe, groups)
    # Each step sets lr from the schedule; 0 here shows a step that did not.
    kernels = fused or None  # torch's choice
    if recipe.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=kernels)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.name]
    return kind(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=kernels)


def parameter_groups(recipe: OptimConfig, method: "Method") -> list[dict[str, Any]]:
    """Groups of trained tensors with one weight decay, and with ``optim.layer_decay`` one ``lr_scale``."""
    trained = list(method.trainable())
    scales = {} if recipe.layer_decay is None else layer_scales(method, recipe.layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for scale in dict.fromkeys(scales.values()) or (1.0,):
        for exempt in (False, True):
            groups[scale, exempt] = {"params": [], "weight_decay": 0.0 if exempt else recipe.weight_decay}
            if scales:
                groups[scale, exempt]["lr_scale"] = scale
    for name, parameter in trained:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # of a parameter that ZeRO-3 has sharded
        groups[scales.get(name, 1.0), len(shape) <= 1]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def check_optimizer(recipe: OptimConfig) -> None:
    """Raises UserError where timm's optimizer does not take ``optim.options``, found on a step of a few numbers."""
    import torch

    if recipe.name in TORCH_OPTIMIZERS:
        return
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,))]
    optimizer = _from_timm(recipe, [{"params": parameters, "weight_decay": recipe.weight_decay}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # timm reads some of them in a step alone, and fails in many ways
        raise _refused(recipe, error) from error


def _from_timm(recipe: OptimConfig, groups: list[dict[str, Any]]) -> "Optimizer":
    from timm.optim import create_optimizer_v2

    try:
        # lr is set in each step; some optimizers take 0 as "none given".
        return create_optimizer_v2(groups, opt=recipe.name, lr=recipe.lr, weight_decay=0.0, **recipe.options)
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise _refused(recipe, error) from error


def _refused(recipe: OptimConfig, error: Exception) -> UserError:
    return UserError(
        f"optim.options = {recipe.options}: timm's {recipe.name} does not take them ({error}); "
        f"help(timm.optim.get_optimizer_class({recipe.name!r})) shows its arguments, or leave them out"
    )


def set_lr(optimizer: "Optimizer", lr: float) -> None:
    """Set the learning rate of all parameter groups, with ``optim.layer_decay`` each layer's part of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
