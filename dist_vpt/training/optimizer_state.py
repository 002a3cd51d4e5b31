"""The optimizer state of each trained tensor, by name and unsharded, whatever the strategy.

DeepSpeed keeps it in flat partitions, some of them on each process. Gathered by name it is the same for every strategy
and number of processes, so that any of them can resume from it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_vpt.distributed.zero import held_part, release_gathered
from dist_vpt.methods.base import Method

GROUP = "group "  # and its number, in place of a tensor's name: what an optimizer counts for a group
NUMBERS = (torch.int64, torch.float64)  # types of counts and rates that are no tensors; tensors of them are float32


def gather_optimizer_state(method: Method, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """``NAME/KEY`` and tensor of the whole optimizer state. A collective call under ZeRO."""
    kept = optimizer.optimizer  # below Accelerate's wrapper
    for number, group in enumerate(_stepping(kept).param_groups):
        if "step" in group:  # timm's adan and lamb count there
            yield f"{GROUP}{number}/step", torch.as_tensor(group["step"])
    if not _sharded(kept):
        for name, parameter in method.trainable():
            for key, value in kept.state.get(parameter, {}).items():
                if value is not None:  # sgd without momentum
                    yield f"{name}/{key}", value if isinstance(value, Tensor) else _number(value)
        return
    from deepspeed.utils import safe_get_full_optimizer_state

    release_gathered(parameter for _, parameter in method.trainable())  # by an evaluation
    partitions = _partitions(kept)
    _link(kept)
    for name, parameter in method.trainable():
        for key, value in kept.optimizer.state[partitions[parameter]].items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                yield f"{name}/{key}", _number(value)
            elif value.ndim == 0:  # steps, the same for all of a group
                yield f"{name}/{key}", value.clone()
            else:
                yield f"{name}/{key}", safe_get_full_optimizer_state(parameter, key)


def set_optimizer_state(
    method: Method, optimizer: Any, trained: Mapping[str, Tensor], moments: Mapping[str, Tensor], rank: int
) -> None:
    """The inverse: give the optimizer of process ``rank`` its state back.

    ``trained``: the trained tensors, unsharded; the method's parameters hold them already. Before its first step an
    optimizer has no state to write into: it is made here, as the first step would make it.
    """
    kept = optimizer.optimizer
    stepping = _stepping(kept)
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in moments.items():
        name, key = path.rsplit("/", 1)
        found.setdefault(name, {})[key] = value
    for number, group in enumerate(stepping.param_groups):
        if counted := found.get(f"{GROUP}{number}"):
            group["step"] = _restored(counted["step"], torch.device("cpu"))
    if not _sharded(kept):
        for name, parameter in method.trainable():
            if name in found:  # without a gradient so far there are no moments
                kept.state[parameter] = {
                    key: _restored(value, _steps_device(kept, parameter) if value.ndim == 0 else parameter.device)
                    for key, value in found[name].items()
                }
        return
    partitions = _partitions(kept)
    for partition, saved in {partitions[p]: found[name] for name, p in method.trainable() if name in found}.items():
        stepping.state[partition] = {
            key: _restored(value, _steps_device(stepping, partition))
            if value.ndim == 0
            else torch.zeros_like(partition)
            for key, value in saved.items()
        }
    _link(kept)
    for name, parameter in method.trainable():
        _put(parameter, trained[name], None, rank)  # DeepSpeed steps on a float32 copy
        for key, value in found.get(name, {}).items():
            if value.ndim:
                _put(parameter, value, key, rank)


def _number(number: float) -> Tensor:
    """A number that is no tensor, in a type that says so: torch keeps none of its own in it (``_restored``)."""
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64)


def _restored(value: Tensor, device: torch.device) -> Tensor | float:
    """A copy on a device; of a number that was no tensor, the number."""
    return value.item() if value.ndim == 0 and value.dtype in NUMBERS else value.to(device, copy=True)


def _sharded(optimizer: Any) -> bool:
    """Whether this is DeepSpeed's wrapper around torch's optimizer (ZeRO 1 to 3), and not torch's alone."""
    return not isinstance(optimizer, torch.optim.Optimizer)


def _steps_device(optimizer: torch.optim.Optimizer, tensor: Tensor) -> torch.device:
    """Where an optimizer counts the steps of a tensor: its fused kernels beside the tensor, all others on the host."""
    return tensor.device if optimizer.defaults.get("fused") else torch.device("cpu")


def _stepping(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer, inside DeepSpeed's wrapper if there is one."""
    return optimizer.optimizer if _sharded(optimizer) else optimizer


def _partitions(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """For each parameter the flat tensor with its part that torch's optimizer updates on this process."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        groups, partitions = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat
    else:
        groups, partitions = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    pairs = zip(groups, partitions, strict=True)
    return {parameter: partition for group, partition in pairs for parameter in group}


def _link(optimizer: Any) -> None:
    """Link the parameters of ZeRO 1 and 2 with their moments in the partitions.

    DeepSpeed does so after its first group's first step, when the other groups have no moments yet.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, partition in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, partition, optimizer.optimizer.state)


def _put(parameter: Any, value: Tensor, key: str | None, rank: int) -> None:
    """Write this process's part of an unsharded tensor into the moment ``key``, or into the float32 copy."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_id"):
        value = held_part(parameter, value, rank)  # DeepSpeed's setter does not know that shards are padded
        if key is None:
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
