"""The optim section of a recipe."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dist_vpt.recipe.fields import Section, or_null

TORCH_OPTIMIZERS = ("sgd", "adam", "adamw")  # all others are timm's

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """Optimizer, learning rate and its schedule."""

    name: Literal[
        "sgd",
        "adam",
        "adamw",
        "adabelief",
        "adadelta",
        "adafactor",
        "adagrad",
        "adamax",
        "adan",
        "adopt",
        "lamb",
        "lambc",
        "laprop",
        "larc",
        "lars",
        "lion",
        "nadam",
        "nadamw",
        "radam",
        "rmsprop",
        "rmsproptf",
        "sgdw",
    ] = Field(
        "adamw",
        description="sgd and adam add weight decay to the gradient (L2), adamw decouples it; all others are timm's by "
        "the name that timm gives them (timm.optim.create_optimizer_v2), for writers",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="timm's optimizers: further arguments, such as {betas: [0.9, 0.99]}; those left out have timm's "
        "defaults",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    scale_lr: bool = Field(
        False, description="true: lr is for a global batch of 256 images, and multiplied by train.batch_size / 256"
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="layer-wise learning rates: the head's is lr, and that of each layer before it this many times "
        "the next one's, with timm's layers (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT); for methods that "
        "train inside the blocks; null: lr for all",
    )
    weight_decay: float = Field(
        1e-4, ge=0, description="weight decay of matrices and prompts; biases and norms have none"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: momentum")
    nesterov: bool = Field(False, description="sgd: use Nesterov momentum; needs momentum above 0")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="adam, adamw: decay rates of the first and second moment"
    )
    eps: float = Field(1e-8, gt=0, description="adam, adamw: added to the denominator")
    clip_norm: float | None = Field(None, gt=0, description="clip gradients to this global L2 norm; null: no clipping")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after warm-up: cosine decay to 0, or constant"
    )
    warmup_epochs: float = Field(
        0.0,
        ge=0,
        description="linear warm-up from 0, in epochs; null: a tenth of train.epochs",
        json_schema_extra=or_null,
    )
    schedule_by: Literal["step", "epoch"] = Field(
        "step",
        description="how often the learning rate changes; epoch (the published code): a warm-up's first epoch has 0",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        mistakes = list(self._mistakes())
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _mistakes(self) -> Iterator[str]:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            yield (
                f"nesterov = true: needs name = sgd and momentum above 0, not name = {self.name} and momentum = "
                f"{self.momentum}; set them, or nesterov=false"
            )
        if self.name in TORCH_OPTIMIZERS:
            if self.options:
                yield (
                    f"options = {self.options}: are arguments of timm's optimizers, and {self.name} is torch's; use "
                    "momentum, nesterov, betas and eps, or leave them out"
                )
            return
        fields = type(self).model_fields
        for key in ("momentum", "betas", "eps"):
            value = getattr(self, key)
            if value != fields[key].default:
                shown = list(value) if isinstance(value, tuple) else value
                yield (
                    f"{key} = {shown}: is for {'sgd' if key == 'momentum' else 'adam and adamw'}, and {self.name} is "
                    f"timm's; put it into options if timm's {self.name} has it, or leave it out"
                )
        if taken := sorted({"lr", "weight_decay", "params"} & self.options.keys()):
            yield f"options.{taken[0]}: is set by the recipe; use optim.lr and optim.weight_decay, and leave it out"

    def peak_lr(self, batch_size: int) -> float:
        """The highest learning rate of the schedule for this global batch."""
        return self.lr * batch_size / 256 if self.scale_lr else self.lr
