"""Tensors on their way to the device beside what it computes, and rows of a cache in host memory one batch ahead."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch.utils._pytree import tree_iter

R = TypeVar("R")


class DeviceCopy:
    """A copy that has been started, from pinned memory in any nesting of tuples and dicts.

    Copies to a CUDA device go through a stream of their own, so that they wait for nothing that is computed there.
    """

    def __init__(self, made: Any, device: torch.device, use: str):
        """``use``: copies of one use wait for each other."""
        self._device, self._copied = device, None
        if device.type != "cuda":
            self._made = send_to_device(made, device, non_blocking=True)
            return
        side = side_stream(device, use)
        with torch.cuda.stream(side):
            self._made = send_to_device(made, device, non_blocking=True)
            self._copied = side.record_event()

    def arrived(self) -> Any:
        """The copy, for what the current stream computes from now on."""
        if self._copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._copied)
            for leaf in tree_iter(self._made):  # memory of the side stream, which must not be used again too early
                if not isinstance(leaf, torch.dtype):
                    leaf.record_stream(current)
        return self._made


@cache
def side_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """One for the whole process: the allocator keeps memory for each stream that has ever been used."""
    return torch.cuda.Stream(device)


def prefetched(make: Callable[[R], Any], requests: Sequence[R], device: torch.device) -> Iterator[Any]:
    """``make``'s answer to each request, on the device; the next one is made and copied in a thread meanwhile.

    ``make``: gives tensors in pinned memory on a machine with CUDA, in any nesting of tuples and dicts. Errors of
    ``make`` are raised here, in the order of the requests.
    """

    def ahead(request: R) -> DeviceCopy:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # a thread starts on the first one
            return DeviceCopy(make(request), device, "rows")

    with ThreadPoolExecutor(1, "stream-cache") as thread:
        following = [thread.submit(ahead, request) for request in requests[:1]]
        for number in range(len(requests)):
            copy = following.pop().result()
            following = [thread.submit(ahead, request) for request in requests[number + 1 : number + 2]]
            yield copy.arrived()
