"""Whether computing the frozen stream anew is faster than copying it from host memory, measured on some batches.

b images of a batch.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device

from dist_vpt.backbones.vit import Backbone
from dist_vpt.data.loaders import Batch
from dist_vpt.frozen_stream.cache import StreamCache
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream

BATCHES = 4  # of which the first prepares: workers start, kernels are chosen, memory is allocated


class Speeds(NamedTuple):
    """Milliseconds an image."""

    live: float  # reading it and computing its stream
    host: float  # gathering and copying its rows

    @property
    def live_is_faster(self) -> bool:
        return self.live < self.host

    def __str__(self) -> str:
        return f"{self.live:.2f} ms an image live, {self.host:.2f} ms from host memory"


def measure(
    backbone: Backbone, spec: StreamSpec, batches: Iterator[Batch], device: torch.device, *, several: int = BATCHES
) -> Speeds:
    """Time both on the first of the batches, uint8 or float images [b, 3, S, S]. Raises their DataError."""
    live, host = [], []
    for _ in range(several):
        started = time.perf_counter()
        if (batch := next(batches, None)) is None:
            break
        output = compute_stream(backbone, batch["images"].to(device), spec)
        _finish(device)
        images = len(batch["index"])
        live.append((time.perf_counter() - started) / images)
        kept = StreamCache(_on_host(output), np.ones(images, bool))
        order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
        started = time.perf_counter()
        send_to_device(kept[order], device)
        _finish(device)
        host.append((time.perf_counter() - started) / images)
    return Speeds(*(1000 * min(each[1:] or each, default=0.0) for each in (live, host)))


def _on_host(output: StreamOutput) -> StreamOutput:
    pooled_BD, *blocks = output
    return StreamOutput(pooled_BD.cpu(), *(tuple(each.cpu() for each in block) for block in blocks))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
