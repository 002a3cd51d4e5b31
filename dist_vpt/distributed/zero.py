"""Parameters that DeepSpeed has sharded, gathered for a moment."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn


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
