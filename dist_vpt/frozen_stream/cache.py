"""The content of a stream cache, its computation into memory, and its use in place of a loader.

n images of the split, B of a batch, S image side, N tokens, D width, H heads, E = D / H, L blocks that are read.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.data.labels import batch_labels
from dist_vpt.data.loaders import PADDING, Batch, EvalBatches
from dist_vpt.data.splits import Split
from dist_vpt.data.workers import Request
from dist_vpt.distributed.collectives import RankAccelerator, raise_on_any_rank
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import DataError, Interrupted
from dist_vpt.frozen_stream.compact import KEPT_AS, Packed, pack
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream
from dist_vpt.frozen_stream.prefetch import prefetched


@dataclass(frozen=True)
class StreamCache:
    """The frozen stream of all images of a split."""

    kept: StreamOutput  # of n images; in 8 bits each tensor of a block is a Packed
    readable_n: np.ndarray  # false for images that were skipped

    def __getitem__(self, index_B: Tensor) -> StreamOutput:
        """The rows of some images, in the order of the indices."""
        return unpacked(self.rows(index_B))

    def rows(self, index_B: Tensor) -> StreamOutput:
        """The same as they are kept, in 8 bits Packed ones; to be copied to a GPU, in pinned memory."""
        device = self.kept.pooled.device
        # From pinned memory: a copy from any other would be waited for, and with it the step that the GPU computes.
        index_B = index_B.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index_B.to(device)

        def pinned(found: Tensor) -> Tensor:
            return found.pin_memory() if found.device.type == "cpu" and torch.cuda.is_initialized() else found

        def rows(kept: Tensor | Packed) -> Any:
            if isinstance(kept, Packed):
                values, scale, dtype = kept.rows(index_B)
                return Packed(pinned(values), pinned(scale), dtype)
            return pinned(kept.index_select(0, index_B))

        pooled_nD, *blocks = self.kept
        return StreamOutput(rows(pooled_nD), *(tuple(map(rows, each)) for each in blocks))


def unpacked(rows: StreamOutput) -> StreamOutput:
    """Tensors alone, on the device of the rows."""
    pooled_BD, *blocks = rows
    return StreamOutput(
        pooled_BD, *(tuple(each.unpack() if isinstance(each, Packed) else each for each in block) for block in blocks)
    )


class CachedBatches:
    """Makes batches from a cache, where a loader would decode images.

    ``device``: on which rows from host memory are wanted; other than the CPU, they are copied there one batch ahead, in
    8 bits where they are kept so.
    """

    def __init__(self, cache: StreamCache, labels: np.ndarray, skipped: set[str], device: torch.device | None = None):
        self.cache, self.labels, self.skipped = cache, labels, skipped
        self._ahead = device if _crosses(cache, device) else None

    def __call__(self, requests: list[Request]) -> Iterator[Batch]:
        indices = [index_b for _, index_b in requests]
        rows = map(self._rows, indices) if self._ahead is None else prefetched(self._rows, indices, self._ahead)
        with closing(rows) if isinstance(rows, Generator) else nullcontext():
            for index_b, images in zip(indices, rows, strict=True):
                real_b = index_b != PADDING
                rows_b = np.where(real_b, index_b, 0)
                yield Batch(
                    images=unpacked(images),
                    labels=torch.from_numpy(batch_labels(self.labels, index_b)),
                    weight=torch.from_numpy((real_b & self.cache.readable_n[rows_b]).astype(np.float32)),
                    index=torch.from_numpy(index_b.astype(np.int64)),
                )

    def _rows(self, index_b: np.ndarray) -> StreamOutput:
        return self.cache.rows(torch.from_numpy(np.where(index_b != PADDING, index_b, 0).astype(np.int64)))

    def close(self) -> None:
        """A cache has no workers to stop."""


class Array(NamedTuple):
    """One array of a cache."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def layout(backbone: Backbone, spec: StreamSpec, images: int) -> dict[str, Array]:
    """The arrays of a cache by name."""
    found = {"pooled": Array((images, backbone.width), backbone.dtype)}
    for field, numbers in spec.kept.items():
        for number in numbers:
            name, shape = _array_name(field, number), (images, *_shape_of(backbone, spec, field, number))
            if _is_packed(spec, field):
                found[name] = Array(shape, KEPT_AS[spec.dtype])
                found[_scale_name(name)] = Array((*shape[:-1], 1), torch.float32)
            else:
                found[name] = Array(shape, backbone.dtype)
    if spec.pixels:
        found["pixels"] = Array((images, 3, backbone.image_size, backbone.image_size), backbone.mean.dtype)
    return found


def _shape_of(backbone: Backbone, spec: StreamSpec, field: str, number: int) -> tuple[int, ...]:
    """Of what is kept of an image for one block or state."""
    if field == "states":
        return (backbone.tokens - (backbone.prefix if spec.patches_only else 0), backbone.width)
    heads = backbone.blocks[number].attn.num_heads
    of_heads = (heads, backbone.tokens, backbone.width // heads)
    of_tokens = {"normed": (backbone.tokens, backbone.width), "key_scales": (backbone.tokens, heads)}
    return of_tokens.get(field, of_heads)


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
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in layout(backbone, spec, len(split)).items()
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
    return assemble(arrays, readable_n, spec, backbone.dtype)


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

    def put(name: str, rows: Tensor, *, packed: bool = False) -> None:
        rows = gather(rows)
        if packed:
            rows, scale = pack(rows, spec.dtype)
            keep(_scale_name(name), scale)
        keep(name, rows)

    def keep(name: str, rows: Tensor) -> None:
        kept = arrays[name]
        kept[index_B[real_B].to(kept.device)] = rows[real_B.to(rows.device)].to(kept.device)

    put("pooled", output.pooled)
    for pixels_B3SS in output.pixels:
        put("pixels", pixels_B3SS)
    for field, numbers in spec.kept.items():
        for number, rows in zip(numbers, getattr(output, field), strict=True):
            put(_array_name(field, number), rows, packed=_is_packed(spec, field))


def assemble(arrays: dict[str, Tensor], readable_n: np.ndarray, spec: StreamSpec, dtype: torch.dtype) -> StreamCache:
    """A cache of arrays that are filled, whose rows come in ``dtype``."""

    def kept(field: str, number: int) -> Any:
        name = _array_name(field, number)
        if _is_packed(spec, field):
            return Packed(arrays[name], arrays[_scale_name(name)], dtype)
        return arrays[name]

    blocks = {field: tuple(kept(field, number) for number in numbers) for field, numbers in spec.kept.items()}
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


def _array_name(field: str, number: int) -> str:
    return f"{field.replace('_', '-')}-{number:02d}"


def _is_packed(spec: StreamSpec, field: str) -> bool:
    """Whether tensors of this field are kept in 8 bits: those with numbers of tokens."""
    return spec.dtype != "precision" and field != "key_scales"


def _scale_name(name: str) -> str:
    return f"{name}-scale"


def _next_or_error(batches: Iterator[Batch], accelerator: RankAccelerator, stop: StopSignal) -> Batch:
    """The next batch, or on all processes the error of the one that failed, or Interrupted after a stop signal."""
    try:
        batch, error = next(batches), None
    except (DataError, Interrupted) as failed:
        batch, error = None, failed
    raise_on_any_rank(accelerator, error, stop)
    if stop.agreed:
        raise stopped()
    assert batch is not None
    return batch
