"""Which optimizers step right inside DeepSpeed's ZeRO, on flat parts of the tensors of one group at a time."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from dist_vpt.errors import UserError
from dist_vpt.recipe.optim_section import TORCH_OPTIMIZERS
from dist_vpt.recipe.schema import OptimConfig, Recipe

# Those that change a number by its own gradients alone, whatever the shape and the norm of the tensor that it is in.
ELEMENTWISE = (
    *TORCH_OPTIMIZERS,
    "adabelief",
    "adadelta",
    "adagrad",
    "adamax",
    "adan",
    "adopt",
    "laprop",
    "lion",
    "nadam",
    "nadamw",
    "radam",
    "rmsprop",
    "rmsproptf",
    "sgdw",
)
# Options of theirs: the first scales by a mean over each tensor, the second by the root mean square of each tensor.
NOT_ELEMENTWISE_OPTIONS = ("caution", "clipping_threshold")
SUPPORTED = [name for name in ELEMENTWISE if name != "adagrad"]


def unsupported_optimizer(optim: OptimConfig) -> str:
    """Why an optimizer cannot step under ZeRO 1 to 3, with the fix, or ""."""
    whole = "a step needs norms or means of whole tensors, and ZeRO gives an optimizer flat parts of them"
    another = f"use one of {', '.join(SUPPORTED)}, or start with the ddp strategy"
    if optim.name not in ELEMENTWISE:
        return f"optim.name = {optim.name}: {whole}; {another}"
    if optim.name not in SUPPORTED:
        return f"optim.name = adagrad: DeepSpeed makes it anew without the recipe's optim.weight_decay; {another}"
    for key in NOT_ELEMENTWISE_OPTIONS:
        if value := optim.options.get(key):
            return f"optim.options.{key} = {value}: {whole}; leave it out, or start with the ddp strategy"
    return ""


def unsupported_sharding(recipe: Recipe, sharding: Mapping[str, Any]) -> str:
    """Why an entry of DeepSpeed's ``zero_optimization`` does not go with a recipe, with the fix, or ""."""
    place = "DeepSpeed configuration: zero_optimization"
    ratio = (sharding.get("offload_optimizer") or {}).get("ratio", 1)
    if ratio != 1:
        return (
            f"{place}.offload_optimizer.ratio = {ratio}: DeepSpeed steps on what it does not offload with an AdamW of "
            "its own, and not with the recipe's optim; remove it"
        )
    device = (sharding.get("offload_param") or {}).get("device")
    if device == "nvme" and recipe.train.model_ema_decay is not None:
        return (
            f"{place}.offload_param.device = nvme: weights on a disk cannot be averaged (train.model_ema_decay); use "
            "device = cpu, or leave model_ema_decay out"
        )
    return ""


def fit_into_zero3(sharding: Any, optim: OptimConfig) -> None:
    """Let the optimizer inside DeepSpeed's count its steps as it would alone; ``sharding``: DeepSpeed's.

    Nothing is done without ZeRO-3: ZeRO 1 and 2 let an optimizer see the group that it steps on, and no other.

    Raises UserError, on all processes, where DeepSpeed takes several steps for a group that counts them.
    """
    parts = getattr(sharding, "fp32_partitioned_groups_flat", None)
    if parts is None:
        return
    if optim.name == "adan" and len(parts) > len(sharding.optimizer.param_groups):
        error = UserError(
            f"DeepSpeed configuration: zero_optimization.sub_group_size = {sharding.sub_group_size}: cuts a group of "
            "parameters into several, and adan would count a step for each of them; use a larger one, or another "
            "optim.name, such as adamw"
        )
        error.shared = True
        raise error
    _count_what_steps(sharding.optimizer)


def _count_what_steps(optimizer: Optimizer) -> None:
    """Let a step count for groups with parameters alone: ZeRO-3 empties all groups but the one that it steps."""
    counts: list[Any] = []

    def remember(*_: Any) -> None:
        counts[:] = [group.get("step", 0) for group in optimizer.param_groups]

    def restore(*_: Any) -> None:
        for group, count in zip(optimizer.param_groups, counts, strict=True):
            if not group["params"] and "step" in group:
                group["step"] = count

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(restore)
