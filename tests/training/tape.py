"""What a CUDA graph does, on a CPU: operators are noted with the tensors that they were called on, and called again.

As in a CUDA graph, numbers that Python computed are constants of the capture, memory is that of the capture, capturing
computes nothing, and what would wait for the device is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# They read numbers from the device, or bring some from the host (a tensor made of Python's numbers).
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.lift_fresh.default,
}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """The operators that are called within, in order; what they changed of earlier memory is undone at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in WAITING:
            raise RuntimeError(f"{operator} while capturing")
        given, kwargs = tensors((args, kwargs)), kwargs or {}
        if operator._schema.is_mutable:
            for tensor in given:  # all of them: which one is changed does not matter here
                if storage(tensor) not in self.made | self.before.keys():
                    kept = tensor.untyped_storage()
                    self.before[storage(tensor)] = kept, kept.clone()
        made = operator(*args, **kwargs)
        self.made |= {storage(tensor) for tensor in tensors(made)} - {storage(tensor) for tensor in given}
        self.calls.append((operator, args, kwargs, made))
        return made

    def undo(self) -> None:
        for kept, copy in self.before.values():
            kept.copy_(copy)

    def call_again(self) -> None:
        for operator, args, kwargs, made in self.calls:
            for old, new in zip(tensors(made), tensors(operator(*args, **kwargs)), strict=True):
                if storage(old) != storage(new):
                    old.copy_(new)


class Waits(TorchDispatchMode):
    """Notes whether anything would wait for the device."""

    waited = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waited |= operator in WAITING
        return operator(*args, **(kwargs or {}))


class TapeCapture:
    def __init__(self, tape: Tape, made: Tensor):
        self.tape, self.made, self.replays = tape, made, 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        self.tape.call_again()


class TapeRecorder:
    """As CudaRecorder."""

    def __init__(self) -> None:
        self.rehearsals = 0
        self.captures: list[TapeCapture] = []

    @property
    def replays(self) -> list[int]:
        return [capture.replays for capture in self.captures]

    def rehearse(self, step: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        self.rehearsals += 1
        with Waits() as mode:
            made = step()
        return made, mode.waited

    def capture(
        self, step: Callable[[], Tensor], sources: Sequence[torch.Generator], beside: Any = None
    ) -> TapeCapture:
        states = [source.get_state() for source in sources]
        tape = Tape()
        try:
            with tape:
                made = step()
        finally:
            tape.undo()
            for source, state in zip(sources, states, strict=True):
                source.set_state(state)
        self.captures.append(TapeCapture(tape, made))
        return self.captures[-1]
