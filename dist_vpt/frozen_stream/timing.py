"""Whether computing the frozen stream anew is faster than copying it from host memory, measured on some batches.

b images of a batch.
"""

import time
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device

from dist_vpt.backbones.vit import Backbone
from dist_vpt.data.loaders import Batch, EvalBatches
from dist_vpt.frozen_stream.cache import assemble, layout, unpacked, write_rows
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream

BATCHES = 4  # that are timed, or as many as workers make at a time: they finish theirs at about the same moment


class Speeds(NamedTuple):
    """Milliseconds an image."""

    live: float  # reading it and computing its stream
    host: float  # gathering and copying its rows

    @property
    def live_is_faster(self) -> bool:
        return self.live < self.host

    def __str__(self) -> str:
        return f"{self.live:.2f} ms an image live, {self.host:.2f} ms from host memory"


def measure(backbone: Backbone, spec: StreamSpec, batches: EvalBatches, device: torch.device) -> Speeds:
    """Mean times of both on some of the batches, uint8 or float images [b, 3, S, S]. Raises their DataError."""
    reading = iter(batches)
    # The first batch prepares: workers start, kernels are chosen, memory is allocated.
    output = compute_stream(backbone, next(reading)["images"].to(device), spec)
    host = _time_host(backbone, spec, output, device)
    images, timed = 0, _steady(batches, reading)
    started = time.perf_counter()
    for batch in timed:
        compute_stream(backbone, batch["images"].to(device), spec)
        images += len(batch["index"])
    _finish(device)
    return Speeds(1000 * (time.perf_counter() - started) / images, host)


def _steady(batches: EvalBatches, reading: Iterator[Batch]) -> Iterator[Batch]:
    """Batches that arrive as they do in the midst of an epoch. ``reading``: a pass of which the first one is read.

    The first batches of a pass do not: workers prefetch them while somebody waits or computes. They are read here
    without computing anything, so that those which follow are still to be decoded. Where a split has too few batches
    for that, they are a whole second pass, of which workers have read nothing yet: they cost what every epoch costs.
    """
    count = max(BATCHES, batches.ahead)
    skipped = batches.ahead if len(batches) > batches.ahead + count else len(batches)
    for _ in islice(reading, skipped):
        pass
    return islice(reading, count) if skipped < len(batches) else iter(batches)


def _time_host(backbone: Backbone, spec: StreamSpec, output: StreamOutput, device: torch.device) -> float:
    """Milliseconds an image to gather rows in another order, to copy them, and to unpack what is kept in 8 bits."""
    images = len(output.pooled)
    arrays = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout(backbone, spec, images).items()}
    write_rows(arrays, spec, output, torch.arange(images))
    kept = assemble(arrays, np.ones(images, bool), spec, backbone.dtype)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    unpacked(send_to_device(kept.rows(order), device))  # allocates pinned memory
    _finish(device)
    started = time.perf_counter()
    for _ in range(BATCHES):
        unpacked(send_to_device(kept.rows(order), device))
    _finish(device)
    return 1000 * (time.perf_counter() - started) / (BATCHES * images)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
