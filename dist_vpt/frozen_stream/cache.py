"""The content of a stream cache, its computation into memory, and its use in place of a loader.

n images of the split, B of a batch, S image side, N tokens, D width, H heads, E = D / H, L blocks that are read.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.data.loaders import PADDING, Batch, EvalBatches
from dist_vpt.data.splits import Split
from dist_vpt.distributed.collectives import RankAccelerator, raise_on_any_rank
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import DataError, Interrupted
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream
from dist_vpt.frozen_stream.prefetch import prefetched


@dataclass(frozen=True)
class StreamCache:
    """The frozen stream of all images of a split."""

    kept: StreamOutput  # of n images
    readable_n: np.ndarray  # false for images that were skipped

    def __getitem__(self, index_B: Tensor) -> StreamOutput:
        """The rows of some images, in the order of the indices."""
        index_B = index_B.to(self.kept.pooled.device)

        def rows(kept: Tensor) -> Tensor:
            found = kept.index_select(0, index_B)
            return found.pin_memory() if found.device.type == "cpu" and torch.cuda.is_initialized() else found

        pooled_nD, *blocks = self.kept
        return StreamOutput(rows(pooled_nD), *(tuple(map(rows, each)) for each in blocks))


class CachedBatches:
    """Makes batches from a cache, where a loader would decode images.

    ``device``: on which rows from host memory are wanted; other than the CPU, they are copied there one batch ahead.
    """

    def __init__(self, cache: StreamCache, labels_n: np.ndarray, skipped: set[str], device: torch.device | None = None):
        self.cache, self.labels_n, self.skipped = cache, labels_n, skipped
        self._ahead = device if _crosses(cache, device) else None

    def __call__(self, requests: list[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        indices = [index_b for _, index_b in requests]
        rows = map(self._rows, indices) if self._ahead is None else prefetched(self._rows, indices, self._ahead)
        with closing(rows) if isinstance(rows, Generator) else nullcontext():
            for index_b, images in zip(indices, rows, strict=True):
                real_b = index_b != PADDING
                rows_b = np.where(real_b, index_b, 0)
                yield Batch(
                    images=images,
                    labels=torch.from_numpy(np.where(real_b, self.labels_n[rows_b], 0)),
                    weight=torch.from_numpy((real_b & self.cache.readable_n[rows_b]).astype(np.float32)),
                    index=torch.from_numpy(index_b.astype(np.int64)),
                )

    def _rows(self, index_b: np.ndarray) -> StreamOutput:
        return self.cache[torch.from_numpy(np.where(index_b != PADDING, index_b, 0).astype(np.int64))]

    def close(self) -> None:
        """A cache has no workers to stop."""


def layout(backbone: Backbone, spec: StreamSpec, images: int) -> dict[str, Tensor]:
    """Name -> a tensor of the shape and dtype of each array of a cache, on the meta device (without memory)."""
    found: dict[str, tuple[int, ...]] = {"pooled": (images, backbone.width)}
    for number in spec.blocks:
        heads = backbone.blocks[number].attn.num_heads
        of_heads = (images, heads, backbone.tokens, backbone.width // heads)
        of_field: dict[str, tuple[int, ...]] = {
            "normed": (images, backbone.tokens, backbone.width),
            "key_scales": (images, backbone.tokens, heads),
            "keys": of_heads,
            "values": of_heads,
        }
        found |= {_array_name(field, number): of_field[field] for field in spec.fields}
    arrays = {name: torch.empty(shape, dtype=backbone.dtype, device="meta") for name, shape in found.items()}
    if spec.pixels:
        shape = (images, 3, backbone.image_size, backbone.image_size)
        arrays["pixels"] = torch.empty(shape, dtype=backbone.mean.dtype, device="meta")
    return arrays


def nbytes(backbone: Backbone, spec: StreamSpec, images: int) -> int:
    """Size of the frozen stream of some images, bytes."""
    return sum(array.nbytes for array in layout(backbone, spec, images).values())


def fill(  # noqa: PLR0917 (what is computed, from what, where it is kept)
    backbone: Backbone,
    spec: StreamSpec,
    batches: EvalBatches,
    split: Split,
    accelerator: RankAccelerator,
    device: torch.device,
    stop: StopSignal,
) -> StreamCache:
    """Compute the stream of a split and keep it on ``device``. A collective call: the processes share the work.

    Raises a process's DataError on all of them, and Interrupted after a stop signal.
    """
    arrays = {
        name: torch.empty_like(array, device=device) for name, array in layout(backbone, spec, len(split)).items()
    }
    readable_n = np.zeros(len(split), bool)
    unread = iter(batches)
    for _ in range(len(batches)):
        batch = _next_or_error(unread, accelerator, stop)
        output = compute_stream(backbone, batch["images"].to(accelerator.device), spec)
        index_B, weight_B = batch["index"], batch["weight"]
        gather: Callable[[Any], Any] = accelerator.gather if accelerator.num_processes > 1 else lambda rows: rows
        if accelerator.num_processes > 1:
            index_B, weight_B = gather((index_B.to(accelerator.device), weight_B.to(accelerator.device)))
        write_rows(arrays, spec, output, index_B, gather)
        del output
        real_B = (index_B != PADDING).cpu()
        readable_n[index_B.cpu()[real_B].numpy()] = weight_B.cpu()[real_B].numpy() > 0
    return assemble(arrays, readable_n, spec)


def write_rows(
    arrays: dict[str, Tensor],
    spec: StreamSpec,
    output: StreamOutput,
    index_B: Tensor,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> None:
    """Copy the stream of a batch into the rows of its images.

    ``gather``: makes the rows of all images of ``index_B`` from those that this process holds, called for one array
    after the other, so that no more than one block of the other processes' images is held at a time.
    """
    real_B = index_B != PADDING

    def put(name: str, rows: Tensor) -> None:
        kept, rows = arrays[name], gather(rows)
        kept[index_B[real_B].to(kept.device)] = rows[real_B.to(rows.device)].to(kept.device)

    put("pooled", output.pooled)
    for pixels_B3SS in output.pixels:
        put("pixels", pixels_B3SS)
    for field in spec.fields:
        for number, rows in zip(spec.blocks, getattr(output, field), strict=True):
            put(_array_name(field, number), rows)


def assemble(arrays: dict[str, Tensor], readable_n: np.ndarray, spec: StreamSpec) -> StreamCache:
    """A cache of arrays that are filled."""
    blocks = {field: tuple(arrays[_array_name(field, number)] for number in spec.blocks) for field in spec.fields}
    pixels = (arrays["pixels"],) if spec.pixels else ()
    return StreamCache(StreamOutput(arrays["pooled"], **blocks, pixels=pixels), readable_n)


def stopped() -> Interrupted:
    """The error that ends the computation of a stream after a stop signal."""
    return Interrupted(
        "stopped while the frozen stream was computed; started again (run.resume=auto), the run computes it anew"
    )


def _crosses(cache: StreamCache, device: torch.device | None) -> bool:
    """Whether rows of the cache go from host memory to another device."""
    return device is not None and device.type != "cpu" and cache.kept.pooled.device.type == "cpu"


def _array_name(field: str, block: int) -> str:
    return f"{field.replace('_', '-')}-{block:02d}"


def _next_or_error(batches: Iterator[Batch], accelerator: RankAccelerator, stop: StopSignal) -> Batch:
    """The next batch, or on all processes the error of the one that failed, or Interrupted after a stop signal."""
    try:
        batch, error = next(batches), None
    except DataError as failed:
        batch, error = None, failed
    raise_on_any_rank(accelerator, error, stop)
    if stop.agreed:
        raise stopped()
    assert batch is not None
    return batch
