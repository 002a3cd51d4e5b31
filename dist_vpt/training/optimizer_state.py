"""What an optimiser remembers of each trained tensor, by name and whole, whatever the strategy.

DeepSpeed keeps it in flat pieces, a share of them on each process. Gathered by name it is the same for every strategy
and number of processes, so that any of them can go on from it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_vpt.methods.base import Method


def gather_optimizer_state(method: Method, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """``NAME/KEY`` and tensor for all that the optimiser remembers. A collective call under ZeRO."""
    kept = optimizer.optimizer  # below Accelerate's wrapper
    if not _sharded(kept):
        for name, parameter in method.trainable():
            for key, value in kept.state.get(parameter, {}).items():
                if value is not None:  # sgd without momentum
                    yield f"{name}/{key}", value
        return
    from deepspeed.utils import safe_get_full_optimizer_state

    if hasattr(kept, "checkpoint_event_prologue"):  # ZeRO-3 lets go of the weights that scoring gathered
        kept.checkpoint_event_prologue()
        kept.checkpoint_event_epilogue()
    pieces = _pieces(kept)
    _link(kept)
    for name, parameter in method.trainable():
        for key, value in kept.optimizer.state[pieces[0]].items():
            if value is not None:
                counted = value.ndim == 0  # steps, alike in all pieces
                yield f"{name}/{key}", value.clone() if counted else safe_get_full_optimizer_state(parameter, key)


def set_optimizer_state(
    method: Method, optimizer: Any, trained: Mapping[str, Tensor], moments: Mapping[str, Tensor], rank: int
) -> None:
    """The opposite: give the optimiser of process ``rank`` back what it remembered.

    ``trained``: the tensors that are trained, whole; the method's own hold them already. An optimiser that has made no
    step yet has nothing to write into: its state is made here, as its first step would make it.
    """
    kept = optimizer.optimizer
    found: dict[str, dict[str, Tensor]] = {}
    for place, value in moments.items():
        name, key = place.rsplit("/", 1)
        found.setdefault(name, {})[key] = value
    if not _sharded(kept):
        for name, parameter in method.trainable():
            if name in found:  # what never had a gradient has no moments
                kept.state[parameter] = {
                    key: value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
                    for key, value in found[name].items()
                }
        return
    for piece in _pieces(kept):
        kept.optimizer.state[piece] = {
            key: value.clone() if value.ndim == 0 else torch.zeros_like(piece)
            for key, value in next(iter(found.values()), {}).items()
        }
    _link(kept)
    for name, parameter in method.trainable():
        _put(parameter, trained[name], None, rank)  # DeepSpeed steps on a copy of its own
        for key, value in found.get(name, {}).items():
            if value.ndim:
                _put(parameter, value, key, rank)


def _sharded(optimizer: Any) -> bool:
    """Whether this is DeepSpeed's optimiser around torch's one (ZeRO 1 to 3), and not torch's alone."""
    return not isinstance(optimizer, torch.optim.Optimizer)


def _pieces(optimizer: Any) -> list[Tensor]:
    """The flat tensors that torch's optimiser inside DeepSpeed's steps on, on this process."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def _link(optimizer: Any) -> None:
    """Tell ZeRO 1's and 2's parameters where in the pieces their moments lie.

    DeepSpeed does so after its first group's first step, when the other groups have no moments yet.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, piece in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, piece, optimizer.optimizer.state)


def _put(parameter: Any, value: Tensor, key: str | None, rank: int) -> None:
    """Write this process's share of a whole tensor: of the moment ``key``, or of the float32 copy that is stepped."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_id"):  # shares are padded to one length, which DeepSpeed's own setter forgets
        share = parameter.ds_tensor.numel()
        value = F.pad(value.flatten(), (0, max(0, share * (rank + 1) - value.numel())))
        value = value[share * rank : share * (rank + 1)]
        if key is None:
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
