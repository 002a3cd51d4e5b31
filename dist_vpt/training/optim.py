"""Optimizers, and the learning-rate schedule as a pure function of the step."""

import math
from typing import TYPE_CHECKING

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
    1, without anybody reading it (torch/optim: ``_step_supports_amp_scaling``).
    """
    import torch

    decayed: list[torch.nn.Parameter] = []
    exempt: list[torch.nn.Parameter] = []
    for _, parameter in method.trainable():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # of a parameter that ZeRO-3 has sharded
        (decayed if len(shape) > 1 else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Each step sets lr from the schedule; 0 here shows a step that did not.
    kernels = fused or None  # torch's choice
    if recipe.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=kernels)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.name]
    return kind(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=kernels)


def set_lr(optimizer: "Optimizer", lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
