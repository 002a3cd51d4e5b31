"""Optimisers whose settings do what they say, and the schedule as a pure function of the step."""

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dist_vpt.methods.base import Method


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimRecipe(BaseModel):
    """Optimiser, learning rate and its schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Literal["sgd", "adam", "adamw"] = Field(
        "sgd", description="sgd and adam add weight decay to the gradient (L2), adamw decouples it"
    )
    lr: float = Field(1.0, gt=0, description="peak learning rate for a global batch of 256")
    scale_lr: bool = Field(True, description="multiply lr by train.batch_size / 256; false: lr is used as it is")
    weight_decay: float = Field(1e-4, ge=0, description="decay of weights and prompts; biases and norms have none")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd's momentum")
    nesterov: bool = Field(False, description="sgd: Nesterov momentum")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="adam, adamw: decay of the first and second moment")
    eps: float = Field(1e-8, gt=0, description="adam, adamw: added to the denominator")
    clip_norm: float | None = Field(None, gt=0, description="the largest global gradient norm; null: no clipping")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after warm-up: cosine to 0, or constant")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear warm-up from 0")
    per: Literal["step", "epoch"] = Field(
        "step",
        description="how often the rate changes; epoch (the published code): the first epoch of a warm-up has 0",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError(
                f"nesterov = true: with name = {self.name} and momentum = {self.momentum} there is no momentum to look "
                "ahead with; set name=sgd and momentum above 0, or nesterov=false"
            )
        return self

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate at the schedule's height for this global batch."""
        return self.lr * batch_size / 256 if self.scale_lr else self.lr


def multiplier(recipe: OptimRecipe, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The share of the peak learning rate at a step (counted from 0 over the whole run)."""
    epoch = step / steps_per_epoch if recipe.per == "step" else step // steps_per_epoch
    if epoch < recipe.warmup_epochs:
        return epoch / recipe.warmup_epochs
    if recipe.schedule == "constant":
        return 1.0
    progress = (epoch - recipe.warmup_epochs) / (epochs - recipe.warmup_epochs)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(recipe: OptimRecipe, method: "Method") -> "Optimizer":
    """An optimiser over the method's trainable parameters alone; biases and norm scales are not decayed."""
    import torch

    decayed: list[torch.nn.Parameter] = []
    exempt: list[torch.nn.Parameter] = []
    for _, parameter in method.trainable():
        (decayed if parameter.ndim > 1 else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Every step sets lr from the schedule; 0 here makes a step that forgot to do so visible.
    if recipe.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.name]
    return kind(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps)


def set_lr(optimizer: "Optimizer", lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
