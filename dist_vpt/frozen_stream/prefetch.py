"""Rows of a cache in host memory on their way to the device, one batch ahead."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch.utils._pytree import tree_iter

R = TypeVar("R")


def prefetched(make: Callable[[R], Any], requests: Sequence[R], device: torch.device) -> Iterator[Any]:
    """``make``'s answer to each request, on the device; the next one is made and copied in a thread meanwhile.

    ``make``: gives tensors in pinned memory on a machine with CUDA, in any nesting of tuples and dicts. Copies to a
    CUDA device go through a stream of their own. Errors of ``make`` are raised here, in the order of the requests.
    """
    cuda = device.type == "cuda"
    side = torch.cuda.Stream(device) if cuda else None

    def ahead(request: R) -> tuple[Any, Any]:
        # A thread starts on the first device and its default stream.
        with torch.cuda.stream(side) if cuda else nullcontext():
            made = send_to_device(make(request), device, non_blocking=True)
            return made, side.record_event() if side is not None else None

    with ThreadPoolExecutor(1, "stream-cache") as thread:
        following = [thread.submit(ahead, request) for request in requests[:1]]
        for number in range(len(requests)):
            made, copied = following.pop().result()
            following = [thread.submit(ahead, request) for request in requests[number + 1 : number + 2]]
            if copied is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(copied)
                for tensor in tree_iter(made):  # memory of the side stream, which must not be used again too early
                    tensor.record_stream(current)
            yield made
