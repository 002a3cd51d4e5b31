"""Parameters that DeepSpeed has sharded: their shards, and how they are gathered for a moment."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def held(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: under ZeRO-3 its shard [ceil(numbers / processes)], or all of it."""
    return getattr(parameter, "ds_tensor", parameter)


def held_part(parameter: Any, whole: Tensor, rank: int) -> Tensor:
    """The part of a tensor as large as the whole parameter that process ``rank`` holds, shaped as ``held`` is.

    All shards of a parameter have one length; what the last ones have more than the parameter is filled with zeros.
    """
    if not hasattr(parameter, "ds_tensor"):
        return whole
    size = parameter.ds_tensor.numel()
    flat = F.pad(whole.flatten(), (0, max(0, size * (rank + 1) - whole.numel())))
    return flat[size * rank : size * (rank + 1)]


def release_gathered(parameters: Iterable[Any]) -> None:
    """Let go of all weights that ZeRO-3 has gathered, so that what is written into shards is what is gathered next.

    To be called once ZeRO-3 trains the parameters. Not a collective call: each is gathered when it is needed again.
    """
    owner = next((parameter._z3_optimizer for parameter in parameters if hasattr(parameter, "_z3_optimizer")), None)
    if owner is not None:
        owner.checkpoint_event_prologue()


@contextmanager
def gathered(parameters: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Gather the parameters that ZeRO-3 shards; with ``write``, the main process's values go to all."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


@contextmanager
def gathered_when_called(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have each module gather its parameters that ZeRO-3 shards while it is called, before DeepSpeed's engine does."""
    gathering: dict[nn.Module, AbstractContextManager[None]] = {}

    def enter(module: nn.Module, _: Any) -> None:
        gathering[module] = gathered([*module.parameters()])
        gathering[module].__enter__()

    def leave(module: nn.Module, *_: Any) -> None:
        gathering.pop(module).__exit__(None, None, None)

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
